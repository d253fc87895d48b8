"""bailing-jax."""
