"""`mola convert`: adapters of the paper's research code and of MoE-PEFT to mola's format, and back to the former.

    mola convert ./scienceqa_mola --from published --base_model my-model --top_k 2 --output adapter
    mola convert ./moe_peft_adapter --from moe_peft --base_model my-model --output adapter
    mola convert adapter --to published --output for_the_research_code

The output folder appears in one step, complete; a folder with something in it is refused.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mola.architecture.allocation import effective_top_k
from mola.architecture.notation import resolve_per_layer
from mola.architecture.targets import adaptable
from mola.checkpoints.conversion_report import ConvertReport
from mola.checkpoints.formats import foreign_format
from mola.checkpoints.moe_peft import read_moe_peft
from mola.checkpoints.published import read_published
from mola.checkpoints.published_writer import to_published
from mola.checkpoints.tensors import adapted_modules, read_settings, read_tensors
from mola.errors import MolaError
from mola.files.folders import check_new_folder, new_folder
from mola.models.adapters import check_fits
from mola.models.meta import count_decoder_layers, model_on_meta
from mola.options.fields import option
from mola.tuner import MolaConfig

__all__ = ["ConvertOptions", "ConvertReport", "convert", "main"]

SOURCE_FORMATS = ("published", "moe_peft")
TARGET_FORMATS = ("published",)


@dataclass
class ConvertOptions:
    """Options of `mola convert`."""

    source: str = field(metadata={"help": "Folder of the adapter to convert."})
    output: str = field(metadata={"help": "Folder to write; it must not exist or be empty."})
    source_format: str | None = option(
        None,
        "Format of the source, to convert it to mola's: 'published' is the research code's, 'moe_peft' MoE-PEFT's with "
        "mola routing. Also written --from.",
        aliases=["--from"],
    )
    target_format: str | None = option(
        None,
        "Format to convert an adapter of mola to: 'published' is the research code's. Also written --to.",
        aliases=["--to"],
    )
    base_model: str | None = option(
        None,
        "With --from: the adapter's base model, a folder or a name on the hub; only its config.json is read, to check "
        "every shape.",
    )
    top_k: str | None = option(
        None,
        "With --from published: experts per token the adapter was trained with, which its files do not say: an "
        "integer, or one per layer between commas.",
    )
    trust_remote_code: bool = option(False, "Run code that comes with the base model; only for sources you trust.")


def convert(options: ConvertOptions) -> ConvertReport:
    """Convert an adapter, in the direction that `source_format` or `target_format` gives.

    Args:
        options: see `ConvertOptions`.

    Returns:
        What was read and written.

    Raises:
        MolaError: the options contradict each other, the output folder is not empty, the source is
            unreadable or incomplete, does not fit the base model, or cannot be expressed.
    """
    _check_formats(options)
    if not os.path.isdir(os.path.expanduser(options.source)):
        raise MolaError(f"`source` must be the folder of an adapter, there is none at {options.source!r}.")
    output = check_new_folder("output", options.output)
    return _to_mola(options, output) if options.source_format else _to_published(options, output)


def main(options: ConvertOptions) -> int:
    """Convert and print the report; returns 0, the exit code."""
    print(convert(options))
    return 0


def _check_formats(options: ConvertOptions) -> None:
    if (options.source_format is None) == (options.target_format is None):
        raise MolaError(
            f"exactly one of `--from` and `--to` must be given, got {options.source_format!r} and "
            f"{options.target_format!r}. Write --from published or --from moe_peft to get an adapter of mola, "
            "--to published to get one for the research code."
        )
    for name, value, known in (
        ("--from", options.source_format, SOURCE_FORMATS),
        ("--to", options.target_format, TARGET_FORMATS),
    ):
        if value is not None and value not in known:
            raise MolaError(f"`{name}` must be {' or '.join(map(repr, known))}, got {value!r}.")
    if options.source_format and options.base_model is None:
        raise MolaError("`base_model` must be given with --from: its config.json says whether the shapes fit.")
    if options.source_format == "published" and options.top_k is None:
        raise MolaError(
            "`top_k` must be given with --from published: the files do not hold it, and a wrong one gives "
            "other outputs without an error. Pass the value of the training command, such as --top_k 2."
        )
    if options.source_format == "moe_peft" and options.top_k is not None:
        raise MolaError(
            f"`top_k` is only for --from published, got {options.top_k!r}: an adapter of MoE-PEFT holds its own. "
            "Leave it out."
        )
    for name in ("base_model", "top_k"):
        if options.target_format and getattr(options, name) is not None:
            raise MolaError(
                f"`{name}` is only for --from, got {getattr(options, name)!r}: an adapter of mola holds what "
                "--to needs. Leave it out."
            )


def _to_mola(options: ConvertOptions, output: Path) -> ConvertReport:
    source, base_model = Path(os.path.expanduser(options.source)), str(options.base_model)
    found = foreign_format(read_settings(source))
    if found not in (None, options.source_format):
        raise MolaError(
            f"`--from` must be the format of the source, got {options.source_format!r}: {options.source!r} is in the "
            f"format {found!r}. Pass --from {found}."
        )
    model = model_on_meta(base_model, options.trust_remote_code)
    num_layers = count_decoder_layers(model, base_model)
    not_saved: dict[str, Any] = {}
    notes: list[str] = []
    if options.source_format == "published":
        config, tensors = _read_published(source, options, num_layers)
    else:
        linears = [name for name, module in model.named_modules() if adaptable(module)]
        config, tensors, not_saved, notes = read_moe_peft(source, linears, num_layers)
    num_experts, r, top_k = (
        resolve_per_layer(getattr(config, n), num_layers, n) for n in ("num_experts", "r", "top_k")
    )
    used = effective_top_k(num_experts, top_k)
    config.inference_mode = True
    config.base_model_type = model.config.model_type
    check_fits(model, config, tensors)
    notes = [*notes, *_other_base(config.base_model_name_or_path, base_model)]
    config.base_model_name_or_path = base_model
    with new_folder("output", output) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(folder))
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
    # Folders move and hub ids lose their owner: only the last part says which model it is.
    if not recorded or Path(recorded).name == Path(base_model).name:
        return []
    return [f"base model: {recorded} in the source, {base_model} in the output; are these the same weights?"]


def _read_published(
    source: Path, options: ConvertOptions, num_layers: int
) -> tuple[MolaConfig, dict[str, torch.Tensor]]:
    top_k = resolve_per_layer(str(options.top_k), num_layers, "top_k")
    config, tensors = read_published(source, top_k[0] if len(set(top_k)) == 1 else top_k)
    for name in ("num_experts", "r"):
        values = getattr(config, name)
        if len(values) != num_layers:
            raise MolaError(
                f"`{name}` in {options.source!r} must have one entry per decoder layer: {len(values)} entries, "
                f"`base_model` {options.base_model!r} has {num_layers} layers. The adapter belongs to another base "
                "model."
            )
    return config, tensors


def _to_published(options: ConvertOptions, output: Path) -> ConvertReport:
    source = Path(os.path.expanduser(options.source))
    settings = read_settings(source)
    peft_type, found = settings.get("peft_type"), foreign_format(settings)
    if peft_type != "MOLA" or found:
        hint = f" To read it use --from {found}." if found else ""
        raise MolaError(
            f"`source` must be an adapter of mola for --to published, got peft_type {peft_type!r} in "
            f"{options.source!r}{f', in the format {found!r}' if found else ''}.{hint}"
        )
    config: Any = MolaConfig.from_pretrained(str(source))
    tensors = read_tensors(source)
    published_settings, published = to_published(config, tensors)
    r = published_settings["r"]
    num_experts = resolve_per_layer(config.num_experts, len(r), "num_experts")
    top_k = effective_top_k(num_experts, resolve_per_layer(config.top_k, len(r), "top_k"))
    router = ("router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise")
    not_saved = {"top_k": top_k} | {name: value for name in router if (value := getattr(config, name))}
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
    )
