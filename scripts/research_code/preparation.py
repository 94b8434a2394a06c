"""Runs the research code's preparation scripts: ScienceQA without images, and instruction data as plain text."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mola.data.examples import count_shared, hash_instruction
from mola.data.read import Source, source_splits
from mola.data.sampling import HELD_OUT_SIZE, draw_splits, drawn_sizes, single_source
from mola.data.tasks import Task, load_task
from mola.data.write import PROMPT_COLUMNS, merged_row, save_dataset, schema_of, write_json
from mola.errors import MolaError
from mola.files.atomic import check_output_folder, write_folder
from mola.options.fields import option

SPLITS = ("train", "validation", "test")
SCIENCEQA_FOLDER = "science_qa.hf"
SCIENCEQA_COLUMNS = (
    "image",
    "question",
    "choices",
    "answer",
    "hint",
    "task",
    "grade",
    "subject",
    "topic",
    "category",
    "skill",
    "lecture",
    "solution",
)
_REQUIRED_COLUMNS = ("question", "choices", "answer")  # other columns may be missing and become null


@dataclass
class ScienceQAOptions:
    """Options of `preparation_scienceqa_data.py`."""

    dataset: str = option(
        "derek-thomas/ScienceQA",
        "Hub name, folder written by `save_to_disk`, or files as train=A,validation=B,test=C.",
    )
    save_path: str = option("./scienceqa", "Folder that receives science_qa.hf and scienceq_<split>.json.")
    overwrite: bool = option(False, "Replace a folder that this script wrote.")


@dataclass
class InstructionOptions:
    """Options of `preparation_instruction_data.py`."""

    dataset: str = option("Open-Orca/OpenOrca", "Hub name, folder written by `save_to_disk`, or file.")
    num_samples: int = option(50000, "Training samples to draw.")
    save_path: str = option("./meta_moe_50k.hf", "Folder that becomes the saved dataset.")
    num_validation: int = option(HELD_OUT_SIZE, "Validation samples to draw.")
    num_test: int = option(HELD_OUT_SIZE, "Test samples to draw.")
    seed: int = option(10, "Seed of the draw.")
    overwrite: bool = option(False, "Replace a folder that this script wrote.")


def main(options: ScienceQAOptions | InstructionOptions) -> int:
    """Run the script that the options belong to."""
    import datasets

    if isinstance(options, ScienceQAOptions):
        print(datasets.load_from_disk(str(prepare_scienceqa(options) / SCIENCEQA_FOLDER)))
    else:
        print(datasets.load_from_disk(str(prepare_instruction(options))))
    return 0


def prepare_scienceqa(options: ScienceQAOptions) -> Path:
    """Write the questions without an image, as prompts of the form CQM-A, to the folder `save_path`.

    Raises:
        MolaError: a split is missing, a row is no question, no row is left, or the folder is in use.
    """
    save_path = _check_save_path(options, _is_scienceqa_folder)
    sources = source_splits(options.dataset)
    missing = [split for split in SPLITS if split not in sources]
    if missing:
        raise MolaError(
            f"`dataset` must have the splits {', '.join(SPLITS)}: `{options.dataset}` has no {', no '.join(missing)}, "
            f"only {', '.join(sources)}. Pass three files as train=A,validation=B,test=C, or a different dataset."
        )
    task = load_task("scienceqa")
    splits = {}
    for split in reversed(SPLITS):
        rows = list(_without_image(sources[split], task, split))
        splits[split] = [row for row in rows if row is not None]
        print(f"{split}: {len(splits[split])} rows, {len(rows) - len(splits[split])} with an image left out")
        if not splits[split]:
            print(f"warning: {split} is empty")
    if not any(splits.values()):
        raise MolaError(
            f"`dataset` must have rows without an image: `{options.dataset}` has none. Choose a different dataset."
        )
    shared = count_shared([np.array([*map(hash_instruction, rows)], dtype=np.uint64) for rows in splits.values()])
    if shared:
        print(f"warning: {shared} instructions occur in more than one split")
    for split in sources.keys() - set(SPLITS):
        print(f"warning: the split {split} is not used")
    schema = schema_of(splits, first=SCIENCEQA_COLUMNS, last=PROMPT_COLUMNS, empty_types=_scienceqa_types())
    with write_folder(save_path, "save_path") as folder:
        for split, rows in splits.items():
            write_json(rows, schema.names, folder / f"scienceq_{split}.json")
        save_dataset({split: splits[split] for split in SPLITS}, schema, folder / SCIENCEQA_FOLDER)
    print(f"written to {save_path}")
    return save_path


def _without_image(source: Source, task: Task, split: str) -> Iterator[dict[str, Any] | None]:
    """Yield prepared rows, and None for each row with an image."""
    optional = dict.fromkeys(name for name in SCIENCEQA_COLUMNS if name not in _REQUIRED_COLUMNS)
    for index, row in enumerate(source.rows()):
        if task.keeps(row):
            full = {**optional, **row}
            yield merged_row(full, task.example(full, index, split))
        else:
            yield None


def _scienceqa_types() -> dict[str, Any]:
    """Types of columns that have only nulls. The column `image` has no type, since it is always null."""
    import pyarrow

    types = dict.fromkeys((*SCIENCEQA_COLUMNS[1:], *PROMPT_COLUMNS), pyarrow.string())
    return types | {"choices": pyarrow.list_(pyarrow.string())}


def prepare_instruction(options: InstructionOptions) -> Path:
    """Draw samples of instruction data and save them in the folder `save_path` as plain text, in `output`.

    Raises:
        MolaError: the source has too few rows or lacks a column, or the folder is in use.
    """
    import pyarrow

    save_path = _check_save_path(options, _is_instruction_folder)
    sizes = drawn_sizes(options.num_samples, options.num_validation, options.num_test)
    source = single_source(options.dataset, may_take_all=False)
    drawn = draw_splits(source, load_task("openorca"), sizes, options.seed, _text_only, columns=(), unique_ids=False)
    schema = schema_of(drawn.splits, first=PROMPT_COLUMNS, empty_types={"output": pyarrow.string()})
    with write_folder(save_path, "save_path") as folder:
        save_dataset(drawn.splits, schema, folder)
    print(drawn.summary())
    print(f"written to {save_path}")
    return save_path


def _text_only(row: Mapping[str, Any], example: Mapping[str, Any]) -> dict[str, Any]:
    return {"input": None, "instruction": None, "output": example["output"]}


def _check_save_path(options: ScienceQAOptions | InstructionOptions, is_own: Any) -> Path:
    folder = Path(os.path.expanduser(options.save_path)).resolve()
    check_output_folder(
        folder,
        option="save_path",
        overwrite=options.overwrite,
        overwrite_option="--overwrite",
        writer="this script",
        is_own=is_own,
    )
    return folder


def _is_scienceqa_folder(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()}
    return SCIENCEQA_FOLDER in names and names <= {SCIENCEQA_FOLDER, *(f"scienceq_{split}.json" for split in SPLITS)}


def _is_instruction_folder(folder: Path) -> bool:
    if {entry.name for entry in folder.iterdir()} != {"dataset_dict.json", *SPLITS}:
        return False
    try:
        infos = [json.loads((folder / split / "dataset_info.json").read_text("utf-8")) for split in SPLITS]
        return all(set(info["features"]) == set(PROMPT_COLUMNS) for info in infos)
    except (OSError, ValueError, KeyError, TypeError):
        return False
