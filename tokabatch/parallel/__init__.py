"""Tensor and pipeline parallelism of one model replica: which rank holds what, and the few collectives the model calls.

Everything is the identity on a mesh of one, so the model's code has no second version.
"""
