"""`python -m refine_jax`: the command line."""

import sys

from refine_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
