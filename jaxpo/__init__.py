"""jaxpo: direct preference optimisation in JAX."""
