"""`mola convert`: a mixture to plain LoRA, LoRAs to a mixture, and the formats of other programs.

    mola convert adapter --to lora --r 8 --base_model my-model --data train.json --task sample --output lora
    mola convert lora_a lora_b --from lora --num_experts 4 --base_model my-model --output adapter
    mola convert ./scienceqa_mola --from published --base_model my-model --top_k 2 --output adapter
    mola convert adapter --to published --output for_the_research_code

The output folder appears complete, in one step. A folder that holds files is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mola.exporting.from_lora import MixtureReport, convert_from_lora
from mola.exporting.measuring import ExportReport
from mola.exporting.options import ConvertOptions, check_direction, check_sources
from mola.exporting.other_formats import ConvertReport, convert_to_mola, convert_to_published
from mola.exporting.to_lora import convert_to_lora
from mola.files.atomic import check_new_folder
from mola.files.terminal import make_table_console
from mola.options.command_line import command_line, next_steps

__all__ = ["ConvertOptions", "ConvertReport", "ExportReport", "MixtureReport", "convert", "main"]

_CONVERTERS: dict[str, Callable[[ConvertOptions, Path], ConvertReport | ExportReport | MixtureReport]] = {
    "--from published": convert_to_mola,
    "--from lora": convert_from_lora,
    "--to published": convert_to_published,
    "--to lora": convert_to_lora,
}


def convert(options: ConvertOptions) -> ConvertReport | ExportReport | MixtureReport:
    """Convert an adapter in the direction that `source_format` or `target_format` gives.

    Args:
        options: see `ConvertOptions`; `source` and `data` may also be single strings.

    Returns:
        The report of the conversion; with --to lora also how near the LoRA is to the mixture.

    Raises:
        MolaError: the options contradict each other, the output folder is not empty, the source is
            unreadable or incomplete, does not fit the base model, or cannot be expressed in the target format.
    """
    lists = {name: [value] for name in ("source", "data") if isinstance(value := getattr(options, name), str)}
    options = replace(options, **lists)  # type: ignore[arg-type]
    check_sources(options.source)
    direction = check_direction(options)
    return _CONVERTERS[direction](options, check_new_folder("output", options.output))


def main(options: ConvertOptions) -> int:
    """Convert and print the report; returns 0, the exit code."""
    report = convert(options)
    if isinstance(report, ExportReport) and (report.divergence or report.accuracy):
        make_table_console().print(report.table())
    print(report)
    if options.base_model is not None:  # every direction but --to published, which is for a different program
        model = {"trust_remote_code": options.trust_remote_code}
        commands = [command_line("serve", model, options.output)]
        if options.target_format == "lora":
            merged = {"output": f"{options.output.rstrip('/')}-merged"}
            commands.append(command_line("merge", {**model, **merged}, options.output))
        print(next_steps(*commands))
    return 0
