"""`python -m studies.from_lora`: is a mixture made of trained LoRAs ahead of a fresh one, and of one trained as long?

- With each seed three LoRAs are trained on one kind of question each and become a mixture, which then learns all three.
- Beside it, with the same rows in the same order, a fresh mixture for as many steps, and one for as many as the mixture
  and its LoRAs together.
- Every finished training is in the record. The same command does what is left, and prints the table of it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mola.data.prepare import PrepareOptions, prepare
from mola.data.read import read_rows
from mola.errors import MolaError
from mola.evaluation.differences import paired_difference, t_interval
from mola.evaluation.evaluate import EvaluateOptions, evaluate
from mola.exporting.convert import ConvertOptions, convert
from mola.files.atomic import atomic_write_json
from mola.files.environment import machine_description, software_versions
from mola.files.reading import json_lines, read_json, read_json_object
from mola.options.fields import option
from mola.options.parsing import parse
from mola.studies.train_and_test import TrainAndTestOptions, train_or_go_on
from mola.training.checkpoints import RUN_FILE
from mola.training.run_folder import METRICS_FILE

KINDS = ("Measurement", "Senses", "Tense")
_FRESH = {"num_experts": "3,", "top_k": "2"}
# Label and options of what is trained.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (f"LoRA of `{kind}`", {"num_experts": "1,", "top_k": "1"}) for kind in KINDS},
    "made": ("mixture of the LoRAs", {}),
    "fresh": ("fresh mixture", _FRESH),
    "longer": ("fresh mixture", _FRESH),
}
_FROM_START = ("made", "fresh")  # measured before the first step, too
# As recipes/quickstart.yaml, but for the order of the rows.
_TRAINING = {"learning_rate": 0.003, "lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 4, "adam_beta2": 0.99}
_TRAINING |= {"lora_dropout": 0.0, "save_strategy": "no", "load_best_model_at_end": False, "expert_telemetry": False}
_TRAINING |= {"eval_strategy": "steps", "eval_delay": 10**6}  # a training ends with an evaluation anyway


@dataclass
class StudyOptions:
    """Options of the study."""

    base_model: str = option(".cache/SmolLM2-135M-Instruct", "Folder of the base model.")
    output_dir: str = option("runs/from_lora", "Where data and trainings are kept.")
    record: str = option("studies/from_lora.json", "File of all results.")
    seeds: int = option(3, "Number of seeds: of new weights and of the order of rows.")
    lora_steps: int = option(40, "Steps of each LoRA.")
    steps: int = option(30, "Steps of the mixtures.")
    at_most: int | None = option(None, "Stop after so many trainings.")


class Study:
    """What is done, and doing the rest."""

    def __init__(self, options: StudyOptions) -> None:
        self.options, self.folder = options, Path(options.output_dir)
        steps = [options.lora_steps, options.steps]
        found = read_json(options.record) if Path(options.record).exists() else {"steps": steps, "runs": []}
        if found["steps"] != steps:
            raise MolaError(f"`lora_steps` and `steps` must be {found['steps']}, as in the record: got {steps}.")
        self.record: dict[str, Any] = found

    def left(self) -> list[tuple[int, str]]:
        """Seeds and names of trainings without a result."""
        done = {(run["seed"], run["name"]) for run in self.record["runs"]}
        return [key for seed in range(self.options.seeds) for name in RUNS if (key := (seed, name)) not in done]

    def do(self, seed: int, name: str) -> bool:
        """One training and its tests; whether no signal stopped it."""
        self._prepare()
        folder, start = self._path(str(seed), name), self._mixture(str(seed)) if name == "made" else None
        steps, data = _steps(self.record, name), self._path(f"{name if name in KINDS else 'train'}.json")
        options = {"base_model": self.options.base_model, "task": "sample", "data": data, "output_dir": folder}
        options |= {"max_steps": steps, "lr_scheduler_kwargs": {"num_decay_steps": steps * 3 // 8}, "adapter": start}
        options |= {"eval_data": self._path("test.json"), "eval_on_start": name in _FROM_START}
        options |= {"seed": seed, "data_seed": seed}
        if not train_or_go_on(TrainAndTestOptions(**options, **_TRAINING, **RUNS[name][1])):
            return False
        trained = read_json_object(Path(folder, RUN_FILE))
        losses = [row["eval_loss"] for row in json_lines(Path(folder, METRICS_FILE)) if "eval_loss" in row]
        marks = [self._marks(each) for each in ([start] if name in _FROM_START else []) + [folder]]
        run = {"seed": seed, "name": name, "trained": trained["trainable_parameters"], "loss": losses, "marks": marks}
        run |= {"seconds": trained["seconds"], "versions": software_versions(), "machine": machine_description()}
        self.record["runs"].append(run)
        atomic_write_json(self.options.record, self.record)
        return True

    def _path(self, *parts: str) -> str:
        return str(self.folder.joinpath(*parts))

    def _prepare(self) -> None:
        """Rows of each kind, and of all of them as the generator mixes them; 25 test questions of each."""
        if not Path(self._path("test.json")).exists():
            prepare(PrepareOptions("sample", self._path("all"), test_size=125, overwrite_output_dir=True))
            rows = {split: read_rows(self._path("all", f"{split}.json")) for split in ("train", "test")}
            for name, split, kinds in [(kind, "train", [kind]) for kind in KINDS] + [(s, s, KINDS) for s in rows]:
                chosen = [row for row in rows[split] if row["category"] in kinds]
                atomic_write_json(self._path(f"{name}.json"), chosen)
        self.record["kinds"] = [row["category"] for row in read_rows(self._path("test.json"))]

    def _mixture(self, seed: str) -> str:
        """The seed's LoRAs as experts, with fitted routers."""
        mixture, base = self._path(seed, "mixture"), self.options.base_model
        loras = {kind: self._path(seed, f"lora {kind}") for kind in KINDS}
        for kind, lora in loras.items():
            if not Path(lora).exists():
                convert(ConvertOptions([self._path(seed, kind)], lora, None, "lora", base, rank=8))
        if not Path(mixture).exists():
            options = ConvertOptions([*loras.values()], mixture, "lora", None, base, num_experts="3,", seed=int(seed))
            options.data, options.task, options.limit = [self._path(f"{kind}.json") for kind in KINDS], "sample", 64
            print(convert(options))
        return mixture

    def _marks(self, adapter: str | None) -> str:
        """Right or wrong, by question."""
        options = EvaluateOptions(base_model=self.options.base_model, task="sample", data=self._path("test.json"))
        options.adapter, options.scoring, options.batch_size = adapter, "likelihood", 16
        return "".join("01"[sample["correct"]] for sample in evaluate(options).samples)


def _steps(record: Mapping[str, Any], name: str) -> int:
    lora_steps, steps = record["steps"]
    return lora_steps if name in KINDS else steps + len(KINDS) * lora_steps * (name == "longer")


def table(record: Mapping[str, Any]) -> str:
    """Means over seeds, and by how much the mixture of the LoRAs is ahead, in Markdown."""
    heads = ("", "steps", "trained values", "loss", "accuracy", "mixture of the LoRAs less this: loss", "points")
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * 6]
    found = {name: {run["seed"]: run for run in record["runs"] if run["name"] == name} for name in RUNS}
    seeds = sorted(set.intersection(*map(set, found.values())))  # whole ones
    runs = {name: [by_seed[seed] for seed in seeds] for name, by_seed in found.items()}

    def measured(name: str, end: int) -> tuple[np.ndarray, np.ndarray]:
        marks = np.array([[float(mark) for mark in run["marks"][end]] for run in runs[name]])
        return np.array([run["loss"][end] for run in runs[name]]), marks

    for name, end in [(each, end) for each in RUNS for end in ((0, -1) if each in _FROM_START else (-1,))]:
        loss, marks = measured(name, end)
        own = marks[:, np.array(record["kinds"]) == name] if name in KINDS else None
        accuracy = f"{100 * marks.mean():.1f} %" + (f", of its kind {100 * own.mean():.1f} %" if name in KINDS else "")
        cells = [RUNS[name][0], "0" if end == 0 else str(_steps(record, name)), f"{runs[name][0]['trained']:,}"]
        cells += [f"{loss.mean():.3f}", accuracy, "", ""]
        if name != "made":
            # What has not learned all kinds stands beside the mixture before its first step.
            our_loss, our_marks = measured("made", 0 if end == 0 or name in KINDS else -1)
            points = paired_difference(our_marks, marks)
            less = our_loss - loss
            cells[5] = f"{less.mean():+.3f}" + (
                "" if len(less) < 2 else " ({:+.3f} to {:+.3f})".format(*t_interval(less))
            )
            cells[6] = f"{100 * points.value:+.1f}"
            if points.seeds_95:
                cells[6] += " ({:+.1f} to {:+.1f})".format(*(100 * each for each in points.seeds_95))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is left; returns the exit code: 0, 2 for wrong input, 130 after an interruption."""
    try:
        study = Study(parse(StudyOptions, sys.argv[1:] if arguments is None else arguments, prog="studies.from_lora"))
        for seed, name in study.left()[: study.options.at_most]:
            print(f"{len(study.left())} trainings left. Next: {name}, seed {seed}", flush=True)
            if not study.do(seed, name):
                return 130
    except MolaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(left)} trainings left" if (left := study.left()) else table(study.record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
