"""`python -m mola`: the `mola` command."""

import sys

from mola.cli import main

if __name__ == "__main__":
    sys.exit(main())
