"""Tensor and pipeline parallelism of one model replica: which rank holds what, and the few collectives that the model calls.

On a mesh of one everything is the identity, so the model's code has no second version.
"""
