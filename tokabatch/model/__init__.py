"""A decoder-only language model: its description, its weights, one forward pass for every family, and the sampler.

`spec`, `config`, `families` and `checkpoint` read and check files without torch; `decoder`, `layers`, `weights` and
`sampler` compute. Independent of the scheduler; attention is an argument of the forward pass, and so is a cache that it writes.
"""
