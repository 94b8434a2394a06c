"""`python -m studies.forgetting`: how much of earlier kinds of questions do LoRA and mixtures of experts forget?

- A sequence learns the five kinds of generated questions one after the other, as `mola continual` does. There is one
  for every recipe and seed, which has an order of the kinds of its own. Learning rates may be searched for before:
  with other seeds, in an order of its own, on validation questions.
- Every finished sequence is in the record with the answer to every question, right or wrong, and its folder is deleted.
- The same command does what is left, shares it with other processes of the same command, and prints the tables.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from studies.forgetting_options import CONTRASTS, KINDS, QUIET, RECIPES, TRAINING, ForgettingOptions, check, order_of
from studies.forgetting_tables import chosen_rate, is_finished, tables

from mola.data.prepare import PrepareOptions, prepare
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json, check_writable
from mola.files.digests import file_sha256
from mola.files.environment import machine_description, software_versions
from mola.files.locks import POLL_SECONDS, held
from mola.files.marked_pages import write_part
from mola.files.reading import read_json
from mola.options.fields import mapping, named_mappings
from mola.options.parsing import convert, parse
from mola.studies.comparison.curve import marks_of
from mola.studies.comparison.options import pairs_of
from mola.studies.continual_learning.continual import ContinualOptions, continual
from mola.studies.continual_learning.record import EVALUATION_FOLDER
from mola.studies.train_and_test import TrainAndTestOptions, signals_as_interrupt, stop_if_asked
from mola.training.checkpoints import RUN_FILE

FORMAT = 2
_MAY_GROW = ("recipes", "seeds")


class Key(NamedTuple):
    """Names a sequence."""

    recipe: str
    seed: int
    rate: float | None  # of the search; None: the one that it chose

    def __str__(self) -> str:
        return f"{self.recipe}, seed {self.seed}{f', rate {self.rate:g}' if self.rate else ''}"


class Study:
    """What is done, and doing the rest."""

    def __init__(self, options: ForgettingOptions) -> None:
        self.options, self.folder, self.path = options, Path(options.output_dir), check_writable(options.record)
        self.locks = self.folder / ".locks"
        self.recipes = named_mappings("recipes", options.recipes or RECIPES, '{"lora": {"num_experts": 1}}')
        check(options, self.recipes)
        contrasts = (
            CONTRASTS if options.contrasts is options.recipes is None else mapping("contrasts", options.contrasts)
        )
        for recipe, rate in dict.fromkeys((key.recipe, key.rate) for key in self._keys()):
            self._options(Key(recipe, 0, rate), rate or options.learning_rate)  # before anything is trained
        training = {**TRAINING, "learning_rate": options.learning_rate, "num_train_epochs": options.num_train_epochs}
        names = ("reference", "seeds", "rates", "tuning_seeds", "train_size", "validation_size", "test_size")
        self.settings = {"recipes": self.recipes, "training": training}
        self.settings |= {name: getattr(options, name) for name in names}
        self.settings["contrasts"] = pairs_of(contrasts, self.recipes)
        self.record: dict[str, Any] = {}
        self.read()

    def read(self) -> None:
        """Take in what is in the record, which other processes write too."""
        self.record = {"format": FORMAT, "settings": self.settings, "fingerprints": None, "runs": []}
        if self.path.exists():
            try:
                found = read_json(self.path)
                if found["format"] != FORMAT:
                    raise ValueError(f"its `format` is {found['format']!r}, not {FORMAT}")
                self.record |= {"fingerprints": found["fingerprints"], "runs": found["runs"]}
                old, done = found["settings"], [_key(run) for run in found["runs"]]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise MolaError(
                    f"`record` must be a new file or the record of this study: {str(self.path)!r} cannot be read "
                    f"({error}). Pass another name."
                ) from error
            if done:
                _check_same(old, json.loads(json.dumps(self.settings)), self.path)

    def left(self) -> list[Key]:
        """Sequences without a result, those of the search first."""
        done = {_key(run) for run in self.record["runs"]}
        return [key for key in self._keys() if key not in done]

    def work(self) -> None:
        """Do what nobody has done or is doing, wait for the others, do what they leave.

        Raises:
            KeyboardInterrupt: a signal stopped it.
        """
        count, most = 0, self.options.at_most
        while (left := self.left()) and (most is None or count < most):
            for key in left:
                stop_if_asked()
                with held(self.locks / "-".join(map(str, key)), waits=False) as is_mine:
                    self.read()
                    if not is_mine or key not in self.left() or (rate := self.rate(key)) is None:
                        continue
                    print(f"{len(self.left())} sequences left. Next: {key}", flush=True)
                    self._one(key, rate)
                    count += 1
                break  # what is left may be another list now
            else:
                time.sleep(POLL_SECONDS)
                self.read()

    def rate(self, key: Key) -> float | None:
        """The learning rate of a sequence; None as long as the search for it is not finished."""
        own = self.recipes[key.recipe].get("learning_rate")
        if own is not None or not self.options.rates:
            return self.options.learning_rate if own is None else own
        return chosen_rate(self.record, key.recipe) if key.rate is None else key.rate

    def _keys(self) -> list[Key]:
        """Seed after seed, so that a study that is stopped has whole ones."""
        searched = [name for name, values in self.recipes.items() if values.get("learning_rate") is None]
        search = itertools.product(self.options.tuning_seeds, self.options.rates, searched)
        keys = [Key(recipe, seed, rate) for seed, rate, recipe in search]
        return keys + [Key(recipe, seed, None) for seed, recipe in itertools.product(self.options.seeds, self.recipes)]

    def _options(self, key: Key, rate: float) -> ContinualOptions:
        values = {**TRAINING, **QUIET, "num_train_epochs": self.options.num_train_epochs, "learning_rate": rate}
        values |= convert(TrainAndTestOptions, self.recipes[key.recipe], f"recipes.{key.recipe}")
        split = "test" if key.rate is None else "validation"
        values |= {"test_split": split, "seed": key.seed, "data_seed": key.seed}
        stages = {name: {"filters": {"category": KINDS[name]}} for name in order_of(_seed_of_order(key))}
        values |= {"base_model": self.options.base_model, "task": "sample", "data": str(self._data() / "dataset.hf")}
        folder = self.folder / "-".join(map(str, key[: 2 if key.rate is None else 3]))
        return ContinualOptions(**values, stages=stages, output_dir=str(folder))

    def _one(self, key: Key, rate: float) -> None:
        """A sequence, into the record; a signal raises KeyboardInterrupt."""
        fingerprints = self._fingerprints()
        options = self._options(key, rate)
        result, folder = continual(options), Path(options.output_dir or "")
        if result.status != "finished":
            raise KeyboardInterrupt
        stages = [Path(stage.output_dir or "") for stage in options.stage_options.values()]
        trained = [read_json(stage / RUN_FILE) for stage in stages]
        tests = [[read_json(path) for path in sorted((stage / EVALUATION_FOLDER).glob("*.json"))] for stage in stages]
        run = {"recipe": key.recipe, "seed": key.seed, "learning_rate": rate, "is_search": key.rate is not None}
        run["order"] = order_of(_seed_of_order(key))
        run |= {"trained": trained[0]["trainable_parameters"], "steps": [each["steps"] for each in trained]}
        run["matrix"] = [[task["accuracy"] for task in row["tasks"].values()] for row in result.results]
        run["marks"] = [[marks_of(test["samples"]) for test in row] for row in tests]
        run |= {"op": result.results[-1]["overall_performance"], "pd": result.results[-1]["performance_drop"]}
        run["seconds_training"] = round(sum(each["seconds"] for each in trained), 1)
        run["seconds_testing"] = round(sum(test["seconds"] for row in tests for test in row), 1)
        run |= {"versions": software_versions(), "machine": machine_description()}
        with held(self.locks / "record", waits=True):
            self.read()
            self._check_same(fingerprints)  # another process may have been the first
            self.record["fingerprints"] = fingerprints
            self.record["runs"].append(run)
            atomic_write_json(self.path, self.record, indent=None)
        shutil.rmtree(folder)

    def _fingerprints(self) -> dict[str, str]:
        """Of base model and data, which are made first; refused if those in the record were others."""
        folder, options = self._data(), self.options
        with held(self.locks / "data", waits=True):
            if not folder.exists():
                sizes = {f"{split}_size": len(KINDS) * size for split, size in _sizes(options).items()}
                prepare(PrepareOptions("sample", str(folder), **sizes))
        files = {f"{split} data": folder / f"{split}.json" for split in _sizes(options)}
        files |= {path.name: path for path in sorted(Path(options.base_model).glob("*.safetensors"))}
        if len(files) == 3:
            raise MolaError(f"`base_model` must be a folder with *.safetensors: {options.base_model!r} has none.")
        found = {name: file_sha256(path) for name, path in files.items()}
        self._check_same(found)
        return found

    def _check_same(self, found: dict[str, str]) -> None:
        if self.record["fingerprints"] not in (None, found):
            raise MolaError(
                f"base model or data are others than those of {str(self.path)!r}: {self.record['fingerprints']}, now "
                f"{found}. Use the same, or pass another `record`."
            )

    def _data(self) -> Path:
        return self.folder / "-".join(["data", *map(str, _sizes(self.options).values())])


def _sizes(options: ForgettingOptions) -> dict[str, int]:
    return {split: getattr(options, f"{split}_size") for split in ("train", "validation", "test")}


def _key(run: Mapping[str, Any]) -> Key:
    return Key(run["recipe"], run["seed"], run["learning_rate"] if run["is_search"] else None)


def _seed_of_order(key: Key) -> int | None:
    return key.seed if key.rate is None else None


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    """Refuse settings that others than those of the record were made with; the message names what differs."""
    for name in sorted({*old, *new}):
        before, now = old.get(name), new.get(name)
        if name == "recipes":
            same = all(now.get(recipe) == values for recipe, values in before.items())
        else:
            same = all(each in now for each in before) if name in _MAY_GROW else before == now
        if not same:
            more = ", or these and more" if name in _MAY_GROW else ""
            raise MolaError(
                f"`{name}` must be as in {str(path)!r}, {before!r}{more}: got {now!r}. Use the same, or pass another "
                "`record` and `output_dir`."
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is left; returns the exit code: 0, 2 for wrong input, 130 after an interruption."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        study = Study(parse(ForgettingOptions, words, prog="python -m studies.forgetting"))
        with signals_as_interrupt():
            study.work()
        text = tables(study.record)
        if study.options.page is not None and is_finished(study.record):
            write_part(study.options.page, text)
    except KeyboardInterrupt:
        print("interrupted. Go on with the same command.", file=sys.stderr)
        return 130
    except MolaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(study.left())} sequences left\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
