"""The engine: which requests run this step, what they sample, and when they stop.

`scheduler`, `slots`, `pages` and `stop` are plain Python and import no jax.
"""
