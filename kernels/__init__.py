"""Implementations of prefix attention; the plain-JAX reference, which specifies them, is `bicache_jax.attention`."""
