"""`mola convert --from lora`: LoRA adapters become the experts of a mixture."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn

from mola.architecture.layer_names import PREFIX
from mola.checkpoints.adapter_settings import read_settings
from mola.errors import MolaError
from mola.exporting.calibration import note_overlaps, read_data
from mola.exporting.lora_files import Factors, read_lora
from mola.exporting.mixtures import mola_layers
from mola.exporting.options import ConvertOptions
from mola.exporting.routers import Routers, fit_routers
from mola.files.atomic import write_new_folder
from mola.files.digests import WEIGHTS_FILE
from mola.models.adapters import warn_other_base
from mola.models.loading import load_model
from mola.models.lora_config import choose_target_names
from mola.models.meta import model_on_meta
from mola.models.prompts import hand_on_prompts, own_chat, trained_template
from mola.options.fields import check_seed
from mola.tuner import MolaConfig
from mola.tuner.initialization import initialize
from mola.tuner.layer import MolaLinear


@dataclass(frozen=True)
class MixtureReport:
    """Report about a mixture made from LoRA adapters.

    Attributes:
        output: the folder written.
        adapters: the LoRA adapters, in the order of their experts.
        num_experts: experts of each adapted linear.
        r: rank of each expert, which is the adapters' largest rank.
        lora_alpha: numerator of the scale.
        right: with fitted routers, for each linear the share of held-out tokens for which the router prefers the
            expert of the adapter that the token's data belong to.
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
            routers = f"fitted; correct first choice for {fmean(self.right.values()):.1%} of held-out tokens"
        lines = [
            f"experts    {', '.join(map(str, counts))} in {len(self.num_experts)} linears",
            f"the first  {', '.join(self.adapters)}",
            f"r          {self.r}",
            f"lora_alpha {self.lora_alpha:g}",
            f"routers    {routers}",
            *(f"note       {note}" for note in self.notes),
        ]
        return "\n".join([*lines, f"written to {self.output}"])


def convert_from_lora(options: ConvertOptions, output: Path) -> MixtureReport:
    """Run `mola convert --from lora`; see `mola.exporting.convert.convert`."""
    base_model, sources = str(options.base_model), [os.path.expanduser(source) for source in options.source]
    check_seed(options.seed)
    if not 0 <= options.noise < math.inf:
        raise MolaError(f"`noise` must be at least 0, got {options.noise}. Pass 0 for equal copies.")
    loras = [read_lora(Path(source), model_on_meta(base_model, options.trust_remote_code)) for source in sources]
    base = model_on_meta(base_model, options.trust_remote_code)
    model: Any = get_peft_model(base, _make_config(options, loras, base))
    config = model.peft_config["default"]  # with plain numbers instead of notations
    layers = {name.removeprefix(PREFIX): layer for name, layer in mola_layers(model).items()}
    num_experts = {name: layer.num_experts["default"] for name, layer in layers.items()}
    _check_num_experts(num_experts, len(loras), options.noise)
    if options.data is None:  # with data the adapters are loaded, and loading warns too
        for source in sources:
            warn_other_base(base_model, source, read_settings(Path(source)))
    notes: list[str] = []
    routers = _fit_routers(options, sources, layers, notes)
    tensors = _make_tensors(options, layers, loras, config, routers.weights if routers else {})
    for source, lora in zip(options.source, loras, strict=True):
        if missing := len(layers) - len(lora):
            notes.append(f"{source} does not adapt {missing} linears: in these, its expert starts at zero")
    if routers and (unreached := len(layers) - len(routers.weights)):
        notes.append(f"{unreached} linears got no token: their routers are fresh")
    has_one_prompt = len({(trained_template(source), own_chat(source)) for source in sources}) == 1
    if not has_one_prompt:
        notes.append("the adapters were trained with different prompts: the mixture's folder names none")
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    with write_new_folder("output", output) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(folder), auto_mapping_dict=None)
        if has_one_prompt:
            hand_on_prompts(sources[0], folder)
    right = routers.right if routers else {}
    return MixtureReport(output, list(options.source), num_experts, config.r, config.lora_alpha, right, notes)


def _make_config(options: ConvertOptions, loras: Sequence[Mapping[str, Factors]], base: Any) -> MolaConfig:
    """The configuration of the mixture, with one rank and one scale for all experts.

    If all adapters have the same scale, the mixture keeps it.
    """
    factors = [each for lora in loras for each in lora.values()]
    rank = max(each.A.shape[0] for each in factors)
    names = list(dict.fromkeys(name for lora in loras for name in lora))
    return MolaConfig(
        r=rank,
        num_experts=options.num_experts,
        top_k=options.top_k,
        lora_alpha=next((each.scaling for each in factors if each.scaling > 0), 1.0) * rank,
        target_modules=choose_target_names(names, base),
        task_type="CAUSAL_LM",
        base_model_type=base.config.model_type,
    )


def _check_num_experts(num_experts: Mapping[str, int], num_adapters: int, noise: float) -> None:
    for name, number in num_experts.items():
        if number < num_adapters:
            raise MolaError(
                f"`num_experts` must be at least {num_adapters}, one for each adapter: {name!r} has {number}. Raise "
                f"it, such as --num_experts {num_adapters}{',' if num_adapters > 9 else ''}, or leave adapters out."
            )
    if noise != ConvertOptions.noise and set(num_experts.values()) == {num_adapters}:
        raise MolaError(f"`noise` ({noise}) is for copies, but every adapter becomes exactly one expert. Leave it out.")


def _make_tensors(
    options: ConvertOptions,
    layers: Mapping[str, MolaLinear],
    loras: Sequence[Mapping[str, Factors]],
    config: Any,
    routers: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The mixture's tensors by their names in its file; `routers` maps some linears to their fitted routers."""
    tensors: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        for name, layer in layers.items():
            adapters = [lora.get(name) for lora in loras]
            parts = _make_experts(adapters, layer, config, options.noise, routers.get(name))
            tensors |= {f"{PREFIX}{name}.mola_{part}": value for part, value in parts.items() if value is not None}
    return tensors


def _make_experts(
    adapters: Sequence[Factors | None], layer: MolaLinear, config: Any, noise: float, router: torch.Tensor | None
) -> dict[str, torch.Tensor | None]:
    """A, B and router of one linear; `adapters` has each adapter's factors, None if it does not adapt the linear."""
    num_experts = layer.num_experts["default"]
    A = torch.empty(num_experts, config.r, layer.in_features)
    B = torch.empty(num_experts, config.r, layer.out_features)
    rows = torch.empty(num_experts, layer.in_features) if num_experts > 1 else None
    initialize(True, A, B, rows, nn.Identity())
    for expert in range(num_experts):
        source = adapters[expert % len(adapters)]
        if source is not None:
            rank = source.A.shape[0]
            # Beyond the adapter's rank, A stays random and B zero: this adds nothing, and both can be trained.
            A[expert, :rank] = source.A
            B[expert, :rank] = source.B.t() * (source.scaling * config.r / config.lora_alpha)
            if expert >= len(adapters):
                for part in (A[expert, :rank], B[expert, :rank]):
                    part += noise * part.std(correction=0) * torch.randn_like(part)
    if rows is not None and router is not None:
        # The initial random rows divide an adapter's tokens among its copies.
        is_first = torch.tensor([expert < len(adapters) for expert in range(num_experts)]).unsqueeze(1)
        which = torch.arange(num_experts) % len(adapters)
        rows = router.float()[which] + rows.masked_fill(is_first, 0.0)
    return {"A": A, "B": B, "router": rows}


def _fit_routers(
    options: ConvertOptions, sources: Sequence[str], modules: Iterable[str], notes: list[str]
) -> Routers | None:
    """Fit routers to `data`, and add notes about rows that are left out. Return None without data."""
    if options.data is None:
        return None
    if len(options.data) != len(sources) or len(sources) < 2:
        raise MolaError(
            f"`data` must name one file for each of at least two adapters: got {len(options.data)} for {len(sources)}. "
            "Routers are fitted to tell the adapters' inputs apart; leave `data` out for fresh routers."
        )
    data = [read_data(options, path, source) for path, source in zip(options.data, sources, strict=True)]
    by_path = dict(zip(options.data, data, strict=True))
    notes += [f"{each.too_long} rows of {path} left out: too long" for path, each in by_path.items() if each.too_long]
    notes += note_overlaps(by_path)
    names = {str(number): source for number, source in enumerate(sources)}
    model: Any = load_model(str(options.base_model), names, options.dtype, options.device, options.trust_remote_code)
    linears = {name: model.get_submodule(f"{PREFIX}{name}") for name in modules}
    return fit_routers(model, linears, data, options.memory_gb)
