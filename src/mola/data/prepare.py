"""Rows become examples, in memory (`load_examples`) or as files for later runs (`prepare`)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mola.data.drawn import drawn_sizes, prepare_drawn
from mola.data.output import check_output_folder
from mola.data.read import read_rows
from mola.data.source import source_splits
from mola.data.tasks import Task, example_id, load_task
from mola.data.write import columns_of, is_prepared_folder, merged_row, write_splits
from mola.errors import MolaError

logger = logging.getLogger(__name__)

_SHOWN_VALUES = 12  # in a message
SAMPLE_SIZES = {"train": 2000, "validation": 200, "test": 400}


def load_examples(
    path: str | Path,
    task: Task | None,
    split: str | None,
    limit: int | None = None,
    filters: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Examples of a data source, ready to be encoded or evaluated.

    Rows that have `instruction` and `output` are taken as they are; others go through the task.

    Args:
        path: anything that `read_rows` reads.
        task: how raw rows are turned into examples; None is enough for prepared rows.
        split: split of a source that has several; also names the rows without an id.
        limit: keep only the first rows, after all filters.
        filters: column -> value, or list of values, that a row must have; on top of the task's own filters.

    Returns:
        Dicts with `id`, `instruction`, `input`, `output`, `answer` and `num_choices` (both None if
        unknown), and the task's group columns where the row has them.

    Raises:
        MolaError: a column is missing, a value does not fit, an id occurs twice, or no row is left.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise MolaError(f"`limit` must be a positive integer: got {limit!r}. Leave it out to keep all rows.")
    rows = _filtered(list(enumerate(read_rows(path, split))), filters or {}, path)
    if all("instruction" in row and "output" in row for _, row in rows):
        examples = [_prepared(row, index, split, task) for index, row in rows[:limit]]
    else:
        examples = _from_raw(rows, path, task, split, limit)
    _check_ids((example["id"] for example in examples), str(path))
    return examples


_Rows = list[tuple[int, dict[str, Any]]]  # with their positions in the source, which ids are made of


def _filtered(rows: _Rows, filters: Mapping[str, Any], path: str | Path) -> _Rows:
    """Rows that have the wanted values; a column or a value that no row has is an error, not an empty result."""
    for column, wanted in filters.items():
        if not any(column in row for _, row in rows):
            raise MolaError(
                f"`filters` must name columns of the data: no row of `{path}` has `{column}`, its columns are "
                f"{', '.join(columns_of([row for _, row in rows]))}. Correct the name."
            )
        values = wanted if isinstance(wanted, list) else [wanted]
        kept = [(index, row) for index, row in rows if row.get(column) in values]
        if not kept:
            found = list(dict.fromkeys(repr(row.get(column)) for _, row in rows))
            more = ", ..." if len(found) > _SHOWN_VALUES else ""
            raise MolaError(
                f"`filters` must leave rows: `{column}` is {wanted!r} in none of the {len(rows)} rows left of "
                f"`{path}`, it is {', '.join(found[:_SHOWN_VALUES])}{more}. Choose one of these."
            )
        rows = kept
    return rows


def _prepared(row: Mapping[str, Any], index: int, split: str | None, task: Task | None) -> dict[str, Any]:
    """Example from a row in the instruction / input / output form."""
    row_id = example_id(row, index, split)
    text = {"instruction": row["instruction"], "input": row.get("input"), "output": row["output"]}
    for name, value in {**text, "answer": row.get("answer")}.items():
        if not isinstance(value, str) and (value is not None or name == "output"):
            raise MolaError(
                f"row `{row_id}`: `{name}` must be text: got {value!r}. Correct it, or run `mola prepare` on "
                "the raw data."
            )
    text["input"] = text["input"] or ""
    num_choices = None
    if task is not None and task.answer is not None and task.answer.choices:
        choices = row.get(task.answer.choices)
        num_choices = len(choices) if isinstance(choices, (list, tuple)) else None
    groups = task.group_values(row) if task is not None else {}
    return {"id": row_id, **text, "answer": row.get("answer"), "num_choices": num_choices, **groups}


def _from_raw(
    rows: _Rows, path: str | Path, task: Task | None, split: str | None, limit: int | None
) -> list[dict[str, Any]]:
    if task is None:
        missing = next(name for name in ("instruction", "output") if any(name not in row for _, row in rows))
        raise MolaError(
            f"`task` is needed, since `{path}` has no `{missing}` in some row: its columns are "
            f"{', '.join(columns_of([row for _, row in rows]))}. Name the task, or prepare the data with "
            "`mola prepare`."
        )
    kept = [(index, row) for index, row in rows if task.keeps(row)]
    if len(kept) < len(rows):
        dropped = len(rows) - len(kept)
        logger.info("%s: filters of the task left out %d of %d rows", path, dropped, len(rows))
    if not kept:
        raise MolaError(
            f"`data` must have rows for the task `{task.name}`: its filters left out all {len(rows)} rows of "
            f"`{path}`. Choose another source or split."
        )
    _check_columns([row for _, row in kept], task, str(path))
    return [task.example(row, index, split) for index, row in kept[:limit]]


def _check_columns(rows: list[dict[str, Any]], task: Task, source: str) -> None:
    for index, row in enumerate(rows):
        missing = task.missing_columns(row)
        if missing:
            raise MolaError(
                f"`data` must have the columns {', '.join(task.columns)} for the task `{task.name}`: row "
                f"{index} of `{source}` has no `{missing[0]}`, its columns are {', '.join(row)}. Rename or "
                "add the column, or choose another task."
            )


def _check_ids(ids: Iterable[str], source: str) -> None:
    seen: set[str] = set()
    for row_id in ids:
        if row_id in seen:
            raise MolaError(
                f"`id` must be different in every row: `{row_id}` occurs twice in `{source}`. Correct the "
                "ids, or drop the column to have ids made from the row's position."
            )
        seen.add(row_id)


@dataclass
class PrepareOptions:
    """Options of `mola prepare`."""

    task: str = field(
        metadata={"help": "A packaged task (`sample` generates its questions), or the path of your own task YAML."}
    )
    output_dir: str = field(metadata={"help": "Folder that receives <split>.json and dataset.hf."})
    data: str | None = field(
        default=None,
        metadata={
            "help": "File, `save_to_disk` folder or Hub name; or several files as "
            "train=A,validation=B,test=C. A single file becomes the split `train`. "
            "Default: the task's own Hub dataset."
        },
    )
    num_samples: int | None = field(
        default=None,
        metadata={
            "help": "Draw so many training samples at random from a single source, without replacement and without "
            "equal texts, and others for validation and test. Default: take the splits as they are."
        },
    )
    num_validation: int | None = field(
        default=None, metadata={"help": "Validation samples to draw (with `num_samples` only; default 1000)."}
    )
    num_test: int | None = field(
        default=None, metadata={"help": "Test samples to draw (with `num_samples` only; default 1000)."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the drawn samples and of the generated questions."})
    train_size: int | None = field(
        default=None, metadata={"help": "Generated training questions (task `sample` only; default 2000)."}
    )
    validation_size: int | None = field(
        default=None, metadata={"help": "Generated validation questions (task `sample` only; default 200)."}
    )
    test_size: int | None = field(
        default=None, metadata={"help": "Generated test questions (task `sample` only; default 400)."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace an output folder that an earlier `mola prepare` wrote."}
    )


def prepare(options: PrepareOptions) -> dict[str, Any]:
    """Write the examples of every split as JSON and as a saved Hugging Face dataset.

    A row keeps all its columns; `answer` becomes the answer's text, and `input`, `instruction` and
    `output` are appended. The folder appears complete or not at all.

    Returns:
        `output_dir`, `task`, `splits` (per split `rows` and `filtered`) and `shared_instructions`, the
        number of instructions that occur in more than one split. With `num_samples` also `source`: its `rows`,
        the `candidates` among them, those left out by reason, and the number of `groups`; `filtered` is 0 then.

    Raises:
        MolaError: an option or a row does not fit, or the output folder is in use.
    """
    output_dir = Path(options.output_dir).expanduser().resolve()
    check_output_folder(
        output_dir,
        option="output_dir",
        overwrite=options.overwrite_output_dir,
        overwrite_option="overwrite_output_dir",
        writer="`mola prepare`",
        is_own=is_prepared_folder,
    )
    task = load_task(options.task)
    sizes = _drawn_sizes(options)
    if sizes is not None:
        return prepare_drawn(task, _data(options, task), sizes, options.seed, output_dir)
    splits: dict[str, list[dict[str, Any]]] = {}
    counts: dict[str, dict[str, int]] = {}
    for name, rows in _source_splits(options, task).items():
        splits[name], filtered = _prepared_rows(rows, task, name)
        counts[name] = {"rows": len(splits[name]), "filtered": filtered}
    if not any(splits.values()):
        raise MolaError(f"`data` must have rows for the task `{task.name}`: its filters left out every row.")
    shared = _count_shared(splits)
    write_splits(splits, output_dir)
    for name, count in counts.items():
        print(f"{name}: {count['rows']} rows, {count['filtered']} left out by the task's filters")
    if shared:
        print(f"warning: {shared} instructions occur in more than one split")
    print(f"written to {output_dir}")
    return {
        "output_dir": str(output_dir),
        "task": task.name,
        "splits": counts,
        "shared_instructions": shared,
    }


def _drawn_sizes(options: PrepareOptions) -> dict[str, int] | None:
    """Rows to draw for every split; None to take the splits of the source."""
    given = {name: getattr(options, name) for name in ("num_samples", "num_validation", "num_test")}
    if options.num_samples is None:
        for name, value in given.items():
            if value is not None:
                raise MolaError(
                    f"`{name}` goes with `num_samples`: got {value} alone. Add `num_samples`, or leave it out."
                )
        return None
    if options.task == "sample":
        raise MolaError("`num_samples` has no use with the task `sample`, which makes its questions. Use `train_size`.")
    for name in SAMPLE_SIZES:
        _refuse_size(options, name)
    return drawn_sizes(options.num_samples, options.num_validation, options.num_test)


def main(options: PrepareOptions) -> int:
    """Run the command.

    Returns:
        0, the exit code.

    Raises:
        MolaError: as `prepare`.
    """
    prepare(options)
    return 0


def _source_splits(options: PrepareOptions, task: Task) -> dict[str, list[dict[str, Any]]]:
    """Source rows by split."""
    sizes = {name: getattr(options, f"{name}_size") for name in SAMPLE_SIZES}
    if options.task == "sample":
        if options.data is not None:
            raise MolaError(f"`data` has no use with the task `sample`: got {options.data!r}. Leave it out.")
        from mola.data.sample import generate_splits

        return generate_splits(
            {name: SAMPLE_SIZES[name] if size is None else size for name, size in sizes.items()},
            seed=options.seed,
        )
    for name in SAMPLE_SIZES:
        _refuse_size(options, name)
    return {name: read_rows(source.path, source.split) for name, source in source_splits(_data(options, task)).items()}


def _refuse_size(options: PrepareOptions, split: str) -> None:
    size = getattr(options, f"{split}_size")
    if size is not None:
        raise MolaError(f"`{split}_size` is for the task `sample` only: got {size}. Leave it out.")


def _data(options: PrepareOptions, task: Task) -> str:
    data = options.data or task.dataset
    if data is None:
        raise MolaError(f"`data` is needed for the task `{task.name}`. Name a file, a folder or a Hub dataset.")
    return data


def _prepared_rows(rows: list[dict[str, Any]], task: Task, split: str) -> tuple[list[dict[str, Any]], int]:
    """Rows with the prompt, output and answer filled in, and how many the filters left out."""
    kept = [(index, row) for index, row in enumerate(rows) if task.keeps(row)]
    _check_columns([row for _, row in kept], task, split)
    examples = [task.example(row, index, split) for index, row in kept]
    _check_ids((example["id"] for example in examples), split)
    result = []
    for (_, row), example in zip(kept, examples, strict=True):
        result.append(merged_row(row, example))
    return result, len(rows) - len(kept)


def _count_shared(splits: Mapping[str, list[dict[str, Any]]]) -> int:
    """Instructions (with their input) that occur in more than one split."""
    first: dict[tuple[Any, Any], str] = {}
    shared = set()
    for name, rows in splits.items():
        for row in rows:
            key = (row["instruction"], row["input"])
            if row["instruction"] is not None and first.setdefault(key, name) != name:
                shared.add(key)
    return len(shared)
