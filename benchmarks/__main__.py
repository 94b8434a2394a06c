"""`python -m benchmarks`: measure, print tables, write JSON."""

import os
import sys


def main() -> int:
    """Run the command line; see `benchmarks.command`."""
    # Before torch is imported: threads that spin at barriers would measure the other programs of the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from benchmarks.command import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
