"""Prepare ScienceQA: the questions without an image, as prompts and answers.

The flags of the research code's script of this name; `--help` says what they do. More in
docs/data.md. The same for any task: `mola prepare`.
"""

import sys

from mola.cli import run_script

if __name__ == "__main__":
    sys.exit(
        run_script(
            "research_code.preparation",
            "ScienceQAOptions",
            "prepare ScienceQA, questions without an image",
        )
    )
