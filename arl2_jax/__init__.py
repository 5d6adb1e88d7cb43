"""ARL2 in JAX."""
