"""`python -m benchmarks.reasoning_tasks`: a stream of reasoning tasks, and which of them a small model learns.

    python -m benchmarks.reasoning_tasks --output runs/reasoning
    python -m benchmarks.reasoning_tasks --output runs/reasoning --tasks gcd ransom_note --steps 200

The tasks are those of the package reasoning-gym (`pip install reasoning-gym`), made easy. Each gets TASK/train.json and
TASK/test.json with the columns `instruction`, `input` and `output`. With `steps` each task is also learned by a LoRA on
the upper two thirds of the layers, and the share of test answers that greedy decoding would write exactly is recorded
in learned.json. Tasks that the file has are not learned again, and keep their rows.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.errors import finished, in_one_line
from mola.data.encode import encode_untruncated
from mola.data.examples import load_examples
from mola.data.templates import get_template
from mola.data.tokenized import IGNORED
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json
from mola.files.environment import machine_description, software_versions
from mola.files.reading import read_json
from mola.options.fields import option
from mola.options.parsing import parse

_PROJECT = Path(__file__).resolve().parents[1]
TEMPLATE = "alpaca_short"
LEARNED = "learned.json"
TRAINING: dict[str, Any] = {
    "template": TEMPLATE,
    "dtype": "float32",
    "per_device_train_batch_size": 4,
    "lora_dropout": 0.0,
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "expert_telemetry": False,
    "disable_tqdm": True,
}
# Task -> settings that make it easy enough to be learned in a few hundred steps, with short questions and answers.
TASKS: dict[str, dict[str, Any]] = {
    "aiw": {"max_entities": 4},
    "binary_alternation": {"min_n": 4, "max_n": 8},
    "calendar_arithmetic": {"offset_upper_bound": 20},
    "chain_sum": {"max_terms": 2, "max_digits": 2},
    "count_bits": {"max_n": 255},
    "course_schedule": {"min_num_courses": 3, "max_num_courses": 4, "max_num_prerequisites": 1},
    "family_relationships": {"max_family_size": 4},
    "fraction_simplification": {"max_value": 20, "max_factor": 9, "styles": ("plain",)},
    "gcd": {"max_value": 30},
    "isomorphic_strings": {"max_string_length": 4},
    "knights_knaves": {},
    "leg_counting": {"min_animals": 2, "max_animals": 2, "max_instances": 3},
    "letter_counting": {"min_words": 3, "max_words": 5},
    "needle_haystack": {"min_num_statements": 3, "max_num_statements": 5},
    "number_filtering": {"max_numbers": 3, "max_decimals": 0},
    "number_format": {"max_num_candidates": 2, "max_n": 9999},
    "number_sequence": {"max_terms": 5, "min_value": 0, "max_value": 20, "max_complexity": 1},
    "number_sorting": {"max_numbers": 3, "max_decimals": 0},
    "prime_factorization": {"max_value": 400},
    "ransom_note": {"max_note_length": 3, "max_magazine_length": 6},
    "self_reference": {},
}


@dataclass
class ReasoningOptions:
    """Options of the tasks."""

    output: str = option("runs/reasoning", "Folder of the tasks.")
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Tasks. Default: all."})
    train_size: int = option(200, "Training rows of each task.")
    test_size: int = option(40, "Test rows of each task; none of them is a training row.")
    steps: int | None = option(None, "Also learn each task in this number of steps of 4 rows.")
    learning_rate: float = option(0.003, "Learning rate.")
    base_model: str = option(str(_PROJECT / ".cache" / "SmolLM2-135M-Instruct"), "Base model.")
    seed: int = option(0, "Seed of rows and training.")


def write_rows(options: ReasoningOptions, task: str) -> None:
    """Write training and test rows of a task; all questions are different."""
    import reasoning_gym

    wanted = options.train_size + options.test_size
    every = reasoning_gym.create_dataset(task, size=4 * wanted, seed=options.seed, **TASKS[task])
    rows: dict[str, dict[str, str]] = {}
    for number in range(len(every)):
        drawn = every[number]
        rows.setdefault(drawn["question"], {"instruction": drawn["question"], "input": "", "output": drawn["answer"]})
        if len(rows) == wanted:
            break
    if len(rows) < wanted:
        raise MolaError(f"`train_size` and `test_size` want {wanted} questions of {task!r}: it has {len(rows)}.")
    found, folder = list(rows.values()), Path(options.output, task)
    atomic_write_json(folder / "train.json", found[: options.train_size])
    atomic_write_json(folder / "test.json", found[options.train_size :])


def learn(options: ReasoningOptions, task: str) -> dict[str, Any]:
    """Train a LoRA on a task; its accuracy on test rows, and that of the base model."""
    from mola import TrainOptions, load_model, train
    from mola.models.tokenizer import load_tokenizer

    folder = Path(options.output, task)
    run = TrainOptions(
        base_model=options.base_model,
        data=str(folder / "train.json"),
        skill=task,
        into=str(Path(options.output) / "skills"),
        output_dir=str(folder / "lora"),
        overwrite_output_dir=True,
        max_steps=options.steps or 0,
        learning_rate=options.learning_rate,
        seed=options.seed,
        **TRAINING,
    )
    result = finished(train(run))
    rows, tokenizer = load_examples(folder / "test.json", None, None), load_tokenizer(options.base_model, "right")
    answered = {
        name: marks_of(tokenizer, load_model(options.base_model, adapter, "float32"), rows).count("1") / len(rows)
        for name, adapter in (("base", None), ("learned", folder / "lora"))
    }
    return {**answered, "loss": result.metrics["train_loss"], "seconds": round(result.seconds, 1)}


@torch.no_grad()
def marks_of(tokenizer: Any, model: Any, rows: Sequence[Mapping[str, str]]) -> str:
    """A digit per row: 1 if greedy decoding would write the whole answer with its end token.

    That is so exactly if every token of the answer is the most probable one after those before it.
    """
    marks = []
    for row in encode_untruncated(rows, tokenizer, get_template(TEMPLATE), None):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        best = model(input_ids=ids).logits[0, :-1].argmax(-1)
        marks.append("01"[bool((best == labels)[labels != IGNORED].all())])
    return "".join(marks)


@in_one_line("reasoning_tasks")
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the rows, and learn the tasks that are left; 0, or 2 for wrong input."""
    words = sys.argv[1:] if arguments is None else arguments
    options = parse(ReasoningOptions, words, prog="benchmarks.reasoning_tasks", summary=__doc__.partition("\n")[0])
    if unknown := set(options.tasks) - TASKS.keys():
        raise MolaError(f"`tasks` must be some of {', '.join(TASKS)}: got {', '.join(sorted(unknown))}.")
    path = Path(options.output) / LEARNED
    record = read_json(path) if path.exists() else {}
    for task in options.tasks:
        if task in record:  # its rows stay: some tasks draw other rows in another process, whatever the seed
            continue
        write_rows(options, task)
        if options.steps is None:
            continue
        record[task] = {**learn(options, task), "machine": machine_description(), "versions": software_versions()}
        atomic_write_json(path, record)
        print(f"{task}: {record[task]['base']:.0%} before, {record[task]['learned']:.0%} after", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
