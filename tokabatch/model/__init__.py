"""A decoder-only language model: its description, its weights, one forward pass for every family, and the sampler.

`spec`, `config`, `families` and `checkpoint` read and check files without torch; `decoder`, `layers`, `weights` and
`sampler` compute. Knows no scheduler, no pages and no cache: attention is a callable that the engine brings.
"""
