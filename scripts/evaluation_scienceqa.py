"""Measures the accuracy on prepared ScienceQA questions.

This script has the flags and the result file of the research code's script of the same name, see
docs/guides/from-the-research-code.md. `mola evaluate` does the same for other tasks.
"""

import sys

from mola.cli import run_script

if __name__ == "__main__":
    sys.exit(
        run_script(
            "research_code.evaluation",
            "research_code.evaluation.ResearchEvaluateOptions",
            "accuracy on prepared ScienceQA questions",
        )
    )
