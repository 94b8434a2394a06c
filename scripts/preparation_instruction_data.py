"""Prepare instruction data in the form of OpenOrca: a random part of it, as plain text.

The flags of the research code's script of this name; `--help` says what they do. More in
docs/data.md. The same with more columns, or for other data: `mola prepare --num_samples`.
"""

import sys

from mola.cli import run_script

if __name__ == "__main__":
    sys.exit(
        run_script(
            "research_code.preparation",
            "InstructionOptions",
            "draw instruction data, written as plain text",
        )
    )
