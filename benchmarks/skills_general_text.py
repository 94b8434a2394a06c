"""`python -m benchmarks.skills_general_text FOLDER`: what a skills folder changes for text that no skill is for.

The texts are paragraphs of Python's own manual, which no statistics contain. Each is a prompt of its own. The table has
the share of texts that the base model answers, and the divergence of the next token's distribution from that of the
base model, the mean of `KL(base || with skills)` over the tokens of all texts, in nats.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.errors import in_one_line
from benchmarks.text_shifts import manual_paragraphs
from mola.files.atomic import atomic_write_json, check_writable
from mola.files.environment import machine_description, software_versions
from mola.models.loading import load_model
from mola.models.tokenizer import load_tokenizer
from mola.options.fields import option, required
from mola.options.parsing import parse


@dataclass
class GeneralTextOptions:
    """Options of `python -m benchmarks.skills_general_text`."""

    folder: str = required("Skills folder.")
    texts: int = option(200, "Number of texts.")
    max_tokens: int = option(128, "Tokens of each text that are read.")
    dtype: str = option("float32", "Dtype: float32 or bfloat16.")
    output: str | None = option(None, "Result file (JSON).")


@in_one_line("benchmarks.skills_general_text")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON if asked for; returns 0, the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(
        GeneralTextOptions,
        words,
        prog="python -m benchmarks.skills_general_text",
        summary=__doc__ or "",
        positional="folder",
    )
    output = None if options.output is None else check_writable(options.output)
    record = measure(options)
    print(f"texts to the base model: {record['to_base']} of {record['texts']}; asked: {record['asked']}")
    print(f"KL(base || with skills): {record['kl']:.4f} nats a token, over {record['tokens']} tokens")
    if output is not None:
        atomic_write_json(output, record)
    return 0


@torch.no_grad()
def measure(options: GeneralTextOptions) -> dict[str, Any]:
    """Divergence and decisions; the record."""
    model = load_model(options.folder, dtype=options.dtype)
    tokenizer = load_tokenizer(model.name_or_path)
    every = manual_paragraphs()
    asked: Counter[str] = Counter()
    divergence, tokens = 0.0, 0
    for text in every[:: max(1, len(every) // options.texts)][: options.texts]:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=options.max_tokens)["input_ids"]
        skilled = model(ids).logits.float().log_softmax(-1)
        asked[str(model.skills.last_names[0] or "base")] += 1
        with model.skills.use(None):
            base = model(ids).logits.float().log_softmax(-1)
        divergence += float((base.exp() * (base - skilled)).sum())
        tokens += ids.numel()
    return {
        "texts": asked.total(),
        "to_base": asked["base"],
        "asked": dict(asked),
        "tokens": tokens,
        "kl": divergence / tokens,
        "skills": model.skills.names,
        "threshold": model.skills.threshold,
        "machine": machine_description(),
        "versions": software_versions(),
    }


if __name__ == "__main__":
    sys.exit(main())
