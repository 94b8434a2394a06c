"""`mola reallocate`: changes the numbers of experts of a trained adapter, for further training.

    mola reallocate --adapter runs/first --num_experts allocation.json --output runs/moved
    mola train --adapter runs/moved --base_model my-model --data data.json --output runs/second

The command reads and writes adapter folders only. `mola.allocation.resize` changes the experts of a module.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from safetensors.torch import save_file

from mola.allocation.options import ReallocateOptions
from mola.allocation.probe import check_mixture, read_routing_records
from mola.allocation.resize import Experts, resize
from mola.architecture.allocation import check_top_k, effective_top_k
from mola.architecture.layer_names import PREFIX, layer_index
from mola.architecture.layer_stacks import LayerStacks
from mola.architecture.notation import (
    LARGEST_PLAIN_NUM_EXPERTS,
    list_length,
    pattern_with,
    resolve_per_layer,
)
from mola.checkpoints.adapter_folder import adapted_modules, read_tensors
from mola.errors import MolaError
from mola.files.atomic import check_new_folder, write_new_folder
from mola.files.digests import WEIGHTS_FILE
from mola.files.reading import read_json_object
from mola.files.terminal import make_table_console
from mola.models.base_model import read_config
from mola.models.meta import count_decoder_layers, model_on_meta
from mola.models.prompts import hand_on_prompts
from mola.options.command_line import command_line, next_steps
from mola.options.fields import check_seed
from mola.tuner import MolaConfig

_RUN_FILE = "run.json"  # in the folder of an adapter that `mola train` made
_DATA_SETTINGS = (  # of a training: they decide which samples it reads, and how they become tokens
    "data",
    "task",
    "template",
    "train_split",
    "eval_data",
    "eval_split",
    "validation_size",
    "filters",
    "limit",
    "eval_limit",
    "cutoff_len",
    "truncation",
)


@dataclass(frozen=True)
class ReallocateResult:
    """Report about the new adapter. Lists have one entry per decoder layer, lowest first.

    Attributes:
        output_dir: the new folder.
        before: numbers of experts of the adapter that was read.
        num_experts: numbers of experts of the new adapter.
        top_k: experts used per token.
        is_adapted: whether the layer has experts; if not, its numbers have no meaning.
        unchanged: number of modules whose tensors are the same.
        modules: number of adapted modules.
    """

    output_dir: str
    before: list[int]
    num_experts: list[int]
    top_k: list[int]
    is_adapted: list[bool]
    unchanged: int
    modules: int


def reallocate(options: ReallocateOptions) -> ReallocateResult:
    """Change the numbers of experts in the layers of a trained adapter.

    Args:
        options: see `ReallocateOptions`.

    Raises:
        MolaError: the adapter is no mixture, the numbers do not fit it, or the output folder holds files.
    """
    check_mixture(options.adapter)
    output = check_new_folder("output_dir", options.output_dir)
    check_seed(options.seed)
    config: Any = MolaConfig.from_pretrained(options.adapter)
    if config.num_experts_pattern:
        raise MolaError(
            f"`adapter` must have one number of experts per layer: {options.adapter!r} has `num_experts_pattern` "
            f"{config.num_experts_pattern!r}. Train an adapter without."
        )
    if pattern_with(options.num_experts, None):
        raise MolaError(
            f"`num_experts` must have one number per layer: {options.num_experts!r} has `num_experts_pattern`. Make "
            "the file without --per_module."
        )
    tensors = read_tensors(Path(options.adapter))
    base = _read_base(config, options)
    layers, is_certain = _layer_of_modules(tensors, options.adapter, None if base is None else base.model)
    adapted = 1 + max((layer for layer in layers.values() if layer is not None), default=0)
    known = _depth_from_lists(config, options, adapted) if base is None else base.num_layers
    num_layers = known or adapted
    if num_layers < adapted:
        raise MolaError(
            f"`base_model` must be the adapter's base model: {options.base_model!r} has {num_layers} decoder layers, "
            f"{options.adapter!r} has experts in {adapted}."
        )
    before = resolve_per_layer(config.num_experts, num_layers, "num_experts")
    after = resolve_per_layer(options.num_experts, num_layers, "num_experts")
    top_k = _choose_top_k(config, options, before, after)
    if len({*after}) > 1 or len({*top_k}) > 1:
        _check_layers_are_known(options.adapter, layers, is_certain and known is not None)
    use = {} if options.inspection is None else _read_use(options.inspection, layers, tensors)
    numbers = {module: after[0] if layer is None else after[layer] for module, layer in layers.items()}
    resized, unchanged = _resize_modules(tensors, numbers, options.seed, use)
    config.num_experts, config.top_k = _compact(after), _compact(top_k)
    if config.init_lora_weights == "principal" and any(new > old for old, new in zip(before, after, strict=True)):
        config.init_lora_weights = True  # a layer may have too few principal components for more experts
    with write_new_folder("output_dir", output) as folder:
        save_file(resized, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(folder), auto_mapping_dict=None)
        hand_on_prompts(options.adapter, folder)
    adapted_layers = set(layers.values())
    is_adapted = [None in adapted_layers or layer in adapted_layers for layer in range(num_layers)]
    return ReallocateResult(
        str(output), before, after, effective_top_k(after, top_k), is_adapted, unchanged, len(layers)
    )


def _resize_modules(
    tensors: Mapping[str, torch.Tensor], num_experts_of: Mapping[str, int], seed: int, usage: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], int]:
    """Give each module in `num_experts_of` that many experts; `usage` says how often each expert is used.

    Returns all tensors of the adapter, and how many modules are unchanged.
    """
    generator = torch.Generator().manual_seed(seed)
    resized, unchanged = dict(tensors), 0
    for module, num_experts in num_experts_of.items():
        key = f"{PREFIX}{module}"
        experts = Experts(tensors[f"{key}.mola_A"], tensors[f"{key}.mola_B"], tensors.get(f"{key}.mola_router"))
        result = resize(experts, num_experts, generator, usage.get(module))
        unchanged += result is experts
        for part, tensor in zip(("mola_A", "mola_B", "mola_router"), result, strict=True):
            resized.pop(f"{key}.{part}", None)
            if tensor is not None:
                resized[f"{key}.{part}"] = tensor
    return resized, unchanged


def main(options: ReallocateOptions) -> int:
    """Run the command and print the numbers of every layer. Returns 0, the exit code."""
    result = reallocate(options)
    table = Table(title="Experts per decoder layer")
    for column in ("layer", "before", "now", "top_k"):
        table.add_column(column, justify="right")
    all_numbers = list(zip(result.before, result.num_experts, result.top_k, strict=True))
    adapted = [numbers for numbers, has in zip(all_numbers, result.is_adapted, strict=True) if has]
    for layer, (numbers, has) in enumerate(zip(all_numbers, result.is_adapted, strict=True)):
        table.add_row(str(layer), *map(str, numbers if has else "---"))
    table.add_section()
    totals = (sum(before for before, _, _ in adapted), sum(now for _, now, _ in adapted))
    table.add_row("total", *map(str, totals), "", style="bold")
    make_table_console().print(table)
    print(f"{result.unchanged} of {result.modules} modules are unchanged. Written to {result.output_dir}.")
    command = _training_command(options, result.output_dir)
    print(next_steps(command))
    if " --data DATA " in command:
        print("DATA stands for your training data.")
    return 0


def _training_command(options: ReallocateOptions, adapter: str) -> str:
    """The command that trains the new adapter further, on the data of the run that made the old one.

    Without such a run, the data are the placeholder DATA.
    """
    settings = {"data": "DATA", **read_json_object(Path(options.adapter) / _RUN_FILE).get("settings", {})}
    own_base = MolaConfig.from_pretrained(adapter).base_model_name_or_path
    model = {
        "adapter": adapter,
        "base_model": options.base_model or (None if own_base else settings.get("base_model")),
        "trust_remote_code": options.trust_remote_code,
    }
    data = {name: settings.get(name) for name in _DATA_SETTINGS}
    usual = {"truncation": "error", "train_split": "train", "eval_split": "validation"}
    data = {name: value for name, value in data.items() if value != usual.get(name)}
    return command_line("train", {**model, **data, "output": f"{adapter.rstrip('/')}-trained"})


class _Base(NamedTuple):
    model: Any  # without weights
    num_layers: int  # decoder layers


def _read_base(config: Any, options: ReallocateOptions) -> _Base | None:
    """The base model; None if no option names it and its folder is missing, or if it is an encoder-decoder."""
    name = options.base_model or config.base_model_name_or_path
    if options.base_model is None and not (name and os.path.isdir(name)):
        return None  # a name on the Hub may be missing
    try:
        if getattr(read_config(name, options.trust_remote_code), "is_encoder_decoder", False):
            return None  # only the decoder would be built
        model = model_on_meta(name, options.trust_remote_code)
        return _Base(model, count_decoder_layers(model, name))
    except MolaError:
        if options.base_model is None:
            return None
        raise


def _layer_of_modules(
    tensors: Mapping[str, torch.Tensor], adapter: str, base: Any
) -> tuple[dict[str, int | None], bool]:
    """Find the decoder layer of every adapted module.

    Returns:
        Module name -> layer, None outside the layers; and whether the layers are certain. Without the base model, the
        layers come from the numbers in the names and are not certain if the model may have several stacks of layers.
    """
    names = [key.removeprefix(PREFIX) for key in adapted_modules(tensors)]
    if not names:
        raise MolaError(
            f"`adapter` must have experts on linears: {adapter!r} has only `target_parameters`, with one "
            "LoRA for each, and no number to change."
        )
    stacks_in_names = {part for name in names for part in name.split(".") if part in ("encoder", "decoder")}
    if len(stacks_in_names) > 1:
        raise MolaError(
            f"`adapter` must belong to a model with one stack of layers: {adapter!r} adapts an encoder and a "
            "decoder, which number their layers separately."
        )
    if base is not None and {name for name, _ in base.named_modules()}.issuperset(names):
        stacks = LayerStacks.of(base)
        return {name: stacks.index(name) for name in names}, True
    layers = {name: layer_index(name) for name in names}
    lists = {name.split(f".{index}.")[0] for name, index in layers.items() if index is not None}
    return layers, len(lists) <= 1 and not stacks_in_names


def _depth_from_lists(config: Any, options: ReallocateOptions, adapted: int) -> int | None:
    """Number of decoder layers by a list with one entry per layer, of at least `adapted` layers; None without one."""
    lengths = [list_length(getattr(config, name), name) for name in ("num_experts", "top_k", "r")]
    requested = list_length(options.num_experts, "num_experts")
    if requested is not None and requested >= adapted:
        lengths.append(requested)
    return next((length for length in lengths if length is not None), None)


def _check_layers_are_known(adapter: str, layers: Mapping[str, int | None], is_known: bool) -> None:
    """Raise if numbers that differ by layer cannot be assigned to layers."""
    if not is_known:
        raise MolaError(
            f"`base_model` is needed to know which layers the numbers are for: {adapter!r} does not name all "
            "layers, or its model may have several stacks of layers. Pass its base model, which may not be an "
            "encoder-decoder, or one number for all layers."
        )
    outside = [module for module, layer in layers.items() if layer is None]
    if outside:
        raise MolaError(
            f"`num_experts` must be one number for all layers: {adapter!r} adapts {outside[0]!r}, which is in no layer."
        )


def _choose_top_k(config: Any, options: ReallocateOptions, before: Sequence[int], after: Sequence[int]) -> list[int]:
    given = config.top_k if options.top_k is None else options.top_k
    top_k = resolve_per_layer(given, len(after), "top_k")
    if options.top_k is None and isinstance(given, list):
        # A layer without a router has 1. If the layer gets a router, it gets the other layers' largest number.
        largest = max(top_k)
        top_k = [min(largest, new) if old == 1 else k for k, old, new in zip(top_k, before, after, strict=True)]
        top_k = [1 if new == 1 else k for k, new in zip(top_k, after, strict=True)]
    try:
        check_top_k(after, top_k)
    except MolaError as error:
        raise MolaError(f"{error} Or pass `top_k` as well.") from error
    return top_k


def _read_use(
    inspection: str, layers: Mapping[str, int | None], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The mean gates of every module; raises if a module's gates do not fit its number of experts."""
    records, source = read_routing_records(None, inspection)
    gates = {record["module"].removeprefix(PREFIX): torch.tensor(record["mean_gates"]) for record in records}
    for module in layers:
        count = len(tensors[f"{PREFIX}{module}.mola_A"])
        if count > 1 and len(gates.get(module, ())) != count:
            found = f"{len(gates[module])} experts" if module in gates else "nothing"
            raise MolaError(
                f"`inspection` must be made from `adapter`: {source} has {found} of {module!r}, which has {count}. Run "
                "`mola inspect --json FILE` on this adapter."
            )
    return {module: values for module, values in gates.items() if module in layers}


def _compact(values: list[int]) -> int | list[int]:
    # A larger single number would be read as a sequence of digits.
    return values[0] if len(set(values)) == 1 and values[0] <= LARGEST_PLAIN_NUM_EXPERTS else values
