"""`python -m bicache_jax` is `bicache`."""

import sys

from bicache_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
