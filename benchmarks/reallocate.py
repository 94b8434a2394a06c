"""`python -m benchmarks.reallocate`: what is left of a trained adapter when its experts are moved between layers.

An adapter with the same number of experts everywhere is trained on generated questions. Then the same budget is given
to the layers by a shape, in several ways, and everything is trained on for the same number of steps; beside it stand
the adapter that keeps its allocation, and a new one with the new allocation. Losses are those of the answers of
held-out questions, mean over tokens.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks.errors import in_one_line
from mola.allocation.allocate import AllocateOptions, allocate
from mola.allocation.resize import Experts, resize
from mola.architecture.layer_stacks import layer_index
from mola.checkpoints.tensors import adapted_modules
from mola.data.encode import encode_examples
from mola.data.examples import load_examples
from mola.data.prepare import PrepareOptions, prepare
from mola.data.tasks import load_task
from mola.data.templates import get_template
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json, check_writable
from mola.files.digests import DIGEST_FIELD
from mola.files.environment import machine_description, software_versions
from mola.files.terminal import table_console
from mola.insight.ablation import answer_loss
from mola.insight.recording import gates_of_tokens
from mola.insight.usage import UsageCounter
from mola.models.loading import load_model
from mola.models.tokenizer import load_tokenizer
from mola.options.fields import option
from mola.options.parsing import parse
from mola.training.train import TrainOptions, train

logger = logging.getLogger("benchmarks")

_PROJECT = Path(__file__).resolve().parents[1]
_BATCH = 8
_QUESTIONS_OF_USE = 20
WAYS = {
    "drop, fresh": ("drop", "fresh"),
    "drop, copy": ("drop", "copy"),
    "merge, fresh": ("merge", "fresh"),
    "merge, copy": ("merge", "copy"),
}


@dataclass
class ReallocateBenchmarkOptions:
    """Options of `python -m benchmarks.reallocate`."""

    base_model: str = option(
        str(_PROJECT / ".cache" / "SmolLM2-135M-Instruct"), "Folder of the base model; by default the quickstart's."
    )
    num_experts: int = option(5, "Experts of every layer at the start.")
    shape: str = option("2468", "Shape of the new allocation, at the same budget.")
    ways: list[str] = field(
        default_factory=lambda: list(WAYS), metadata={"help": "How layers lose and gain experts: some of the four."}
    )
    with_use: bool = option(
        True, "Measure the use of experts on other questions, and let it decide which ones go, too."
    )
    first_steps: int = option(80, "Steps of 8 questions before.")
    more_steps: int = option(20, "Steps after.")
    more_learning_rate: float = option(
        0.001, "Learning rate of these steps; the 0.003 of the first ones makes losses jump, once they are small."
    )
    held_out: int = option(60, "Questions of which the loss is measured.")
    seed: int = option(0, "Seed of questions and weights.")
    output: str | None = option(None, "Result file (JSON).")


@in_one_line("benchmarks.reallocate")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON if asked for.

    Returns:
        The exit code: 0, 2 for wrong input.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    run(parse(ReallocateBenchmarkOptions, arguments, prog="python -m benchmarks.reallocate", summary=__doc__ or ""))
    return 0


def run(options: ReallocateBenchmarkOptions) -> list[dict[str, Any]]:
    """Measure and print; see the module.

    Raises:
        MolaError: an option is wrong, or the model is missing.
    """
    if unknown := set(options.ways) - set(WAYS):
        raise MolaError(f"`ways` must be among {', '.join(map(repr, WAYS))}: got {sorted(unknown)}.")
    if not (Path(options.base_model) / "config.json").is_file():
        raise MolaError(f"`base_model` must be a folder that holds a model: got {options.base_model!r}.")
    output = None if options.output is None else check_writable(options.output)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mola-reallocate-") as temporary:
        for row in _measure(options, Path(temporary)):
            rows.append(row)
            logger.info("%s", row)
            if output is not None:
                record = {"options": asdict(options), "machine": machine_description(), "versions": software_versions()}
                atomic_write_json(output, record | {"rows": rows})
    _print(rows)
    return rows


def _measure(options: ReallocateBenchmarkOptions, folder: Path) -> Iterator[dict[str, Any]]:
    first, more, held_out, others = _questions(options, folder)
    start = folder / "start"
    _train(options, first, start, num_experts=f"{options.num_experts},")
    layers = len(_allocation(options, "uniform", None))
    numbers = _allocation(options, options.shape, options.num_experts * layers)
    use = _use(options, start, others) if options.with_use else {}
    before = _loss(options, start, held_out)
    yield {"what": "before", "num_experts": numbers, "right_after": before}

    def trained_on(name: str, adapter: Path) -> dict[str, Any]:
        _train(options, more, folder / name, adapter=str(adapter), learning_rate=str(options.more_learning_rate))
        return {"after": _loss(options, folder / name, held_out)}

    yield {"what": "the old allocation, kept", "right_after": before} | trained_on("kept", start)
    _train(options, more, folder / "new", num_experts=",".join(map(str, numbers)))
    yield {"what": "the new allocation, from the start", "after": _loss(options, folder / "new", held_out)}
    for number, way in enumerate(options.ways):
        moved = folder / f"moved-{number}"
        _move(start, moved, numbers, way, use, options.seed)
        right_after = _loss(options, moved, held_out)
        yield {"what": way, "right_after": right_after} | trained_on(f"trained-{number}", moved)


def _allocation(options: ReallocateBenchmarkOptions, method: str, budget: int | None) -> list[int]:
    many = 10**6  # any number will do to learn the depth
    return allocate(AllocateOptions(options.base_model, method, budget or many)).num_experts


def _questions(options: ReallocateBenchmarkOptions, folder: Path) -> tuple[Path, Path, Path, Path]:
    """Files of different questions: to train first, to train on, held out, and to measure use on."""
    counts = (options.first_steps * _BATCH, options.more_steps * _BATCH)
    sizes = {"train_size": sum(counts), "validation_size": _QUESTIONS_OF_USE, "test_size": options.held_out}
    prepare(PrepareOptions("sample", str(folder / "data"), seed=options.seed, **sizes))
    rows = json.loads((folder / "data" / "train.json").read_text(encoding="utf-8"))
    for name, part in (("first", rows[: counts[0]]), ("more", rows[counts[0] :])):
        atomic_write_json(folder / f"{name}.json", part)
    data = folder / "data"
    return folder / "first.json", folder / "more.json", data / "test.json", data / "validation.json"


def _train(options: ReallocateBenchmarkOptions, data: Path, output: Path, **more: str) -> None:
    """One epoch with the settings of the quickstart's recipe, but a constant rate; they suit a run of few steps."""
    settings = {
        "base_model": options.base_model,
        "data": data,
        "task": "sample",
        "output_dir": output,
        "num_train_epochs": 1,
        "per_device_train_batch_size": _BATCH,
        "train_sampling_strategy": "sequential",
        "lora_dropout": 0,
        "learning_rate": 0.003,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 4,
        "adam_beta2": 0.99,
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": "true",
        "seed": options.seed,
    }
    train(parse(TrainOptions, [f"--{name}={value}" for name, value in (settings | more).items()], prog="mola train"))


def _encoded(options: ReallocateBenchmarkOptions, data: Path) -> list[dict[str, list[int]]]:
    task = load_task("sample")
    tokenizer = load_tokenizer(options.base_model, "right")
    examples = load_examples(str(data), task, "test")
    return list(encode_examples(examples, tokenizer, get_template(task.template), cutoff_len=512)[0])


def _loss(options: ReallocateBenchmarkOptions, adapter: Path, data: Path) -> float:
    return answer_loss(load_model(options.base_model, adapter), _encoded(options, data))


def _use(options: ReallocateBenchmarkOptions, adapter: Path, data: Path) -> dict[str, torch.Tensor]:
    """Mean gates by module."""
    model, counter = load_model(options.base_model, adapter), UsageCounter()
    for sample in _encoded(options, data):
        counter.add(gates_of_tokens(model, list(sample["input_ids"])))
    return {each.module: torch.tensor(each.mean_gates) for each in counter.usage()}


def _move(start: Path, output: Path, numbers: Sequence[int], way: str, use: dict[str, torch.Tensor], seed: int) -> None:
    """As `mola reallocate`, but with any way of losing and gaining experts."""
    shrink, grow = WAYS[way]
    tensors = load_file(start / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for module in adapted_modules(tensors):
        names = [f"{module}.{part}" for part in ("mola_A", "mola_B", "mola_router")]
        experts = Experts(*(tensors[name] for name in names))
        count = numbers[layer_index(module) or 0]
        moved = resize(experts, count, generator, use.get(module), shrink=shrink, grow=grow)
        for name, tensor in zip(names, moved, strict=True):
            tensors.pop(name)
            if tensor is not None:
                tensors[name] = tensor
    config = json.loads((start / "adapter_config.json").read_text(encoding="utf-8"))
    atomic_write_json(output / "adapter_config.json", config | {"num_experts": list(numbers), DIGEST_FIELD: None})
    save_file(tensors, output / "adapter_model.safetensors", metadata={"format": "pt"})


def _print(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="Loss of held-out answers")
    for name in ("", "right after", "after training on"):
        table.add_column(name)
    for row in rows:
        table.add_row(row["what"], *(f"{row[name]:.4f}" if name in row else "-" for name in ("right_after", "after")))
    table_console().print(table)


if __name__ == "__main__":
    sys.exit(main())
