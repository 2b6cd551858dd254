"""`python -m bicache_jax` is `bicache`."""

from bicache_jax.cli import entry

if __name__ == "__main__":
    entry()
