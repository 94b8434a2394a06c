"""Reads adapters of MoE-PEFT (github.com/TUDB-Labs/MoE-PEFT) that were trained with its `mola` routing.

One folder with `adapter_config.json` (peft_type MOLA, a name it shares with this project; one number for
`num_experts`, `top_k` and `r`) and `adapter_model.bin`, whose keys name every expert separately:

    mola.layers.N.self_attn|mlp.LINEAR.experts.E.lora_A.weight     (r, in)
    mola.layers.N.self_attn|mlp.LINEAR.experts.E.lora_B.weight     (out, r)
    mola.layers.N.self_attn|mlp.LINEAR.moe_gate.weight             (E, in)

- The keys do not say where the decoder layers are; the names of the base model's modules do.
- `use_rslora` scales by `lora_alpha / sqrt(r)`, which is `lora_alpha * sqrt(r)` with mola's scale.
- `use_dora` has no effect in MoE-PEFT's mixture, and no magnitudes are saved: the experts are plain LoRA.
- Classification heads and MoE-PEFT's other methods are not supported.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mola.architecture.layer_names import PREFIX
from mola.checkpoints.adapter_folder import read_tensors
from mola.checkpoints.adapter_settings import read_settings
from mola.checkpoints.experts import group_experts
from mola.errors import MolaError
from mola.tuner import MolaConfig

_KEY = re.compile(
    r"(?P<module>mola\.layers\.(?:0|[1-9]\d{0,4})\.(?:self_attn|mlp)\.\w+)\."
    r"(?:experts\.(?P<expert>0|[1-9]\d{0,4})\.lora_(?P<part>[AB])|(?P<router>moe_gate))\.weight"
)
_EXPECTED = "mola.layers.N.self_attn.q_proj.experts.0.lora_A.weight and the like"

_REQUIRED = ("peft_type", "num_experts", "top_k", "r", "lora_alpha", "lora_dropout", "target_modules")
_ALSO_KNOWN = ("routing_strategy", "bias", "use_dora", "use_rslora", "base_model_name_or_path", "task_type")
# Training settings: they change the initialisation and the loss, not what a trained adapter computes.
_TRAINING_ONLY = ("lora_init", "router_init_range", "router_loss", "router_aux_loss_coef", "name", "task_name")
# Tasks that use the base model's own head.
_TASKS = ("CAUSAL_LM", "QUESTION_ANS", None)


class MoePeftAdapter(NamedTuple):
    """An adapter of MoE-PEFT in mola's terms."""

    config: MolaConfig  # for `get_peft_model`
    tensors: dict[str, torch.Tensor]  # a state dict in mola's layout
    training_only: dict[str, Any]  # settings that are not kept, because only training uses them
    notes: list[str]  # settings that are written differently from how they were read


def read_moe_peft(folder: str | Path, linears: Iterable[str]) -> MoePeftAdapter:
    """Read the adapter of MoE-PEFT in a folder. The caller checks that its tensors fit the base model.

    Args:
        folder: holds `adapter_config.json` and the weights.
        linears: names of all linears of the base model, as in `named_modules()`.

    Raises:
        MolaError: a file is missing or unreadable, belongs to a different method or to a classifier, or is incomplete;
            or the base model has different linears.
    """
    folder, linears = Path(folder), list(linears)
    path = folder / "adapter_config.json"
    settings = read_settings(folder)
    _check_settings(settings, path)
    experts = group_experts(read_tensors(folder), _KEY, "MoE-PEFT's mola format", _EXPECTED)
    state_dict: dict[str, torch.Tensor] = {}
    modules = {module: _locate(module.removeprefix("mola."), linears) for module in experts}
    for module, found in experts.items():
        state_dict.update(found.stack(f"{PREFIX}{modules[module]}"))
    adapted = sorted({_last_part(module) for module in modules.values()})
    lora_alpha, notes = _scale(settings)
    if settings.get("task_type") != "CAUSAL_LM":
        notes.append(f"task_type: {settings.get('task_type')} is written as CAUSAL_LM, the head is the same")
    notes += _check_targets(settings["target_modules"], adapted, {_last_part(name) for name in linears}, path)
    config = MolaConfig(
        r=settings["r"],
        num_experts=settings["num_experts"],
        top_k=settings["top_k"],
        lora_alpha=lora_alpha,
        lora_dropout=settings["lora_dropout"],
        target_modules=adapted,
        task_type="CAUSAL_LM",
        base_model_name_or_path=settings.get("base_model_name_or_path"),
    )
    return MoePeftAdapter(config, state_dict, {k: settings[k] for k in _TRAINING_ONLY if k in settings}, notes)


def _check_settings(settings: Mapping[str, Any], path: Path) -> None:
    if settings.get("peft_type") != "MOLA":
        raise MolaError(
            f"`peft_type` in {path} must be 'MOLA', got {settings.get('peft_type')!r}. MoE-PEFT's other methods cannot "
            "be converted; its plain LoRA has PEFT's own format and needs no conversion."
        )
    unknown = sorted(set(settings) - {*_REQUIRED, *_ALSO_KNOWN, *_TRAINING_ONLY})
    missing = [name for name in _REQUIRED if name not in settings]
    if unknown or missing:
        raise MolaError(
            f"{path} is not as MoE-PEFT writes it: {missing or 'nothing'} missing, {unknown or 'nothing'} unknown. "
            "An adapter that mola wrote also has the type MOLA; it needs no conversion."
        )
    for name, wanted in (("routing_strategy", "mola"), ("bias", "none")):
        if settings.get(name, wanted) != wanted:
            raise MolaError(f"`{name}` in {path} must be {wanted!r}, got {settings[name]!r}: it cannot be converted.")
    if settings.get("task_type") not in _TASKS:
        raise MolaError(
            f"`task_type` in {path} must be one of {[name for name in _TASKS if name]}, got {settings['task_type']!r}. "
            "An adapter of a classifier cannot be converted."
        )


def _locate(module: str, linears: Iterable[str]) -> str:
    """The name in the base model of the linear that MoE-PEFT calls `layers.N.BLOCK.LINEAR`."""
    found = [name for name in linears if name == module or name.endswith("." + module)]
    if len(found) != 1:
        count = f"{len(found)} of them ({', '.join(found)})" if found else "none"
        raise MolaError(
            f"`base_model` must have one linear {module!r}, like the adapter: it has {count}. Pass the adapter's base "
            "model. Adapters of ChatGLM, for which MoE-PEFT has names of its own, cannot be converted."
        )
    return found[0]


def _scale(settings: Mapping[str, Any]) -> tuple[float, list[str]]:
    """The `lora_alpha` that gives the adapter's scale as `lora_alpha / r`, and notes about the scale."""
    alpha, notes = settings["lora_alpha"], []
    if settings.get("use_rslora"):
        notes.append(f"use_rslora: lora_alpha {alpha} / sqrt(r) is written as lora_alpha {alpha} * sqrt(r) / r")
        alpha = alpha * math.sqrt(settings["r"])
    if settings.get("use_dora"):
        notes.append("use_dora: MoE-PEFT's mixture does not apply it and saves no magnitudes; experts are plain LoRA")
    return alpha, notes


def _check_targets(targets: list[str], adapted: list[str], linears: Collection[str], path: Path) -> list[str]:
    extra = sorted(set(adapted) - set(targets))
    missing = sorted(set(targets) & set(linears) - set(adapted))
    if extra or missing:
        raise MolaError(
            f"`target_modules` in {path} and the weights disagree: {extra or 'no linears'} with experts that it does "
            f"not name, {missing or 'no linears'} without experts that it names. The file is incomplete or changed."
        )
    # MoE-PEFT accepts the names of all its architectures and ignores those that a model does not have.
    if absent := sorted(set(targets) - set(linears)):
        return [f"target_modules: the base model has no {', '.join(absent)}; MoE-PEFT does not adapt them either"]
    return []


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
