"""Fine-tune experts on a prepared task.

This script has the flags of the research code's script of the same name; `--help` explains them, see also
docs/guides/from-the-research-code.md. `mola train` does the same with more options.
"""

import sys

from mola.cli import run_script

if __name__ == "__main__":
    sys.exit(
        run_script(
            "research_code.training",
            "research_code.training_options.ResearchTrainOptions",
            "fine-tune a mixture of LoRA experts on a prepared task",
            accept_noflag=True,
        )
    )
