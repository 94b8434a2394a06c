"""Fine-tune experts on plain text, such as sampled instruction data.

The flags of the research code's script of this name; `--help` says what they do. More in
docs/from-the-research-code.md. The same with more options: `mola train`.
"""

import sys

from mola.cli import run_script

if __name__ == "__main__":
    sys.exit(
        run_script(
            "research_code.training",
            "ResearchInstructionOptions",
            "fine-tune a mixture of LoRA experts on plain text",
            bare_no=True,
        )
    )
