"""Draws test rows from data that have none of their own, so that no question is both trained on and tested.

The rows are written as they are into `train.jsonl` and `test.jsonl` in the folder `data` of the task, and into
`validation.jsonl` for a search. The same data, size and seed give the same files.
"""

import json
import logging
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mola.data.examples import hash_example, hash_instruction, load_examples
from mola.data.read import read_rows, split_names
from mola.data.tasks import example_id, load_task
from mola.errors import MolaError
from mola.files.atomic import atomic_write_text
from mola.studies.comparison.options import CompareOptions
from mola.studies.train_and_test import TrainAndTestOptions

logger = logging.getLogger(__name__)

_SHARE, _FEWEST, _MOST = 0.2, 24, 500  # of the distinct questions; the last two are numbers of rows
_OF_THE_DATA = ("data", "train_split", "test_data", "test_split", "task", "filters")
Rows = Sequence[Mapping[str, Any]]


def draw_test_rows(options: CompareOptions) -> None:
    """Draw test rows for each task whose data have none, write them, and let its runs use them.

    Raises:
        MolaError: the data have too few rows, or the files in `output_dir` hold other rows.
    """
    has_drawn = False
    for task in options.tasks or {}:
        runs = [run for key, run in options.runs.items() if key.task == task]
        if len({_source(run) for run in runs}) == 1 and _lacks_test_rows(runs[0]):
            _draw(options, task, runs[0])
            has_drawn = True
    if options.test_size is not None and not has_drawn:
        raise MolaError(
            f"`test_size` ({options.test_size:g}) has no effect: the data have test rows of their own. Leave it out."
        )


def rows_missing_for_a_search(options: CompareOptions) -> list[str]:
    """A sentence if rows were drawn for the test, and too few are left to draw others for a search."""
    needed = 3 * _FEWEST
    for key, run in options.runs.items():
        drawn = [Path(options.output_dir or "") / key.task / "data" / f"{name}.jsonl" for name in ("train", "test")]
        if run.data == str(drawn[0]) and options.test_size is None:
            have = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in drawn if path.is_file())
            if 0 < have < needed:
                return [f"A search needs at least {needed} rows with different questions: add {needed - have} rows."]
    return []


def _lacks_test_rows(run: TrainAndTestOptions) -> bool:
    if run.data is None or run.test_data is not None or run.test_split != TrainAndTestOptions.test_split:
        return False
    return run.test_split not in split_names(run.data)


def _source(run: TrainAndTestOptions) -> str:
    """What must be the same in all runs of a task, so that they can share test rows."""
    return json.dumps([getattr(run, name) for name in _OF_THE_DATA], sort_keys=True, default=str)


def _draw(options: CompareOptions, task: str, run: TrainAndTestOptions) -> None:
    data, folder = str(run.data), Path(options.output_dir or "") / task / "data"
    splits = split_names(data)
    tuning: dict[str, Any] = {}
    if options.candidates and options.tuning_split in splits:
        tuning = {"test_data": data, "test_split": options.tuning_split}
    elif options.candidates:
        tuning = {"test_data": str(folder / "validation.jsonl")}
    questions = _rows_by_question(run)
    names = ["test", "validation"] if options.candidates and options.tuning_split not in splits else ["test"]
    parts = _parts(questions, names, options.test_size, options.split_seed)
    for name, rows in parts.items():
        _write(folder / f"{name}.jsonl", rows)
    left_out = sum(map(len, questions)) - sum(map(len, parts.values()))
    logger.info(
        "%s: %s drawn with `split_seed` %d, without equal questions in two parts%s. They are in %s.",
        data,
        ", ".join(f"{len(rows)} {name} rows" for name, rows in parts.items()),
        options.split_seed,
        f"; {left_out} repeated rows are left out" if left_out else "",
        folder,
    )
    changes = {"data": str(folder / "train.jsonl"), "train_split": "train", "test_data": str(folder / "test.jsonl")}
    if run.eval_data is None and not run.validation_size and run.eval_split in splits:
        changes["eval_data"] = data
    options.use_data(task, changes, tuning)


def _rows_by_question(run: TrainAndTestOptions) -> list[list[Mapping[str, Any]]]:
    """The rows of the training split that the filters keep; those that ask the same stand together."""
    data, split, filters = str(run.data), run.train_split, run.filters
    assert not isinstance(filters, str)  # TrainOptions has parsed it
    rows = {example_id(row, index, split): row for index, row in enumerate(read_rows(data, split))}
    examples = load_examples(data, load_task(run.task) if run.task else None, split, filters=filters)
    found: dict[int, list[Mapping[str, Any]]] = {}
    for example in examples:
        found.setdefault(hash_instruction(example) or hash_example(example), []).append(rows[example["id"]])
    return list(found.values())


def _parts(
    questions: list[list[Mapping[str, Any]]], drawn: Sequence[str], size: float | None, seed: int
) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of `train` and of each drawn part, in the order of the data.

    A drawn part has one row for each of its questions. The other rows of these questions are in no part.
    """
    total = len(questions)
    count = _number(total, size)
    if count < _FEWEST or total - count * len(drawn) < _FEWEST:
        asked = "" if size is None else f" with `test_size` {size:g}"
        raise MolaError(
            f"`data` must have at least {_FEWEST * (1 + len(drawn))} rows with different questions: {_FEWEST} to train "
            f"on, and {_FEWEST} for {' and '.join(drawn)}. Got {total}{asked}, of which {count} would be drawn. Add "
            "rows, or name test rows of your own with `test_data`."
        )
    places = list(range(total))
    random.Random(seed).shuffle(places)
    parts = {"train": [row for place in sorted(places[count * len(drawn) :]) for row in questions[place]]}
    for number, name in enumerate(drawn):
        parts[name] = [questions[place][0] for place in sorted(places[number * count : (number + 1) * count])]
    return parts


def _number(total: int, size: float | None) -> int:
    """Number of questions in each drawn part."""
    if size is None:
        return min(_MOST, max(_FEWEST, round(_SHARE * total)))
    return math.ceil(size * total) if size < 1 else int(size)


def _write(path: Path, rows: Rows) -> None:
    # Columns that JSON cannot hold, such as dates, are in no prompt: `load_examples` has read the rows.
    text = "".join(json.dumps(row, default=str) + "\n" for row in rows)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise MolaError(
            f"{str(path)!r} was drawn from different data, or with a different `test_size` or `split_seed`. Use the "
            "same again, or pass a different `output_dir`."
        )
    if not path.exists():
        atomic_write_text(path, text)
