"""`python -m lowres` is the same as the installed `lowres` command."""

import sys

from lowres.cli import main

if __name__ == "__main__":
    sys.exit(main())
