"""`python -m benchmarks`: measure, print tables, write JSON."""

import os
import sys


def main() -> int:
    """Run the command line; see `benchmarks.command`."""
    # This must be set before torch is imported: the times of threads that spin at barriers would depend on the other
    # programs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from benchmarks.command import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
