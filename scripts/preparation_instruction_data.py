"""Prepare instruction data in the form of OpenOrca: a random part of it, as plain text.

This script has the flags of the research code's script of the same name; `--help` explains them, see also
docs/guides/data.md. `mola prepare --num_samples` does the same with more columns, or for other data.
"""

import sys

from mola.cli import run_script

if __name__ == "__main__":
    sys.exit(
        run_script(
            "research_code.preparation",
            "research_code.preparation.InstructionOptions",
            "draw instruction data, written as plain text",
        )
    )
