"""Repeated sampling as an experiment: which samples are right, and what n tries are worth."""
