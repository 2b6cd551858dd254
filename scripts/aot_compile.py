"""`bicache aot`, under the name that it had as a script.

python scripts/aot_compile.py --config llada_8b --topology v5e:2x4 --mesh data=2,model=4 --prefix 1024 --suffix 512
"""

from __future__ import annotations

import sys

from bicache_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["aot", *sys.argv[1:]]))
