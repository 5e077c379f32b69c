"""`python -m ctpo`, and `accelerate launch -m ctpo`: the command line."""

import sys

from ctpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
