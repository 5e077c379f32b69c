"""`python -m ctpo`: the console script `ctpo`."""

import sys

from ctpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
