"""`python -m benchmarks.serve_skills`: `mola serve` with a skills folder, under load.

A server in a process of its own serves random LoRAs as skills. With `--names` beyond their number, each LoRA stands
under many names. Clients ask the folder, which decides, and skills by name in turn. Each client sends its next request
when the last one is answered. Every answer is streamed and compared with the greedy answer of the skill that its header
names, loaded alone in PEFT.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.errors import in_one_line
from benchmarks.serve_load import LoadOptions, print_rows, serving, spread
from mola.files.atomic import atomic_write_json, check_writable
from mola.files.environment import machine_description, software_versions
from mola.options.fields import option
from mola.options.parsing import parse

logger = logging.getLogger("benchmarks")

_STD = 0.05  # standard deviation of the LoRAs' B
_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_FOLDER = "skills"
_WORDS = (
    "sea",
    "forest",
    "train",
    "garden",
    "winter",
    "clock",
    "bread",
    "island",
    "letter",
    "market",
    "bridge",
    "storm",
)
_KINDS = {
    "story": "Write a short story about the {}.",
    "french": 'Translate into French: "the {}"',
    "code": "def count_{0}(lines):\n    # number of lines that hold the word {0}\n",
    "list": "List five things that people need at the {}:\n1.",
    "shout": "BREAKING NEWS!!! THE {} IS CLOSED!!! WHY???",
}
_ASKED = 4  # prompts of each kind that are asked; the others are what a skill is measured on


@dataclass
class SkillLoadOptions:
    """Options of `python -m benchmarks.serve_skills`."""

    base_model: str = option(LoadOptions.base_model, "Folder of the base model; by default the quickstart's.")
    names: int = option(len(_KINDS), "Number of skills in the folder; the five LoRAs stand under as many names.")
    max_loaded_skills: int = option(64, "Passed to `mola serve`.")
    layer: int | None = option(None, "The decision reads the input of this layer; by default a third of the layers.")
    clients: list[int] = field(
        default_factory=lambda: [1, 10],
        metadata={"help": "Numbers of simultaneous clients; each number gives one row."},
    )
    requests: int = option(100, "Requests of one row.")
    max_tokens: int = option(16, "Tokens of each answer.")
    dtype: str = option("auto", "Dtype: auto, float32, bfloat16 or float16.")
    device: str | None = option(None, "Device, such as cpu or cuda:0; by default the best one here.")
    max_batch_size: int | None = option(None, "Passed to `mola serve`; by default the server's own default.")
    output: str | None = option(None, "Result file (JSON).")


@in_one_line("benchmarks.serve_skills")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON if asked for.

    Returns:
        The exit code: 0, 1 if an answer differed from that of the skill alone, 2 for wrong input.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return run(parse(SkillLoadOptions, arguments, prog="python -m benchmarks.serve_skills", summary=__doc__ or ""))


def run(options: SkillLoadOptions) -> int:
    """Measure with parsed options; see `main`."""
    output = None if options.output is None else check_writable(options.output)
    with tempfile.TemporaryDirectory(prefix="mola-serve-skills-") as temporary:
        folder = Path(temporary) / _FOLDER
        loras = {kind: Path(temporary) / kind for kind in _KINDS}
        names = _make_folder(options, folder, loras)
        words = ["--adapter", str(folder), "--max_loaded_skills", str(options.max_loaded_skills)]
        start, rows, answers = time.perf_counter(), [], []
        with serving(_server_options(options), words) as (url, process):
            started = time.perf_counter() - start
            for clients in options.clients:
                logger.info("%s clients", clients)
                row, own = asyncio.run(_load(url, names, clients, options))
                row["megabytes"] = psutil.Process(process).memory_info().rss / 1e6
                rows.append(row)
                answers += own
        wrong = _count_wrong(options, loras, names, answers)
    print_rows(rows)
    decided = [answer for answer in answers if answer["model"] == _FOLDER]
    known = sum(names.get(answer["skill"]) == answer["kind"] for answer in decided)
    logger.info(
        "Ready after %.1f s. Decided as meant: %d of %d. Other text: %d of %d.",
        started,
        known,
        len(decided),
        wrong,
        len(answers),
    )
    if output is not None:
        record = {"options": asdict(options), "machine": machine_description(), "versions": software_versions()}
        counts = {"seconds_to_start": started, "decided_as_meant": known, "decided": len(decided), "wrong": wrong}
        atomic_write_json(output, record | counts | {"rows": rows})
    return 1 if wrong else 0


def _server_options(options: SkillLoadOptions) -> LoadOptions:
    shared = {name: getattr(options, name) for name in ("base_model", "clients", "dtype", "device", "max_batch_size")}
    return LoadOptions(**shared)


def _make_folder(options: SkillLoadOptions, folder: Path, loras: dict[str, Path]) -> dict[str, str]:
    """Write a skills folder with a random LoRA for each kind, under as many names as asked for.

    Returns:
        Name of a skill -> its kind.
    """
    from mola.checkpoints.skills_folder import add_entry, copy_lora, locked, read_skills, write_skills
    from mola.skills.skills import Skills

    for seed, path in enumerate(loras.values()):
        _save_lora(options, path, seed)
    data = {kind: folder.with_name(f"{kind}.jsonl") for kind in _KINDS}
    for kind, path in data.items():
        rows = [{"instruction": _prompt(kind, word), "output": "Yes."} for word in _WORDS[_ASKED:]]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    Skills(folder).add(loras, data, base_model=options.base_model, layer=options.layer, template="plain")
    skills = read_skills(folder)
    kinds = dict(zip(_KINDS, _KINDS, strict=True))
    copies = {}
    for number in range(len(_KINDS), options.names):
        kind = [*_KINDS][number % len(_KINDS)]
        name = f"{kind}-{number:04}"
        # Prompts of their own differ a little, or all copies would have the same score.
        draw = np.random.default_rng(number)
        statistics = {key: each.copy() for key, each in skills.statistics[kind].items()}
        means = statistics["means"]
        statistics["means"] = means + 0.01 * draw.standard_normal(means.shape, means.dtype)
        skills = add_entry(skills, name, replace(skills.skills[kind]), statistics)
        copies[name], kinds[name] = loras[kind], kind
    with locked(folder):
        write_skills(skills, copies, copy_lora)
    return kinds


def _prompt(kind: str, word: str) -> str:
    return _KINDS[kind].format(word.upper() if kind == "shout" else word)


def _save_lora(options: SkillLoadOptions, folder: Path, seed: int) -> None:
    """A random LoRA of the layers from the decision's on, far enough from zero that its answers differ."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(options.base_model)
    num_layers = base.config.num_hidden_layers
    first = num_layers // 3 if options.layer is None else options.layer
    config = LoraConfig(
        r=8, target_modules=_LINEARS, layers_to_transform=[*range(first, num_layers)], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=_STD)
    model.save_pretrained(str(folder))


async def _load(
    url: str, names: dict[str, str], clients: int, options: SkillLoadOptions
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Measure one row of results; also return every answer: its model, kind, prompt, skill and text."""
    from openai import AsyncOpenAI

    prompts = [(kind, _prompt(kind, word)) for word in _WORDS[:_ASKED] for kind in _KINDS]
    # Half of the requests ask the folder; the others go through the names of all skills.
    models = itertools.chain.from_iterable((_FOLDER, name) for name in itertools.cycle(names))
    pending = iter(list(itertools.islice(zip(models, itertools.cycle(prompts)), options.requests)))
    times: list[tuple[float, float]] = []
    answers: list[dict[str, str]] = []

    async def visit(client: AsyncOpenAI) -> None:
        for model, (kind, prompt) in pending:
            start, first, text = time.perf_counter(), None, ""
            raw = await client.completions.with_raw_response.create(
                model=model, prompt=prompt, max_tokens=options.max_tokens, stream=True
            )
            async for chunk in raw.parse():
                first = first or time.perf_counter() - start
                text += chunk.choices[0].text
            times.append((first or 0.0, time.perf_counter() - start))
            skill = raw.headers["X-Mola-Skill"]
            answers.append({"model": model, "kind": kind, "prompt": prompt, "skill": skill, "text": text})

    start = time.perf_counter()
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=3600) as client:
        await asyncio.gather(*(visit(client) for _ in range(clients)))
    seconds = time.perf_counter() - start
    firsts, wholes = zip(*times, strict=True)
    row = {
        "what": f"{len(names)} skills, {clients} client{'s' if clients > 1 else ''}",
        "requests": len(times),
        "seconds": seconds,
        "first_text": spread(firsts),
        "answer": spread(wholes),
    }
    return row, answers


def _count_wrong(
    options: SkillLoadOptions, loras: dict[str, Path], names: dict[str, str], answers: list[dict[str, str]]
) -> int:
    """Number of answers that are not the greedy answer of the skill alone."""
    from mola.generation.decoding import generate_text
    from mola.models.loading import load_model
    from mola.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.base_model)
    wrong = 0
    for kind, adapter in (*loras.items(), (None, None)):
        own = [answer for answer in answers if names.get(answer["skill"]) == kind]
        if not own:
            continue
        model = load_model(options.base_model, adapter, options.dtype, options.device)
        texts = {
            prompt: generate_text(model, tokenizer, prompt, max_new_tokens=options.max_tokens)
            for prompt in {answer["prompt"] for answer in own}
        }
        wrong += sum(answer["text"] != texts[answer["prompt"]] for answer in own)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
