"""`python -m benchmarks.training_changes`: seconds of a training step with each change to routers and experts.

The recipes are those of the study of changes to training (docs/research/training-changes.md). All take turns within
each round, so the ratios also hold on a busy machine. A step is forward and backward, without the optimiser; its
seconds are processor time. Adapters are random and not at their start, where all updates are 0.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch import nn

from benchmarks.errors import in_one_line
from benchmarks.measure import Times, ratio, summarize, time_interleaved
from benchmarks.models import Case, load_base, training_batch
from benchmarks.providers import make_step, share_weights
from mola import MolaConfig
from mola.architecture.targets import default_target_modules
from mola.files.atomic import atomic_write_json, check_writable
from mola.files.environment import machine_description, software_versions
from mola.files.terminal import make_table_console
from mola.options.fields import option
from mola.options.parsing import parse

_PROJECT = Path(__file__).resolve().parents[1]
# Each recipe and the one it is compared with: that of `top_k_softmax` with as many experts for a token.
RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "lora_r43": ({"r": 43}, "5555"),
    "5555": ({"num_experts": 5, "r": 8, "top_k": 2}, "5555"),
    "constant": ({"num_experts": 5, "r": 8, "top_k": 2, "router": "top_k_constant"}, "5555"),
    "dense": ({"num_experts": 5, "r": 8, "top_k": 5}, "5555"),
    "sparsegen": ({"num_experts": 5, "r": 8, "top_k": 5, "router": "sparsegen", "sparsegen_lambda": 0.5}, "dense"),
    "shared_a": ({"num_experts": 5, "r": 13, "top_k": 2, "shared_a": True}, "5555"),
    "finer": ({"num_experts": 17, "r": 2, "top_k": 7}, "5555"),
}


@dataclass
class TrainingChangesOptions:
    """Options of `python -m benchmarks.training_changes`."""

    base_model: str = option(
        str(_PROJECT / ".cache" / "SmolLM2-135M-Instruct"), "Folder of the base model; by default the quickstart's."
    )
    batch_size: int = option(4, "Rows of a step.")
    seq_len: int = option(64, "Tokens of each row.")
    repeats: int = option(15, "Measured rounds; every round runs each recipe once.")
    threads: int = option(1, "Threads of torch.")
    output: str | None = option(None, "Result file (JSON).")


@in_one_line("benchmarks.training_changes")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON if asked for; returns 0, the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(TrainingChangesOptions, words, prog="python -m benchmarks.training_changes", summary=__doc__ or "")
    output = None if options.output is None else check_writable(options.output)
    torch.set_num_threads(options.threads)
    times = measure(options)
    rows = {name: _row(times, name) for name in times}
    table = Table("recipe", "seconds", "compared with", "ratio", "20th to 80th percentile")
    for name, row in rows.items():
        share = row["ratio"]
        table.add_row(
            name,
            f"{row['seconds']['median']:.3f}",
            row["compared_with"],
            f"{share['median']:.3f}",
            f"{share['p20']:.3f} to {share['p80']:.3f}",
        )
    make_table_console().print(table)
    if output is not None:
        record = {"options": asdict(options), "machine": machine_description(), "versions": software_versions()}
        atomic_write_json(output, record | {"recipes": rows})
    return 0


def measure(options: TrainingChangesOptions) -> dict[str, Times]:
    """Times of a step of each recipe."""
    case = Case(
        model=options.base_model,
        folder=options.base_model,
        dtype="float32",
        device="cpu",
        dropout=0.0,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        num_experts=5,
        r=8,
        top_k=2,
        optimizer=False,
        seed=0,
    )
    base = load_base(case)
    batch = training_batch(case, base.config.vocab_size)
    steps = {name: make_step(build(base, settings), batch, case) for name, (settings, _) in RECIPES.items()}
    return time_interleaved(steps, options.repeats, warmup=2, device="cpu")


def build(base: Any, settings: dict[str, Any]) -> nn.Module:
    """A model with a new adapter whose matrices are all random."""
    torch.manual_seed(0)
    kind = MolaConfig if "num_experts" in settings else LoraConfig
    model = get_peft_model(
        share_weights(base),
        kind(
            lora_alpha=2 * settings["r"],
            target_modules=default_target_modules([name for name, _ in base.named_modules()], base.config.model_type),
            task_type="CAUSAL_LM",
            **settings,
        ),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return model


def _row(times: dict[str, Times], name: str) -> dict[str, Any]:
    other = RECIPES[name][1]
    return {
        "seconds": summarize(times[name].seconds),
        "compared_with": other,
        "ratio": ratio(times[name], times[other]),
    }


if __name__ == "__main__":
    sys.exit(main())
