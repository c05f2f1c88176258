"""`python -m easgd_local` is the command `easgd-local`."""

import sys

from easgd_local.cli import main

if __name__ == "__main__":
    sys.exit(main())
