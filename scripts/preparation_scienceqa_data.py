"""Prepare ScienceQA: the questions without an image, as prompts and answers.

This script has the flags of the research code's script of the same name; `--help` explains them, see also
docs/guides/data.md. `mola prepare` does the same for any task.
"""

import sys

from mola.cli import run_script

if __name__ == "__main__":
    sys.exit(
        run_script(
            "research_code.preparation",
            "research_code.preparation.ScienceQAOptions",
            "prepare ScienceQA, questions without an image",
        )
    )
