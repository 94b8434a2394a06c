"""`mola convert --from lora`: LoRA adapters become the experts of a mixture."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn

from mola.checkpoints.tensors import read_settings
from mola.errors import MolaError
from mola.exporting.calibration import read_data, read_task, seen_rows
from mola.exporting.lora_files import Factors, read_lora, targets
from mola.exporting.mixtures import mola_layers
from mola.exporting.options import ConvertOptions
from mola.exporting.routers import Routers, fit_routers
from mola.files.atomic import new_folder
from mola.files.digests import WEIGHTS_FILE
from mola.models.adapters import warn_other_base
from mola.models.loading import load_model
from mola.models.meta import model_on_meta
from mola.models.prompts import hand_on_prompts, own_chat, trained_template
from mola.options.fields import check_seed
from mola.tuner import MolaConfig
from mola.tuner.initialization import initialize
from mola.tuner.layer import MolaLinear
from mola.tuner.loading import PREFIX


@dataclass(frozen=True)
class MixtureReport:
    """A mixture made of LoRA adapters.

    Attributes:
        output: the folder written.
        adapters: the LoRA adapters, in the order of their experts.
        num_experts: experts of each adapted linear.
        r: rank of each expert, the largest of the adapters'.
        lora_alpha: numerator of the scale.
        right: with fitted routers, by linear: the share of held-out tokens whose first choice is the expert of their
            own adapter.
        notes: what the reader of the report should know.
    """

    output: Path
    adapters: list[str]
    num_experts: dict[str, int]
    r: int
    lora_alpha: float
    right: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = sorted(set(self.num_experts.values()))
        routers = "fresh"
        if self.right:
            routers = f"fitted; right first choice for {fmean(self.right.values()):.1%} of held-out tokens"
        lines = [
            f"experts    {', '.join(map(str, counts))} in {len(self.num_experts)} linears",
            f"the first  {', '.join(self.adapters)}",
            f"r          {self.r}",
            f"lora_alpha {self.lora_alpha:g}",
            f"routers    {routers}",
            *(f"note       {note}" for note in self.notes),
        ]
        return "\n".join([*lines, f"written to {self.output}"])


def from_lora(options: ConvertOptions, output: Path) -> MixtureReport:
    """Make a mixture; see `mola.exporting.convert.convert`."""
    base_model, sources = str(options.base_model), [os.path.expanduser(source) for source in options.source]
    check_seed(options.seed)
    if not 0 <= options.noise < math.inf:
        raise MolaError(f"`noise` must be at least 0, got {options.noise}. Pass 0 for equal copies.")
    loras = [read_lora(Path(source), _on_meta(options)) for source in sources]
    base = _on_meta(options)
    model: Any = get_peft_model(base, _config(options, loras, base))
    config, layers = model.peft_config["default"], mola_layers(model)  # with notations as plain numbers
    _check_room(layers, len(loras))
    if options.noise != ConvertOptions.noise and all(
        layer.num_experts["default"] == len(loras) for layer in layers.values()
    ):
        raise MolaError(f"`noise` ({options.noise}) is of copies, and every adapter is one expert. Leave it out.")
    if options.data is None:  # else they are loaded, which says so too
        for source in sources:
            warn_other_base(base_model, source, read_settings(Path(source)))
    notes: list[str] = []
    routers = _fitted(options, sources, [name.removeprefix(PREFIX) for name in layers], notes)
    tensors: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        for name, layer in layers.items():
            module = name.removeprefix(PREFIX)
            found = [lora.get(module) for lora in loras]
            row = None if routers is None else routers.weights.get(module)
            parts = _experts(found, layer, config, options.noise, row)
            tensors |= {f"{name}.mola_{part}": value for part, value in parts.items() if value is not None}
    for number, lora in enumerate(loras):
        if missing := len(layers) - len(lora):
            notes.append(f"{options.source[number]} does not adapt {missing} linears: its expert starts at zero there")
    if routers is not None and (unseen := len(layers) - len(routers.weights)):
        notes.append(f"{unseen} linears saw no token: their routers are fresh")
    is_one_way = len({(trained_template(source), own_chat(source)) for source in sources}) == 1
    if not is_one_way:
        notes.append("the adapters were trained in different prompts: the mixture's folder names none")
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    with new_folder("output", output) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(folder), auto_mapping_dict=None)
        if is_one_way:
            hand_on_prompts(sources[0], folder)
    return MixtureReport(
        output,
        list(options.source),
        {name.removeprefix(PREFIX): layer.num_experts["default"] for name, layer in layers.items()},
        config.r,
        config.lora_alpha,
        {} if routers is None else routers.right,
        notes,
    )


def _on_meta(options: ConvertOptions) -> nn.Module:
    return model_on_meta(str(options.base_model), options.trust_remote_code)


def _config(options: ConvertOptions, loras: Sequence[Mapping[str, Factors]], base: Any) -> MolaConfig:
    """One rank and one scale for all experts; a scale that all adapters have is kept."""
    factors = [each for lora in loras for each in lora.values()]
    rank = max(each.A.shape[0] for each in factors)
    names = list(dict.fromkeys(name for lora in loras for name in lora))
    return MolaConfig(
        r=rank,
        num_experts=options.num_experts,
        top_k=options.top_k,
        lora_alpha=next((each.scaling for each in factors if each.scaling > 0), 1.0) * rank,
        target_modules=targets(names, base),
        task_type="CAUSAL_LM",
        base_model_type=base.config.model_type,
    )


def _check_room(layers: Mapping[str, MolaLinear], count: int) -> None:
    for name, layer in layers.items():
        if (has := layer.num_experts["default"]) < count:
            raise MolaError(
                f"`num_experts` must be at least {count}, one for each adapter: {name.removeprefix(PREFIX)!r} has "
                f"{has}. Raise it, such as --num_experts {count}{',' if count > 9 else ''}, or leave adapters out."
            )


def _experts(
    found: Sequence[Factors | None], layer: MolaLinear, config: Any, noise: float, router: torch.Tensor | None
) -> dict[str, torch.Tensor | None]:
    """A, B and router of one module."""
    num_experts = layer.num_experts["default"]
    A = torch.empty(num_experts, config.r, layer.in_features)
    B = torch.empty(num_experts, config.r, layer.out_features)
    rows = torch.empty(num_experts, layer.in_features) if num_experts > 1 else None
    initialize(True, A, B, rows, nn.Identity())
    for expert in range(num_experts):
        source = found[expert % len(found)]
        if source is not None:
            rank = source.A.shape[0]
            # Beyond its rank A stays random and B zero: nothing is added, and both can be trained.
            A[expert, :rank] = source.A
            B[expert, :rank] = source.B.t() * (source.scaling * config.r / config.lora_alpha)
            if expert >= len(found):
                for part in (A[expert, :rank], B[expert, :rank]):
                    part += noise * part.std(correction=0) * torch.randn_like(part)
    if rows is not None and router is not None:
        # Copies of an adapter share its tokens by what they had at random.
        own = torch.tensor([expert < len(found) for expert in range(num_experts)]).unsqueeze(1)
        which = torch.arange(num_experts) % len(found)
        rows = router.float()[which] + rows.masked_fill(own, 0.0)
    return {"A": A, "B": B, "router": rows}


def _fitted(
    options: ConvertOptions, sources: Sequence[str], modules: Sequence[str], notes: list[str]
) -> Routers | None:
    """Routers fitted to `data`; None without. What is left out of it joins the notes."""
    task = read_task(options)
    if options.data is None or task is None:
        return None
    if len(options.data) != len(sources) or len(sources) < 2:
        raise MolaError(
            f"`data` must name one file for each of at least two adapters: got {len(options.data)} for {len(sources)}. "
            "Routers learn from them which adapter is whose; leave it out for fresh ones."
        )
    data = [read_data(options, path, task, source) for path, source in zip(options.data, sources, strict=True)]
    left_out = {path: each.too_long for path, each in zip(options.data, data, strict=True) if each.too_long}
    notes += [f"{count} rows of {path} left out: too long" for path, count in left_out.items()]
    notes += seen_rows(dict(zip(options.data, data, strict=True)))
    names = {str(number): source for number, source in enumerate(sources)}
    model: Any = load_model(str(options.base_model), names, options.dtype, options.device, options.trust_remote_code)
    linears = dict(model.named_modules())
    return fit_routers(model, {name: linears[f"{PREFIX}{name}"] for name in modules}, data, options.memory_gb)
