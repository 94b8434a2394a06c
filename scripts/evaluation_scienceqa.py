"""Accuracy on prepared ScienceQA questions.

The flags and the result file of the research code's script of this name. More in
docs/from-the-research-code.md. The same for other tasks: `mola evaluate`.
"""

import sys

from mola.cli import run_script

if __name__ == "__main__":
    sys.exit(
        run_script("research_code.evaluation", "ResearchEvaluateOptions", "accuracy on prepared ScienceQA questions")
    )
