"""Adapters of the paper's research code and of MoE-PEFT to mola's format, and back to the former."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

from mola.architecture.allocation import effective_top_k
from mola.architecture.linears import is_adaptable
from mola.architecture.notation import resolve_per_layer
from mola.checkpoints.conversion_report import ConvertReport
from mola.checkpoints.formats import foreign_format
from mola.checkpoints.moe_peft import read_moe_peft
from mola.checkpoints.published import read_published
from mola.checkpoints.published_writer import to_published
from mola.checkpoints.tensors import adapted_modules, read_settings, read_tensors
from mola.errors import MolaError
from mola.exporting.options import ConvertOptions
from mola.files.atomic import new_folder
from mola.files.digests import WEIGHTS_FILE
from mola.models.adapters import check_fits
from mola.models.base_model import model_name
from mola.models.meta import count_decoder_layers, model_on_meta
from mola.tuner import MolaConfig

_ROPE_THETA = 10000.0  # the only one of the research code


def to_mola(options: ConvertOptions, output: Path) -> ConvertReport:
    """`mola convert --from published` and `--from moe_peft`; see `mola.exporting.convert.convert`."""
    source, base_model = Path(os.path.expanduser(options.source[0])), str(options.base_model)
    found = foreign_format(read_settings(source))
    if found not in (None, options.source_format):
        raise MolaError(
            f"`--from` must be the format of the source, got {options.source_format!r}: {options.source[0]!r} is in "
            f"the format {found!r}. Pass --from {found}."
        )
    model = model_on_meta(base_model, options.trust_remote_code)
    num_layers = count_decoder_layers(model, base_model)
    not_saved: dict[str, Any] = {}
    notes: list[str] = []
    if options.source_format == "published":
        config, tensors = _read_published(source, options, num_layers)
        notes = _left_out(source, config, {name.rpartition(".")[2] for name, _ in model.named_modules()})
    else:
        linears = [name for name, module in model.named_modules() if is_adaptable(module)]
        config, tensors, not_saved, notes = read_moe_peft(source, linears, num_layers)
    num_experts, r, top_k = (
        resolve_per_layer(getattr(config, n), num_layers, n) for n in ("num_experts", "r", "top_k")
    )
    used = effective_top_k(num_experts, top_k)
    config.inference_mode = True
    config.base_model_type = model.config.model_type
    check_fits(model, config, tensors)
    if options.source_format == "published":
        notes += _computed_otherwise(model.config)
    notes = [*notes, *_other_base(config.base_model_name_or_path, base_model)]
    config.base_model_name_or_path = base_model
    with new_folder("output", output) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(folder), auto_mapping_dict=None)
    modules = adapted_modules(tensors)
    experts = sum(tensors[f"{module}.mola_A"].shape[0] for module in modules)
    return ConvertReport(
        output=output,
        num_experts=num_experts,
        top_k=used,
        r=r,
        lora_alpha=config.lora_alpha,
        tensors_read=2 * experts + len(modules),  # A and B of every expert, a router of every module
        tensors_written=len(tensors),
        target_modules=list(dict.fromkeys(module.rpartition(".")[2] for module in modules)),
        routers_dropped=sum(f"{module}.mola_router" not in tensors for module in modules),
        not_saved=not_saved,
        notes=notes,
    )


def _other_base(recorded: str | None, base_model: str) -> list[str]:
    if not recorded or model_name(recorded) == model_name(base_model):
        return []
    return [f"base model: {recorded} in the source, {base_model} in the output; are these the same weights?"]


def _computed_otherwise(config: Any) -> list[str]:
    """What the research code's own LLaMA leaves out of a base model in silence: the adapter was trained without it."""
    rope = getattr(config, "rope_parameters", None) or {}
    theta, kind = rope.get("rope_theta") or _ROPE_THETA, rope.get("rope_type", "default")
    found = [f"`rope_theta` {theta:g}"] if theta != _ROPE_THETA else []
    found += [f"`rope_type` {kind}"] if kind != "default" else []
    found += [f"`{name}`" for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    if not found:
        return []
    return [f"base model: the research code computes it without {', '.join(found)}; here outputs are others than there"]


def _read_published(
    source: Path, options: ConvertOptions, num_layers: int
) -> tuple[MolaConfig, dict[str, torch.Tensor]]:
    top_k = resolve_per_layer(str(options.top_k), num_layers, "top_k")
    config, tensors = read_published(source, top_k[0] if len(set(top_k)) == 1 else top_k)
    for name in ("num_experts", "r"):
        values = getattr(config, name)
        if len(values) != num_layers:
            raise MolaError(
                f"`{name}` in {options.source[0]!r} must have one entry per decoder layer: {len(values)} entries, "
                f"`base_model` {options.base_model!r} has {num_layers} layers. The adapter belongs to another base "
                "model."
            )
    return config, tensors


def _left_out(source: Path, config: MolaConfig, names: Collection[str]) -> list[str]:
    """What the file says and its tensors do not have; refused where the base model, of these `names`, has it."""
    settings, notes = read_settings(source), []
    listed, layers = len(settings["r"]), len(cast(list[int], config.r))
    if listed > layers:
        notes.append(f"r: {listed} numbers in the file, of which the first {layers} count there, one for each layer")
    targets = settings["target_modules"]
    listed_targets = targets if isinstance(targets, list) else []  # a text may be an expression
    absent = [name for name in listed_targets if name not in (config.target_modules or ())]
    if missing := [name for name in absent if name in names]:
        raise MolaError(
            f"`target_modules` in {str(source)!r} names {', '.join(missing)}, of which there are no tensors. The file "
            "is incomplete."
        )
    if absent:
        notes.append(f"target_modules: the base model has no {', '.join(map(repr, absent))}; not adapted there either")
    return notes


def to_published_code(options: ConvertOptions, output: Path) -> ConvertReport:
    """`mola convert --to published`; see `mola.exporting.convert.convert`."""
    source = Path(os.path.expanduser(options.source[0]))
    settings = read_settings(source)
    peft_type, found = settings.get("peft_type"), foreign_format(settings)
    if peft_type != "MOLA" or found:
        hint = f" To read it use --from {found}." if found else ""
        raise MolaError(
            f"`source` must be an adapter of mola for --to published, got peft_type {peft_type!r} in "
            f"{options.source[0]!r}{f', in the format {found!r}' if found else ''}.{hint}"
        )
    config: Any = MolaConfig.from_pretrained(str(source))
    tensors = read_tensors(source)
    published_settings, published = to_published(config, tensors)
    r = published_settings["r"]
    num_experts = resolve_per_layer(config.num_experts, len(r), "num_experts")
    top_k = effective_top_k(num_experts, resolve_per_layer(config.top_k, len(r), "top_k"))
    router = ("router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise")
    not_saved = {"top_k": top_k} | {name: value for name in router if (value := getattr(config, name))}
    if config.router_aux_loss_coef:
        not_saved["router_aux_loss_reduction"] = config.router_aux_loss_reduction
    with new_folder("output", output) as folder:
        text = json.dumps(published_settings, indent=2, sort_keys=True)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
        torch.save(published, folder / "adapter_model.bin")
    modules = len(adapted_modules(tensors))
    return ConvertReport(
        output=output,
        num_experts=num_experts,
        top_k=top_k,
        r=r,
        lora_alpha=config.lora_alpha,
        tensors_read=len(tensors),
        tensors_written=len(published),
        target_modules=published_settings["target_modules"],
        routers_added=modules - sum(key.endswith(".mola_router") for key in tensors),
        not_saved=not_saved,
        notes=_not_computed_there(config, tensors),
    )


def _not_computed_there(config: MolaConfig, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """That the base model is not the research code's own LLaMA, which has no grouped queries."""
    queries, values = (
        [each.shape[-1] for key, each in tensors.items() if key.endswith(tuple(f"{name}.mola_B" for name in names))]
        for names in (["q_proj"], ["k_proj", "v_proj"])
    )
    kind = config.base_model_type
    if queries and values and min(values) < min(queries):
        base = "grouped queries"
    elif kind not in (None, "llama"):
        base = f"the type {kind}"
    else:
        return []
    return [f"base model: the research code knows the first LLaMA only and cannot compute one with {base}"]
