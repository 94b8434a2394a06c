"""Converts adapters of the paper's research code to mola's format, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

from mola.architecture.allocation import effective_top_k
from mola.architecture.notation import resolve_per_layer
from mola.checkpoints.adapter_folder import adapted_modules, read_tensors
from mola.checkpoints.adapter_settings import is_published, read_settings
from mola.checkpoints.published import read_published, to_published
from mola.checkpoints.recorded_base import is_recorded_base
from mola.errors import MolaError
from mola.exporting.options import ConvertOptions
from mola.files.atomic import write_new_folder
from mola.files.digests import WEIGHTS_FILE
from mola.models.adapters import check_fits
from mola.models.meta import count_decoder_layers, model_on_meta
from mola.tuner import MolaConfig

_ROPE_THETA = 10000.0  # the only value that the research code's LLaMA has


@dataclass(frozen=True)
class ConvertReport:
    """Report about a converted adapter. Lists have one entry per decoder layer, lowest layer first.

    Attributes:
        output: the folder written.
        num_experts: experts per module.
        top_k: experts used per token.
        r: rank of each expert.
        lora_alpha: numerator of the scale.
        target_modules: names of the adapted linears.
        not_saved: settings that the output format cannot hold.
        notes: what was left out, added, or written differently than it was read.
    """

    output: Path
    num_experts: list[int]
    top_k: list[int]
    r: list[int]
    lora_alpha: float
    target_modules: list[str]
    not_saved: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"layers            {len(self.num_experts)}",
            f"experts per layer {_short(self.num_experts)}",
            f"top_k             {_short(self.top_k)}",
            f"r                 {_short(self.r)}",
            f"lora_alpha        {self.lora_alpha:g}",
            f"linears           {', '.join(self.target_modules)}",
            *(f"note              {note}" for note in self.notes),
        ]
        if self.not_saved:
            lost = ", ".join(f"{name} = {_short(value)}" for name, value in self.not_saved.items())
            lines.append(f"this format cannot hold these settings, write them down: {lost}")
        return "\n".join([*lines, f"written to {self.output}"])


def _short(values: Any) -> str:
    if not isinstance(values, list):
        return str(values)
    return f"{values[0]} everywhere" if len(set(values)) == 1 else ",".join(map(str, values))


def convert_to_mola(options: ConvertOptions, output: Path) -> ConvertReport:
    """Run `mola convert --from published`; see `mola.exporting.convert.convert`."""
    source, base_model = Path(os.path.expanduser(options.source[0])), str(options.base_model)
    model = model_on_meta(base_model, options.trust_remote_code)
    num_layers = count_decoder_layers(model, base_model)
    given = resolve_per_layer(str(options.top_k), num_layers, "top_k")
    config, tensors = read_published(source, given[0] if len(set(given)) == 1 else given)
    notes = _note_unused_settings(source, config, {name.rpartition(".")[2] for name, _ in model.named_modules()})
    notes += _note_ignored_by_research_code(model.config)
    num_experts, r, top_k = (
        resolve_per_layer(getattr(config, name), num_layers, name) for name in ("num_experts", "r", "top_k")
    )
    top_k = effective_top_k(num_experts, top_k)
    check_fits(model, config, tensors)
    modules = adapted_modules(tensors)
    if without_router := sum(f"{module}.mola_router" not in tensors for module in modules):
        notes.append(f"left out: {without_router} routers of linears with one expert")
    recorded = config.base_model_name_or_path
    if not is_recorded_base(base_model, recorded):
        notes.append(f"base model: {recorded} in the source, {base_model} in the output; are these the same weights?")
    config.base_model_name_or_path = base_model
    with write_new_folder("output", output) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(folder), auto_mapping_dict=None)
    return ConvertReport(
        output=output,
        num_experts=num_experts,
        top_k=top_k,
        r=r,
        lora_alpha=config.lora_alpha,
        target_modules=list(dict.fromkeys(module.rpartition(".")[2] for module in modules)),
        notes=notes,
    )


def _note_unused_settings(source: Path, config: MolaConfig, names_in_base: Collection[str]) -> list[str]:
    """Notes for settings of the file without tensors; raise if the base model has a module without tensors."""
    settings, notes = read_settings(source), []
    num_ranks, num_layers = len(settings["r"]), len(cast(list[int], config.r))
    if num_ranks > num_layers:
        notes.append(f"r: the file has {num_ranks} numbers, of which the first {num_layers} count, one for each layer")
    targets = settings["target_modules"]
    listed = targets if isinstance(targets, list) else []  # a text may be a regular expression
    absent = [name for name in listed if name not in (config.target_modules or ())]
    if missing := [name for name in absent if name in names_in_base]:
        raise MolaError(
            f"`target_modules` in {str(source)!r} names {', '.join(missing)}, but the file holds no tensors of it. The "
            "file is incomplete."
        )
    if absent:
        notes.append(
            f"target_modules: the base model has no {', '.join(map(repr, absent))}, nor has the adapter tensors for it"
        )
    return notes


def _note_ignored_by_research_code(config: Any) -> list[str]:
    """Notes for settings of a base model that the research code's LLaMA ignored when the adapter was trained."""
    rope = getattr(config, "rope_parameters", None) or {}
    theta, kind = rope.get("rope_theta") or _ROPE_THETA, rope.get("rope_type", "default")
    ignored = [f"`rope_theta` {theta:g}"] if theta != _ROPE_THETA else []
    ignored += [f"`rope_type` {kind}"] if kind != "default" else []
    ignored += [f"`{name}`" for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    if not ignored:
        return []
    return [f"base model: the research code runs it without {', '.join(ignored)}, so its outputs differ from mola's"]


def convert_to_published(options: ConvertOptions, output: Path) -> ConvertReport:
    """Run `mola convert --to published`; see `mola.exporting.convert.convert`."""
    source = Path(os.path.expanduser(options.source[0]))
    settings = read_settings(source)
    if (peft_type := settings.get("peft_type")) != "MOLA":
        raise MolaError(
            f"`source` must be an adapter of mola for --to published, got peft_type {peft_type!r} in "
            f"{options.source[0]!r}."
            + (" Pass --from published to convert it to mola's format." if is_published(settings) else "")
        )
    config: Any = MolaConfig.from_pretrained(str(source))
    tensors = read_tensors(source)
    published_settings, published = to_published(config, tensors)
    r = published_settings["r"]
    num_experts = resolve_per_layer(config.num_experts, len(r), "num_experts")
    top_k = effective_top_k(num_experts, resolve_per_layer(config.top_k, len(r), "top_k"))
    router_settings = ("router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise")
    not_saved = {"top_k": top_k} | {name: value for name in router_settings if (value := getattr(config, name))}
    if config.router_aux_loss_coef:
        not_saved["router_aux_loss_reduction"] = config.router_aux_loss_reduction
    with write_new_folder("output", output) as folder:
        text = json.dumps(published_settings, indent=2, sort_keys=True)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
        torch.save(published, folder / "adapter_model.bin")
    notes = _note_unsupported_base(config, tensors)
    if without_router := sum(f"{module}.mola_router" not in tensors for module in adapted_modules(tensors)):
        notes.append(f"added: {without_router} routers of zeros for linears with one expert")
    return ConvertReport(
        output=output,
        num_experts=num_experts,
        top_k=top_k,
        r=r,
        lora_alpha=config.lora_alpha,
        target_modules=published_settings["target_modules"],
        not_saved=not_saved,
        notes=notes,
    )


def _note_unsupported_base(config: MolaConfig, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Notes for a base model that the research code's LLaMA cannot run (it has no grouped-query attention)."""
    query_sizes, value_sizes = (
        [each.shape[-1] for key, each in tensors.items() if key.endswith(tuple(f"{name}.mola_B" for name in names))]
        for names in (["q_proj"], ["k_proj", "v_proj"])
    )
    if query_sizes and value_sizes and min(value_sizes) < min(query_sizes):
        reason = "grouped-query attention"
    elif config.base_model_type not in (None, "llama"):
        reason = f"the type {config.base_model_type}"
    else:
        return []
    return [f"base model: the research code supports only the original LLaMA and cannot run a model with {reason}"]
