"""Measurements on one GPU: whole jobs through `tokabatch.run` next to their roofline, and the kernels that they are made of."""
