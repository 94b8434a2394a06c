"""`python -m benchmarks.skills_study`: skills trained apart, beside other ways to know several kinds of questions.

    python -m benchmarks.skills_study --kinds 5 --seeds 0 1 2
    python -m benchmarks.skills_study --kinds 12 --seeds 0 --methods own skills

Every seed has a record of its own, `RECORDS/KINDS_kinds/seed_SEED.json`, which is written after every method. The same
command does what is left; several processes may do different seeds at the same time. `benchmarks.skills_tables` makes
the tables. The text classifier needs scikit-learn (`pip install scikit-learn`).
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from benchmarks.errors import in_one_line
from mola.data.examples import load_examples
from mola.data.prepare import PrepareOptions, prepare
from mola.data.tasks import load_task
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json
from mola.files.digests import file_sha256
from mola.files.environment import machine_description, software_versions
from mola.files.reading import read_json
from mola.options.fields import find_difference, option
from mola.options.parsing import parse
from mola.studies.continual_learning.stages import ContinualOptions

_PROJECT = Path(__file__).resolve().parents[1]
FORMAT = 1
# The same data as in the studies of forgetting (5 kinds) and of harder questions (12 kinds).
DATA = {
    5: {"train_size": 400, "validation_size": 150, "test_size": 200},
    12: {"train_size": 960, "validation_size": 240, "test_size": 480, "seed": 1, "kinds": 12},
}
# Twelve kinds are answered in words. A kind has too few rows to learn alone which letter stands for which option.
TASKS = {5: "sample", 12: str(Path(__file__).with_name("twelve_kinds.yaml"))}
# The settings of the study of forgetting, which trains and tests in float32.
PROTOCOL: dict[str, Any] = {
    "template": "alpaca_short",
    "dtype": "float32",
    "attn_implementation": "eager",
    "cutoff_len": 256,
    "lora_dropout": 0.0,
    "adam_beta2": 0.99,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
}
QUIET: dict[str, Any] = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "expert_telemetry": False,
    "disable_tqdm": True,
}
TESTS: dict[str, Any] = {"scoring": "likelihood", "test_batch_size": 40}
# A skill: a LoRA on the upper two thirds of the layers, 5 passes over 80 rows.
SKILL: dict[str, Any] = {"r": "8", "lora_alpha": 16.0, "learning_rate": 0.003, "max_steps": 100, "layer": 10}
# What learns one kind after the other, 3 passes each, and all kinds at once in as many steps.
SEQUENTIAL: dict[str, dict[str, Any]] = {
    "lora": {"num_experts": "1", "r": "43", "lora_alpha": 86.0, "learning_rate": 0.001, "num_train_epochs": 3.0},
    "2468": {"num_experts": "2468", "learning_rate": 0.001, "num_train_epochs": 3.0},
}
REPLAY_SHARE = 0.05


@dataclass
class StudyOptions:
    """Options of the study."""

    kinds: int = option(5, f"Kinds of questions: {' or '.join(map(str, DATA))}.")
    seeds: list[int] = field(default_factory=lambda: [*range(10)], metadata={"help": "Seeds."})
    methods: list[str] = field(default_factory=lambda: ["all"], metadata={"help": "What to measure; see METHODS."})
    base_model: str = option(str(_PROJECT / ".cache" / "SmolLM2-135M-Instruct"), "Base model.")
    output_dir: str = option("runs/skills", "Where data and adapters are kept.", "output")
    records: str = option(str(_PROJECT / "studies" / "skills"), "Folder of the records.")
    minutes: float | None = option(None, "Begin no method after this time.")


class Study:
    """One seed: its questions, folders and record."""

    def __init__(self, options: StudyOptions, seed: int) -> None:
        self.options, self.seed = options, seed
        self.data = prepared(options)
        self.folder = Path(options.output_dir) / f"{options.kinds}_kinds" / f"seed_{seed}"
        self.path = Path(options.records) / f"{options.kinds}_kinds" / f"seed_{seed}.json"
        self.task = load_task(TASKS[options.kinds])
        self.categories = categories(self.data)
        self.order = order_of(list(self.categories), seed)
        self.record = self._read()

    def examples(self, kind: str, split: str) -> list[dict[str, Any]]:
        """The examples of one kind, in the order of the file."""
        return load_examples(self.data / "dataset.hf", self.task, split, filters={"category": self.categories[kind]})

    def rows(self, kind: str, split: str) -> list[dict[str, Any]]:
        """The rows of one kind with all their columns, in the order of the file."""
        every = read_json(self.data / f"{split}.json")
        return [row for row in every if row["category"] == self.categories[kind]]

    def skill(self, kind: str) -> Path:
        """The folder of a trained LoRA."""
        return self.folder / "skills" / f"{1 + self.order.index(kind):02d}-{kind}"

    def training(self) -> dict[str, Any]:
        """The options that all trainings of the study have."""
        values = {"base_model": self.options.base_model, "data": str(self.data / "dataset.hf")}
        values |= {"task": TASKS[self.options.kinds], "seed": self.seed, "data_seed": self.seed}
        return {**values, **PROTOCOL, **QUIET}

    def keep(self, method: str, found: dict[str, Any]) -> None:
        """Add what a method measured to the record."""
        self.record["methods"][method] = {**found, "machine": machine_description(), "versions": software_versions()}
        atomic_write_json(self.path, self.record)

    def _read(self) -> dict[str, Any]:
        protocol = {"task": self.task.name, **PROTOCOL}
        settings = {"protocol": protocol, "skill": SKILL, "sequential": SEQUENTIAL, "replay_share": REPLAY_SHARE}
        base = Path(self.options.base_model) / "model.safetensors"
        files = {f"{split} data": self.data / f"{split}.json" for split in ("train", "validation", "test")}
        new = {
            "format": FORMAT,
            "kinds": self.options.kinds,
            "seed": self.seed,
            "order": self.order,
            "settings": json.loads(json.dumps(settings)),
            "fingerprints": {name: file_sha256(path) for name, path in {**files, base.name: base}.items()},
            "methods": {},
        }
        if not self.path.exists():
            return new
        found: dict[str, Any] = read_json(self.path)
        if (name := find_difference(_compared(found), _compared(new))) is not None:
            raise MolaError(f"{str(self.path)!r} was made with a different `{name}`. Move it away, or restore that.")
        return found


def _compared(record: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for a record to be continued."""
    return {"format": record["format"], "order": record["order"], **record["settings"], **record["fingerprints"]}


def prepared(options: StudyOptions) -> Path:
    """The folder with the questions, which is made first."""
    if options.kinds not in DATA:
        raise MolaError(f"`kinds` must be one of {', '.join(map(str, DATA))}: got {options.kinds}.")
    folder = Path(options.output_dir) / f"{options.kinds}_kinds" / "data"
    if not folder.exists():
        prepare(PrepareOptions("sample", str(folder), **DATA[options.kinds]))
        if options.kinds == 12:
            _answer_in_words(folder)
    return folder


def _answer_in_words(folder: Path) -> None:
    """Replace the rows by rows without options, whose `label` is category and letter."""
    splits = {}
    for path in sorted(folder.glob("*.json")):
        splits[path.stem] = [
            {
                **{name: row[name] for name in ("id", "question", "category")},
                "label": f"{row['category']} {row['answer']}",
            }
            for row in read_json(path)
        ]
        atomic_write_json(path, splits[path.stem])
    shutil.rmtree(folder / "dataset.hf")
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(folder / "dataset.hf")


def categories(data: Path) -> dict[str, str]:
    """Name of each kind, which a folder can have, -> its `category`."""
    every = dict.fromkeys(row["category"] for row in read_json(data / "train.json"))
    return {each.split()[0].lower(): each for each in sorted(every)}


def order_of(kinds: Sequence[str], seed: int) -> list[str]:
    """The order of a seed's kinds; of five kinds that of the study of forgetting."""
    if len(kinds) > 5:
        return random.Random(seed).sample(sorted(kinds), len(kinds))
    written = ["measurement", "senses", "climate", "tense", "sentence"]  # the order in which that study permuted them
    every = [list(order) for order in itertools.permutations(written)]
    random.Random(0).shuffle(every)
    return every[1 + seed]


def sequence(study: Study, folder: str, settings: dict[str, Any], **more: Any) -> ContinualOptions:
    """One kind after the other, in the order of the seed."""
    stages = {name: {"filters": {"category": study.categories[name]}} for name in study.order}
    values = {**study.training(), "stages": stages, **TESTS, **settings, **more}
    return ContinualOptions(**values, output_dir=str(study.folder / folder))


@in_one_line("skills_study")
def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is left; 0, or 2 for wrong input."""
    from benchmarks.skills_methods import METHODS

    words = sys.argv[1:] if arguments is None else arguments
    options = parse(StudyOptions, words, prog="benchmarks.skills_study", summary=__doc__.partition("\n")[0])
    wanted = [name for name in METHODS if name in options.methods or options.methods == ["all"]]
    if unknown := set(options.methods) - {"all", *METHODS}:
        raise MolaError(f"`methods` must be some of {', '.join(METHODS)}: got {', '.join(sorted(unknown))}.")
    start = time.perf_counter()
    for seed in options.seeds:
        study = Study(options, seed)
        for name in wanted:
            if name in study.record["methods"]:
                continue
            if options.minutes is not None and time.perf_counter() - start > 60 * options.minutes:
                return 0
            begin = time.perf_counter()
            study.keep(name, {**METHODS[name](study), "seconds": round(time.perf_counter() - begin, 1)})
            print(f"seed {seed}, {name}: {study.record['methods'][name]['seconds']} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
