"""`mola convert`: a mixture to plain LoRA, LoRAs to a mixture, and the formats of other codes.

    mola convert adapter --to lora --rank 8 --base_model my-model --data train.json --task sample --output lora
    mola convert lora_a lora_b --from lora --num_experts 4 --base_model my-model --output adapter
    mola convert ./scienceqa_mola --from published --base_model my-model --top_k 2 --output adapter
    mola convert ./moe_peft_adapter --from moe_peft --base_model my-model --output adapter
    mola convert adapter --to published --output for_the_research_code

The output folder appears in one step, complete; a folder with something in it is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mola.checkpoints.conversion_report import ConvertReport
from mola.errors import MolaError
from mola.exporting.from_lora import MixtureReport, from_lora
from mola.exporting.options import ConvertOptions, check_direction
from mola.exporting.other_formats import to_mola, to_published_code
from mola.exporting.report import ExportReport
from mola.exporting.to_lora import to_lora
from mola.files.atomic import check_new_folder
from mola.files.terminal import table_console

__all__ = ["ConvertOptions", "ConvertReport", "ExportReport", "MixtureReport", "convert", "main"]

_DIRECTIONS: dict[str, Callable[[ConvertOptions, Path], ConvertReport | ExportReport | MixtureReport]] = {
    "--from published": to_mola,
    "--from moe_peft": to_mola,
    "--from lora": from_lora,
    "--to published": to_published_code,
    "--to lora": to_lora,
}


def convert(options: ConvertOptions) -> ConvertReport | ExportReport | MixtureReport:
    """Convert an adapter, in the direction that `source_format` or `target_format` gives.

    Args:
        options: see `ConvertOptions`; `source` and `data` may also be one text.

    Returns:
        What was read and written, and how near it is.

    Raises:
        MolaError: the options contradict each other, the output folder is not empty, the source is
            unreadable or incomplete, does not fit the base model, or cannot be expressed.
    """
    lists = {name: [value] for name in ("source", "data") if isinstance(value := getattr(options, name), str)}
    options = replace(options, **lists)  # type: ignore[arg-type]
    direction = check_direction(options)
    for source in options.source:
        if not os.path.isdir(os.path.expanduser(source)):
            raise MolaError(f"`source` must be the folder of an adapter, there is none at {source!r}.")
    return _DIRECTIONS[direction](options, check_new_folder("output", options.output))


def main(options: ConvertOptions) -> int:
    """Convert and print the report; returns 0, the exit code."""
    report = convert(options)
    if isinstance(report, ExportReport) and (report.divergence or report.accuracy):
        table_console().print(report.table())
    print(report)
    return 0
