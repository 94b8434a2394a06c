"""The commands `mola skills add`, `remove`, `test`, `merge` and `suggest`.

mola skills add my-skills birds=runs/birds rivers=runs/rivers
mola skills add my-skills tools=lora_from_elsewhere --data tools.json
mola skills test my-skills --data birds=birds_test.json rivers=rivers_test.json base=other_questions.json
mola skills remove my-skills birds
mola skills merge my-skills skills_of_a_colleague
mola skills suggest my-model --data birds=birds.json rivers=rivers.json
"""

from __future__ import annotations

import textwrap

from rich.markup import escape
from rich.table import Table

from mola.checkpoints.skills_folder import BASE, SkillsFolder
from mola.files.terminal import make_table_console
from mola.options.command_line import next_steps
from mola.skills import changing
from mola.skills.adding import add, commands_of_folder
from mola.skills.options import AddOptions, MergeOptions, RemoveOptions, SuggestOptions, TestOptions
from mola.skills.suggesting import ERRORS, suggest
from mola.skills.summary import describe, summarize, summary_table
from mola.skills.testing import TestResult, test

_SHOWN_MISSES = 3


def add_skills(options: AddOptions) -> int:
    """Add the skills, and print what the folder holds; returns 0, the exit code."""
    result = add(options)
    _print_change(result.folder, result.moved)
    for name, count in result.too_long.items():
        print(f"warning: {count} prompts of {name} are longer than the model's positions, and were left out.")
    print(next_steps(*commands_of_folder(options.folder)))
    return 0


def remove_skills(options: RemoveOptions) -> int:
    """Remove the skills, and print what the folder holds; returns 0, the exit code."""
    _print_change(*changing.remove(options))
    return 0


def merge_skills(options: MergeOptions) -> int:
    """Merge the folders, and print what the first one holds; returns 0, the exit code."""
    _print_change(*changing.merge(options))
    return 0


def test_skills(options: TestOptions) -> int:
    """Run the command and print the table; returns 0, the exit code."""
    result = test(options)
    make_table_console().print(_asked_table(result))
    print(f"{result.right:.1%} right; {result.to_base:.1%} of the skills' own prompts go to the base model.")
    if result.misses:
        print(f"{len(result.misses)} prompts do not ask whom they should (threshold {result.threshold:.3f}):")
    for name, miss in result.misses[:_SHOWN_MISSES]:
        text = textwrap.shorten(miss.prompt, 70, placeholder=" ...")
        print(f"  {name} asks {miss.asked}, margin {miss.margin:.3f}: {text}")
    if len(result.misses) > _SHOWN_MISSES:
        print("  ..." if options.misses else "  ... --misses FILE writes all.")
    for (name, asked), share in result.mixed_up.items():
        print(f"warning: {share:.1%} of the prompts of {name} ask {asked}. `mola skills suggest` compares layers.")
    for name, count in result.too_long.items():
        print(f"warning: {count} prompts of {name} are longer than the model's positions, and were left out.")
    for path in filter(None, (options.output, options.misses)):
        print(f"Written to {path}.")
    return 0


def suggest_layer(options: SuggestOptions) -> int:
    """Run the command, print the layers and the suggestion; returns 0, the exit code."""
    result = suggest(options)
    table = Table()
    for column in ("layer", "right", "less default", "std. error", "to the base model", "threshold"):
        table.add_column(column, justify="right")
    for each in result.layers:
        values = f"{each.right:.1%}", f"{each.gain:+.1%}", f"{each.standard_error:.1%}", f"{each.to_base:.1%}"
        table.add_row(
            str(each.layer), *values, f"{each.threshold:.3f}", style="bold" if each.layer == result.layer else None
        )
    make_table_console().print(table)
    print(f"{sum(result.prompts.values())} held-out prompts of {len(result.prompts)} skills.")
    noise = f"than layer {result.default_layer}, the default, by more than {ERRORS} standard errors"
    why = f"no layer is better {noise}" if result.layer == result.default_layer else f"it is better {noise}"
    print(f"Suggested: --layer {result.layer}; {why}. Not measured: what LoRAs on fewer layers can learn.")
    if options.output is not None:
        print(f"Written to {options.output}.")
    return 0


def _print_change(folder: SkillsFolder, moved: list[str]) -> None:
    """Print a folder that has changed, and which decisions on prompts of earlier skills have moved."""
    make_table_console().print(summary_table(summarize(folder)))
    print(describe(folder))
    if moved:
        print("\n".join(["Decisions that have moved:", *(f"  {line}" for line in moved)]))


def _asked_table(result: TestResult) -> Table:
    found = sorted({*result.asked, *(name for counts in result.asked.values() for name in counts)} - {BASE})
    table = Table()
    table.add_column("prompts of")
    for name in (*(f"ask {each}" for each in (*found, BASE)), "right"):
        table.add_column(escape(name), justify="right")
    for name, counts in result.asked.items():
        right = counts.get(name, 0) / sum(counts.values())
        table.add_row(escape(name), *(str(counts.get(each, 0)) for each in (*found, BASE)), f"{right:.1%}")
    return table
