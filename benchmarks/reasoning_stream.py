"""`python -m benchmarks.reasoning_stream`: skills of a stream of reasoning tasks, beside other ways to know them all.

    python -m benchmarks.reasoning_tasks --output runs/reasoning --steps 200
    python -m benchmarks.reasoning_stream --tasks_folder runs/reasoning

The stream has the tasks that a LoRA learned: its accuracy is at least 20 points above that of the base model. A text
answer is right if greedy decoding would write it exactly. The record is written after every method, and the same
command does what is left. The text classifier needs scikit-learn.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from peft import PeftModel

from benchmarks.errors import finished, in_one_line
from benchmarks.reasoning_tasks import LEARNED, TEMPLATE, TRAINING, marks_of
from benchmarks.trained_apart import fit_text_classifier, load_loras, merge
from mola import Skills, TrainOptions, load_model, train
from mola.checkpoints.skills_folder import read_skills
from mola.data.examples import load_examples
from mola.errors import MolaError
from mola.evaluation.skills import count_asked, skills_asked
from mola.files.atomic import atomic_write_json
from mola.files.environment import machine_description, software_versions
from mola.files.reading import read_json
from mola.models.prompts import template_for
from mola.models.tokenizer import load_tokenizer
from mola.options.fields import option
from mola.options.parsing import parse
from mola.reporting.formatting import markdown_table, points

_PROJECT = Path(__file__).resolve().parents[1]
GAIN = 0.2  # a task is learned if its LoRA is this much above the base model
SEQUENCE: dict[str, Any] = {"num_experts": "1", "r": "43", "lora_alpha": 86.0, "learning_rate": 0.001}
Marks = dict[str, str]  # task -> a digit per test row, 1 for a right answer


@dataclass
class StreamOptions:
    """Options of the stream."""

    tasks_folder: str = option("runs/reasoning", "Folder that `benchmarks.reasoning_tasks` wrote.")
    record: str = option(str(_PROJECT / "studies" / "skills" / "reasoning.json"), "File of the record.")
    base_model: str = option(str(_PROJECT / ".cache" / "SmolLM2-135M-Instruct"), "Base model.")
    methods: list[str] = field(default_factory=lambda: ["all"], metadata={"help": "What to measure; see METHODS."})
    steps: int = option(200, "Steps of each task of the LoRA that learns them in sequence.")


class Stream:
    """The tasks that were learned, their rows and LoRAs."""

    def __init__(self, options: StreamOptions) -> None:
        self.options, self.folder = options, Path(options.tasks_folder)
        self.learned = read_json(self.folder / LEARNED)
        self.tasks = [name for name, each in self.learned.items() if each["learned"] - each["base"] >= GAIN]
        if len(self.tasks) < 2:
            raise MolaError(f"`tasks_folder` ({options.tasks_folder!r}) needs two learned tasks: got {self.tasks}.")
        self.tokenizer = load_tokenizer(options.base_model, "right")

    def rows(self, task: str, split: str) -> list[dict[str, Any]]:
        """The rows of a task."""
        return load_examples(self.folder / task / f"{split}.json", None, None)

    def lora(self, task: str) -> Path:
        """The folder of a task's LoRA."""
        return self.folder / task / "lora"

    def base(self, adapter: Path | None = None) -> Any:
        """The base model in float32, with one adapter or none."""
        return load_model(self.options.base_model, adapter, "float32")

    def marks(self, model: Any, task: str) -> str:
        """The marks of a model on all test rows of a task."""
        return marks_of(self.tokenizer, model, self.rows(task, "test"))

    def on_all(self, model: Any) -> dict[str, Marks]:
        """The marks of one model on all tasks."""
        return {"marks": {task: self.marks(model, task) for task in self.tasks}}

    def all_loras(self) -> PeftModel:
        """PEFT's model with every LoRA under the name of its task."""
        return load_loras(self.base(), {task: self.lora(task) for task in self.tasks})


def own(stream: Stream) -> dict[str, Any]:
    """Each row to the LoRA of its task, which the caller names."""
    return {"marks": {task: stream.marks(stream.base(stream.lora(task)), task) for task in stream.tasks}}


def skills(stream: Stream) -> dict[str, Any]:
    """A skills folder with the learned tasks: who is asked, and what is right."""
    folder = stream.folder / "learned_skills"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(stream.folder / "skills", folder)
    names, wanted = set(read_skills(str(folder)).names), set(stream.tasks)
    if missing := sorted(wanted - names):
        raise MolaError(f"`tasks_folder` ({stream.folder}) has no skill for {', '.join(missing)}. Learn them again.")
    if others := sorted(names - wanted):
        Skills(folder).remove(*others)
    model = load_model(folder, dtype="float32")
    layout = template_for(TEMPLATE, stream.tokenizer, str(stream.lora(stream.tasks[0])))
    marks, asked = {}, {}
    for task in stream.tasks:
        rows = stream.rows(task, "test")
        texts = [layout.prompt(row["instruction"], row["input"]) for row in rows]
        names = skills_asked(model, [stream.tokenizer(text)["input_ids"] for text in texts])
        answers = []
        for row, name in zip(rows, names, strict=True):
            with model.skills.use(name):
                answers.append(marks_of(stream.tokenizer, model, [row]))
        marks[task] = "".join(answers)
        asked[task] = count_asked(names)
    return {"marks": marks, "asked": asked}


def text_classifier(stream: Stream) -> dict[str, Any]:
    """Whom a text classifier names. It answers nothing."""
    texts = [(row["instruction"], task) for task in stream.tasks for row in stream.rows(task, "train")]
    classifier = fit_text_classifier(texts)
    asked = {}
    for task in stream.tasks:
        names = classifier.predict([row["instruction"] for row in stream.rows(task, "test")])
        asked[task] = count_asked(map(str, names))
    return {"asked": asked}


def merged(method: str) -> Callable[[Stream], dict[str, Any]]:
    """All LoRAs in one."""
    return lambda stream: stream.on_all(merge(stream.all_loras(), stream.tasks, method))


def sequence(stream: Stream) -> dict[str, Any]:
    """One LoRA of rank 43 learns one task after the other; `after` has the marks of each task after its own stage.

    Stages that an earlier call has ended are not trained again.
    """
    folder = stream.folder / "sequence"
    path, here = folder / "after.json", folder
    after = read_json(path) if path.exists() else {}
    for number, task in enumerate(stream.tasks):
        previous, here = here, folder / f"{number:02d}"
        if task in after:
            continue
        settings = {"adapter": str(previous), "learning_rate": SEQUENCE["learning_rate"]} if number else SEQUENCE
        run = TrainOptions(
            base_model=stream.options.base_model,
            data=str(stream.folder / task / "train.json"),
            output_dir=str(here),
            overwrite_output_dir=True,
            max_steps=stream.options.steps,
            **TRAINING,
            **settings,
        )
        finished(train(run))
        after[task] = stream.marks(stream.base(here), task)
        atomic_write_json(path, after)
        if number:
            shutil.rmtree(previous)
    found = {**stream.on_all(stream.base(here)), "after": after}
    shutil.rmtree(folder)
    return found


METHODS: dict[str, Callable[[Stream], dict[str, Any]]] = {
    "base": lambda stream: stream.on_all(stream.base()),
    "own": own,
    "skills": skills,
    "text classifier": text_classifier,
    **{method: merged(method) for method in ("sum", "mean", "ties")},
    "sequence": sequence,
}


def table(record: Mapping[str, Any]) -> str:
    """What each method got right, and whether it asked the right LoRA, in Markdown."""
    rows = [[task, *_cells(record, task)] for task in record["tasks"]]
    rows.append(["all", *_cells(record, *record["tasks"])])
    return markdown_table(("task", *_columns(record)), rows)


def _columns(record: Mapping[str, Any]) -> list[str]:
    methods = record["methods"]
    asked = [f"{name}, asked right" for name in methods if "asked" in methods[name]]
    return [name for name in methods if "marks" in methods[name]] + asked


def _cells(record: Mapping[str, Any], *tasks: str) -> list[str]:
    """Mean accuracy over tasks of each method, and the mean share of rows that ask the LoRA of their task."""
    shares: dict[str, list[float]] = {}
    for key, share in (("marks", _right), ("asked", _asked_right)):
        for name, method in record["methods"].items():
            if key in method:
                shares[f"{name} {key}"] = [share(method[key][task], task) for task in tasks]
    return [points(fmean(each), "") for each in shares.values()]


def _right(marks: str, task: str) -> float:
    return marks.count("1") / len(marks)


def _asked_right(counts: Mapping[str, int], task: str) -> float:
    return counts.get(task, 0) / sum(counts.values())


@in_one_line("reasoning_stream")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is left, and print the table; 0, or 2 for wrong input."""
    words = sys.argv[1:] if arguments is None else arguments
    options = parse(StreamOptions, words, prog="benchmarks.reasoning_stream", summary=__doc__.partition("\n")[0])
    if unknown := set(options.methods) - {"all", *METHODS}:
        raise MolaError(f"`methods` must be some of {', '.join(METHODS)}: got {', '.join(sorted(unknown))}.")
    stream, path = Stream(options), Path(options.record)
    record = read_json(path) if path.exists() else {"tasks": stream.tasks, "learned": stream.learned, "methods": {}}
    if record["learned"] != stream.learned:
        raise MolaError(f"`record` ({options.record!r}) has other tasks. Move it away.")
    for name, measure in METHODS.items():
        if name in record["methods"] or not {"all", name} & set(options.methods):
            continue
        begin = time.perf_counter()
        found = {**measure(stream), "machine": machine_description(), "versions": software_versions()}
        record["methods"][name] = {**found, "seconds": round(time.perf_counter() - begin, 1)}
        atomic_write_json(path, record)
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
