"""`mola quickstart`: all steps from a base model to a report, on a real model with 135 million parameters.

Converts the weights, generates science questions, evaluates the base model, fine-tunes a mixture of experts
with the recipe `quickstart.yaml` in this folder, evaluates it, inspects the experts, prints one answer, and writes a
report.
"""

import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from mola.data.prepare import PrepareOptions, prepare
from mola.errors import MolaError
from mola.evaluation.evaluate import EvaluateOptions, EvaluateResult, evaluate
from mola.files.atomic import atomic_write_json
from mola.files.environment import machine_description, software_versions
from mola.files.terminal import OutputConsole
from mola.models.smollm2 import prepare_smollm2
from mola.options.parsing import parse
from mola.reporting.inspect import InspectOptions, inspect
from mola.reporting.load_run import load_run
from mola.reporting.report import ReportOptions, report
from mola.studies.fields import QuickstartOptions
from mola.training.train import TrainOptions, train

_NUM_INSPECTED = 20
_RESULT_FILES = (
    "run.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "before.json",
    "after.json",
    "inspect.json",
    "summary.json",
)


def main(options: QuickstartOptions) -> int:
    """Run all steps, print the results, and write the numbers to `summary.json` in the run folder."""
    start = time.perf_counter()
    console = OutputConsole()
    seconds: dict[str, float] = {}
    folder = Path(options.output_dir)
    _check_folder(folder)
    train_options = _train_options(options, folder / "data")
    with _timed(console, seconds, "base model"):
        base_model = prepare_smollm2(options.model_dir)
    with _timed(console, seconds, "questions"):
        prepare(PrepareOptions("sample", str(folder / "data"), seed=options.seed, overwrite_output_dir=True))
    test: dict[str, Any] = {"base_model": str(base_model), "task": "sample", "data": str(folder / "data" / "test.json")}
    test |= {"dtype": options.dtype, "overwrite": True}
    with _timed(console, seconds, "accuracy before"):
        before = _accuracy(EvaluateOptions(**test, output=str(folder / "before.json"), batch_size=16))
    with _timed(console, seconds, "fine-tuning"):
        result = train(train_options)
    if result.status != "finished":
        print("Interrupted. The same command starts from the beginning.", file=sys.stderr)
        return 130
    with _timed(console, seconds, "accuracy after"):
        adapter = str(folder)
        after = _accuracy(EvaluateOptions(**test, adapter=adapter, output=str(folder / "after.json"), batch_size=16))
    if load_run(adapter).has_routers:
        with _timed(console, seconds, "experts"):
            inspect(InspectOptions(**test, adapter=adapter, limit=_NUM_INSPECTED, json=str(folder / "inspect.json")))
    with _timed(console, seconds, "report"):
        page = report(ReportOptions(str(folder)))
    summary = _summary(before, after, result.metrics.get("eval_loss"), seconds, time.perf_counter() - start)
    atomic_write_json(folder / "summary.json", summary)
    _show(console, folder, summary, before, after)
    print(f"Open {page} in a browser")
    return 0


def _check_folder(folder: Path) -> None:
    """Raise if the folder holds results of a different command. A quickstart folder is recognised by its questions."""
    found = [name for name in _RESULT_FILES if (folder / name).exists()]
    is_own = (folder / "data" / "dataset.hf").exists() or any(folder.glob(".data.*"))  # left by a killed quickstart
    if found and not is_own:
        raise MolaError(
            f"`output_dir` must be empty or belong to an earlier quickstart: {str(folder)!r} holds {found[0]!r} from a "
            "different command, which would be replaced. Pass a different folder."
        )


def _accuracy(options: EvaluateOptions) -> EvaluateResult:
    return cast(EvaluateResult, evaluate(options))  # the task of the quickstart has answers


@contextmanager
def _timed(console: Console, seconds: dict[str, float], name: str) -> Iterator[None]:
    console.print(f"[bold]{name}[/bold] ...")
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)


def _train_options(options: QuickstartOptions, data: Path) -> TrainOptions:
    arguments = {
        "config": options.recipe or Path(__file__).with_suffix(".yaml"),
        "base_model": options.model_dir,
        "data": data / "dataset.hf",
        "output": options.output_dir,
        "seed": options.seed,
        "overwrite": "true",
    }
    if options.dtype != "auto":  # with "auto", the recipe may set the dtype
        arguments["dtype"] = options.dtype
    flags = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    # Parsed like a command line, so that the recipe is checked like a user's recipe.
    train_options: TrainOptions = parse(TrainOptions, flags, prog="mola train")
    return train_options


def _summary(
    before: EvaluateResult,
    after: EvaluateResult,
    eval_loss: float | None,
    seconds: Mapping[str, float],
    total: float,
) -> dict[str, Any]:
    return {
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "eval_loss": eval_loss,
        "interval_95_before": before.interval_95,
        "interval_95_after": after.interval_95,
        "unanswered_before": before.unanswered,
        "unanswered_after": after.unanswered,
        "questions": after.total,
        "seconds": round(total, 1),
        "seconds_by_step": dict(seconds),
        "versions": software_versions(),
        "machine": machine_description(),
    }


def _show(
    console: Console, folder: Path, summary: Mapping[str, Any], before: EvaluateResult, after: EvaluateResult
) -> None:
    table = Table(title=f"{after.total} questions that were not used in training")
    for column in ("", "accuracy", "95 % interval", "unanswered"):
        table.add_column(column)
    for name, result in (("before", before), ("after", after)):
        low, high = result.interval_95
        table.add_row(name, f"{result.accuracy:.1%}", f"{low:.1%} to {high:.1%}", str(result.unanswered))
    console.print(table)
    if summary["eval_loss"] is not None:
        console.print(f"Evaluation loss after training: {summary['eval_loss']:.3f}", highlight=False)
    pairs = list(zip(before.samples, after.samples, strict=True))
    learnt = [pair for pair in pairs if pair[1]["correct"] and not pair[0]["correct"]]
    old, new = (learnt or pairs)[0]
    lines = new["prompt"].splitlines()
    question, options = (next(line for line in lines if line.startswith(word)) for word in ("Question:", "Options:"))
    for text in ("", "One of them:", question, options):
        console.print(text, markup=False, highlight=False)
    for name, sample in (("before", old), ("after", new)):
        words = f"{sample['predicted'] or 'no answer'} ({'correct' if sample['correct'] else 'wrong'})"
        console.print(f"{name}: {words}, in words: {' '.join(sample['output'].split())}", markup=False, highlight=False)
    print(f"\n{summary['seconds']:.0f} s in all. The adapter is in {folder}. Query it:")
    first = next(number for number, line in enumerate(lines) if line.startswith("Context:"))
    instruction = "\n".join([*lines[first : lines.index(options) + 1], ""])  # as in training
    print(shlex.join(["mola", "generate", str(folder), "--instruction", instruction]))
