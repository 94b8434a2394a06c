"""`python -m benchmarks.skills`: what 1 to 1,000 skills cost, compared with one LoRA in PEFT.

The LoRAs are random, have rank 8 and adapt all linears of the upper two thirds of the layers. Every prompt asks the
skill with the best score. Both models take turns within each round, so the ratios also hold on a busy machine.

- prompt: a forward pass over the prompts; with skills it includes the decision.
- token: passes of one token per row with a filled cache.
- mixed: like token, with a different skill in every row, compared with PEFT's `adapter_names` and with one LoRA.
- add and load: seconds until a skill is known, and until its tensors are in memory; PEFT's `load_adapter` does both.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.errors import in_one_line
from benchmarks.measure import Times, ratio, time_interleaved
from mola._compat import cache_argument
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json, check_writable
from mola.files.environment import machine_description, software_versions
from mola.files.terminal import make_table_console
from mola.options.fields import option
from mola.options.parsing import parse
from mola.tuner.skills.content import ContentFinder
from mola.tuner.skills.lower_layers import decoder_layers
from mola.tuner.skills.runtime import SkillsRuntime
from mola.tuner.skills.statistics import GeneralStatistics, SkillStatistics

logger = logging.getLogger("benchmarks")

_PROJECT = Path(__file__).resolve().parents[1]
_DIFFERENT_FILES = 16  # further skills are links to these LoRAs, so that a thousand need no gigabytes
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class SkillsBenchmarkOptions:
    """Options of `python -m benchmarks.skills`."""

    base_model: str = option(
        str(_PROJECT / ".cache" / "SmolLM2-135M-Instruct"), "Folder of the base model; by default the quickstart's."
    )
    skills: list[int] = field(
        default_factory=lambda: [1, 10, 100, 1000], metadata={"help": "Numbers of skills, growing."}
    )
    rows: int = option(1, "Rows of a batch, for prompt and token.")
    mixed_rows: int = option(8, "Rows of the batch whose rows ask different skills; 0 leaves it out.")
    prompt_tokens: int = option(64, "Tokens of each prompt.")
    new_tokens: int = option(16, "Tokens that follow in each round.")
    repeats: int = option(7, "Rounds that are measured.")
    dtype: str = option("float32", "Dtype: float32 or bfloat16.")
    device: str = option("cpu", "Device, such as cpu or cuda:0.")
    output: str | None = option(None, "Result file (JSON).")


@in_one_line("benchmarks.skills")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables, write JSON if asked for; returns 0, the exit code."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()
    # PEFT reads a property of Transformers under its old name, which is not mola's concern.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(SkillsBenchmarkOptions, arguments, prog="python -m benchmarks.skills", summary=__doc__ or "")
    if options.skills != sorted(options.skills) or options.skills[0] < 1:
        raise MolaError(f"`skills` must be growing numbers from 1 on: got {options.skills}.")
    output = None if options.output is None else check_writable(options.output)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        record = measure(options, Path(folder))
    if output is not None:
        atomic_write_json(output, record)
    return 0


def measure(options: SkillsBenchmarkOptions, folder: Path) -> dict[str, Any]:
    """Measure and print; LoRAs are written into `folder`."""
    torch.manual_seed(0)
    lora, skilled = _models(options, folder)
    runtime: SkillsRuntime = skilled.skills
    seconds: dict[str, list[float]] = {"add": [], "load": [], "peft_load_adapter": []}
    statistics = [SkillStatistics.of_features(_features(skilled, 100)) for _ in range(_DIFFERENT_FILES)]
    rows = []
    for count in options.skills:
        for index in range(len(runtime.names), count):
            own = statistics[index % _DIFFERENT_FILES]
            _timed(seconds["add"], lambda index=index, own=own: _add(runtime, folder, index, own))
        rows.append({"skills": count, **_compare(options, lora, skilled)})
        ratios = [_ratio(rows[-1][f"{what}_skills_ratio"]) for what in ("prompt", "token")]
        logger.info("%d skills: prompt %s, token %s of one LoRA", count, *ratios)
    for name in runtime.names[:_DIFFERENT_FILES]:
        if name not in runtime.loaded():
            _timed(seconds["load"], lambda name=name: runtime._store.get([name]))
    for index in range(min(8, options.skills[-1])):
        _timed(seconds["peft_load_adapter"], lambda index=index: lora.load_adapter(folder / f"{index}", f"more{index}"))
    mixed = _mixed(options, lora, skilled) if 1 < options.mixed_rows <= min(8, options.skills[-1]) else None
    medians = {name: sorted(values)[len(values) // 2] for name, values in seconds.items() if values}
    size = (folder / "0" / "adapter_model.safetensors").stat().st_size
    size_of_statistics = sum(each.nbytes for each in statistics[0].tensors().values())
    _print(rows, mixed, medians, size, size_of_statistics)
    return {
        "options": asdict(options),
        "machine": machine_description(),
        "versions": software_versions(),
        "rows": rows,
        "mixed": mixed,
        "median_seconds": medians,
        "bytes_of_lora": size,
        "bytes_of_statistics": size_of_statistics,
    }


def _models(options: SkillsBenchmarkOptions, folder: Path) -> tuple[Any, Any]:
    """The base model with one LoRA in PEFT, and the base model with room for skills."""
    dtype = getattr(torch, options.dtype)
    base, skilled = (
        AutoModelForCausalLM.from_pretrained(options.base_model, dtype=dtype).to(options.device).eval()
        for _ in range(2)
    )
    num_layers = len(decoder_layers(skilled))
    first = num_layers // 3
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        target_modules=_TARGETS,
        layers_to_transform=list(range(first, num_layers)),
        init_lora_weights=False,
    )
    lora: Any = get_peft_model(base, config, autocast_adapter_dtype=False)
    for index in range(min(_DIFFERENT_FILES, options.skills[-1])):
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        lora.save_pretrained(folder / f"{index}")
    lora = PeftModel.from_pretrained(lora.unload(), str(folder / "0"), autocast_adapter_dtype=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.base_model)
    general = GeneralStatistics.of_features(_features(skilled, 64))
    # Under this threshold the best skill is always asked.
    SkillsRuntime(skilled, first, ContentFinder(tokenizer), general, threshold=-1e9)
    return lora, skilled


def _features(model: Any, count: int) -> list[torch.Tensor]:
    """Random features of short prompts."""
    return [*torch.randn(count, 3, model.config.hidden_size)]


def _add(runtime: SkillsRuntime, folder: Path, index: int, statistics: SkillStatistics) -> None:
    path = folder / f"{index}"
    if not path.exists():
        os.symlink(folder / f"{index % _DIFFERENT_FILES}", path)
    runtime.add(f"{index}", path, statistics)


def _timed(seconds: list[float], action: Callable[[], Any]) -> None:
    start = time.process_time()
    action()
    seconds.append(time.process_time() - start)


def _compare(options: SkillsBenchmarkOptions, lora: Any, skilled: Any) -> dict[str, Any]:
    """Milliseconds and ratios of prompts and tokens, for one LoRA in PEFT and for skills."""
    ids = (
        torch.randint(3, skilled.config.vocab_size, (1, options.prompt_tokens))
        .repeat(options.rows, 1)
        .to(options.device)
    )
    found = {}
    for what, make, per in (
        ("prompt", lambda model: lambda: model(ids, use_cache=True, logits_to_keep=1), options.rows),
        ("token", lambda model: _continue(model, ids, options.new_tokens), options.rows * options.new_tokens),
    ):
        times = time_interleaved({"lora": make(lora), "skills": make(skilled)}, options.repeats, 2, options.device)
        found |= _summary(what, times, per)
    return found


def _continue(model: Any, ids: torch.Tensor, count: int, **arguments: Any) -> Callable[[], None]:
    """An action that computes `count` further tokens of each row; the prompts are read before."""
    output = model(ids, use_cache=True, logits_to_keep=1, **arguments)
    name = cache_argument(model if not isinstance(model, PeftModel) else model.get_base_model())
    cache = output[name]

    def action() -> None:
        for _ in range(count):
            model(ids[:, -1:], use_cache=True, **{str(name): cache}, **arguments)
        cache.crop(-count)

    return action


def _mixed(options: SkillsBenchmarkOptions, lora: Any, skilled: Any) -> dict[str, Any]:
    ids = torch.randint(3, skilled.config.vocab_size, (options.mixed_rows, options.prompt_tokens)).to(options.device)
    names = [f"{index}" for index in range(options.mixed_rows)]
    with skilled.skills.use(list(names)):
        skills = _continue(skilled, ids, options.new_tokens)
    actions = {
        "lora": _continue(lora, ids, options.new_tokens),
        "skills": skills,
        "peft": _continue(lora, ids, options.new_tokens, adapter_names=[f"more{name}" for name in names]),
    }
    times = time_interleaved(actions, options.repeats, 2, options.device)
    return _summary("mixed", times, options.mixed_rows * options.new_tokens)


def _summary(what: str, times: dict[str, Times], per: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"{what}_{name}_ms": 1000 * each.row()["seconds"]["median"] / per for name, each in times.items()
    }
    return found | {f"{what}_{name}_ratio": ratio(times[name], times["lora"]) for name in times if name != "lora"}


def _print(
    rows: list[dict[str, Any]], mixed: dict[str, Any] | None, medians: dict[str, float], size: int, statistics: int
) -> None:
    console = make_table_console()
    table = Table("skills", "prompt, ms", "ratio to LoRA", "token, ms", "ratio to LoRA")
    for row in rows:
        cells = [f"{row['prompt_skills_ms']:.2f}", _ratio(row["prompt_skills_ratio"])]
        table.add_row(str(row["skills"]), *cells, f"{row['token_skills_ms']:.2f}", _ratio(row["token_skills_ratio"]))
    console.print(table)
    if mixed is not None:
        console.print(
            f"Rows with different skills, a token: {mixed['mixed_skills_ms']:.2f} ms, "
            f"{_ratio(mixed['mixed_skills_ratio'])} of one LoRA; with PEFT's `adapter_names` "
            f"{mixed['mixed_peft_ms']:.2f} ms, {_ratio(mixed['mixed_peft_ratio'])}.",
            highlight=False,
        )
    times = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in medians.items())
    console.print(
        f"Processor time: {times}. Bytes of a skill: LoRA {size:,}, statistics {statistics:,}.", highlight=False
    )


def _ratio(summary: dict[str, Any]) -> str:
    return f"{summary['median']:.3f} ({summary['p20']:.3f} to {summary['p80']:.3f})"


if __name__ == "__main__":
    sys.exit(main())
