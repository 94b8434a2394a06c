"""`mola prepare`: rows become examples, as files for later runs."""

import os
from pathlib import Path
from typing import Any

from mola.data.examples import check_ids, count_shared, distinct_questions, examples_of_rows
from mola.data.options import PrepareOptions
from mola.data.read import read_rows, source_splits
from mola.data.sampling import draw_splits, drawn_sizes, single_source
from mola.data.tasks import Task, load_task
from mola.data.write import RowMerger, is_prepared_folder, write_splits
from mola.errors import MolaError
from mola.files.atomic import check_output_folder

SAMPLE_SIZES = {"train": 640, "validation": 40, "test": 100}


def prepare(options: PrepareOptions) -> dict[str, Any]:
    """Write the examples of every split as JSON and as a saved Hugging Face dataset.

    A row keeps all its columns; `answer` becomes the answer's text, and `input`, `instruction` and
    `output` are appended. The folder appears complete or not at all.

    Returns:
        `output_dir`, `task`, `splits` (per split `rows` and `filtered`) and `shared_instructions`, the
        number of instructions that occur in more than one split. With `num_samples` also `source`: its `rows`,
        the `candidates` among them, the numbers left out by reason, and the number of `groups`. `filtered` is 0 with
        `num_samples`.

    Raises:
        MolaError: an option or a row does not fit, or the output folder is in use.
    """
    output_dir = Path(os.path.expanduser(options.output_dir)).resolve()
    check_output_folder(
        output_dir,
        option="output_dir",
        overwrite=options.overwrite_output_dir,
        overwrite_option="overwrite_output_dir",
        writer="`mola prepare`",
        is_own=is_prepared_folder,
    )
    if options.seed < 0:
        raise MolaError(f"`seed` must be at least 0: got {options.seed}.")
    _check_options_have_effect(options)
    merger = RowMerger(load_task(options.task))
    prepare_splits = _prepare_all if options.num_samples is None else _prepare_drawn
    result = prepare_splits(options, merger, output_dir)
    merger.print_replaced()
    print(f"written to {output_dir}")
    return {"output_dir": str(output_dir), "task": merger.task.name, **result}


def _check_options_have_effect(options: PrepareOptions) -> None:
    """Raise for an option that is ignored with the given task or the other options."""
    is_sample, is_drawn = options.task == "sample", options.num_samples is not None
    ignored = {
        "with the task `sample`": ("num_samples", "data") if is_sample else (),
        "without the task `sample`": () if is_sample else (*(f"{split}_size" for split in SAMPLE_SIZES), "kinds"),
        "without `num_samples`": () if is_drawn else ("num_validation", "num_test"),
        "without `num_samples` or the task `sample`": () if is_drawn or is_sample else ("seed",),
    }
    for condition, names in ignored.items():
        for name in names:
            if (value := getattr(options, name)) != getattr(PrepareOptions, name):
                raise MolaError(f"`{name}` has no effect {condition}: got {value!r}. Leave it out.")


def _prepare_all(options: PrepareOptions, merger: RowMerger, output_dir: Path) -> dict[str, Any]:
    """Write all rows of every split."""
    task = merger.task
    splits: dict[str, list[dict[str, Any]]] = {}
    counts: dict[str, dict[str, int]] = {}
    for name, rows in _source_rows(options, task).items():
        kept = [(index, row) for index, row in enumerate(rows) if task.keeps(row)]
        examples = examples_of_rows(kept, task, name, name)
        check_ids((example["id"] for example in examples), name)
        splits[name] = [merger.merge(row, example) for (_, row), example in zip(kept, examples, strict=True)]
        counts[name] = {"rows": len(kept), "filtered": len(rows) - len(kept)}
    if not any(splits.values()):
        has_rows = any(count["filtered"] for count in counts.values())
        why = "its filters left out every row" if has_rows else "there are none"
        raise MolaError(f"`data` must have rows for the task `{task.name}`: {why}.")
    write_splits(splits, output_dir)
    for name, count in counts.items():
        print(f"{name}: {count['rows']} rows, {count['filtered']} left out by the task's filters")
    shared = count_shared([distinct_questions(rows) for rows in splits.values()])
    if shared:
        print(f"warning: {shared} instructions occur in more than one split")
    return {"splits": counts, "shared_instructions": shared}


def _source_rows(options: PrepareOptions, task: Task) -> dict[str, list[dict[str, Any]]]:
    """Split -> source rows."""
    if options.task == "sample":
        from mola.data.sample import DEFAULT_KINDS, generate_splits

        given = {name: getattr(options, f"{name}_size") for name in SAMPLE_SIZES}
        return generate_splits(
            {name: SAMPLE_SIZES[name] if size is None else size for name, size in given.items()},
            seed=options.seed,
            kinds=DEFAULT_KINDS if options.kinds is None else options.kinds,
        )
    sources = source_splits(_data(options, task))
    return {name: read_rows(source.path, source.split, may_be_empty=True) for name, source in sources.items()}


def _prepare_drawn(options: PrepareOptions, merger: RowMerger, output_dir: Path) -> dict[str, Any]:
    """Write samples that are drawn from one source; a split of size 0 is not written."""
    assert options.num_samples is not None
    sizes = drawn_sizes(options.num_samples, options.num_validation, options.num_test)
    wanted = {split: size for split, size in sizes.items() if size}
    source = single_source(_data(options, merger.task))
    drawn = draw_splits(source, merger.task, wanted, options.seed, merger.merge)
    write_splits(drawn.splits, output_dir)
    print(drawn.summary())
    return {
        "splits": {split: {"rows": size, "filtered": 0} for split, size in wanted.items()},
        "shared_instructions": drawn.shared_instructions,
        "source": {
            "rows": drawn.candidates.num_rows,
            "candidates": len(drawn.candidates.row_numbers),
            **drawn.candidates.left_out,
            "groups": drawn.candidates.num_groups,
        },
    }


def _data(options: PrepareOptions, task: Task) -> str:
    data = options.data or task.dataset
    if data is None:
        raise MolaError(f"`data` is needed for the task `{task.name}`. Name a file, a folder or a Hub dataset.")
    return data


def main(options: PrepareOptions) -> int:
    """Run the command."""
    prepare(options)
    return 0
