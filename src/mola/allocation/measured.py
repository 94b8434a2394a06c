"""Scores of decoder layers that are measured: on the base model's weights, or on a probe adapter."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch
from rich.console import Console
from rich.progress import track

from mola.allocation.base import Base
from mola.allocation.probe import read_probe, routing_records
from mola.allocation.weights import weights_of
from mola.errors import MolaError
from mola.insight.redundancy import expert_distances, mean_pairwise
from mola.insight.spectra import eigenvalues, power_law_exponent
from mola.models.devices import resolve_device

Scores = list[float | None]
CheckLayers = Callable[[int], None]


def alphalora_scores(base: Base, device: str = "cpu") -> Scores:
    """Power-law exponents of the weights (arXiv 2410.10054), mean over a layer's linears; see `power_law_exponent`.

    Weights are read one matrix at a time, and computed with in float64 on `device`.

    Raises:
        MolaError: weights are missing or quantised, or a matrix has no power law.
    """
    target = resolve_device(device)
    layers = {linear.name: linear.layer_index for linear in base.linears}
    found: dict[int | None, list[float]] = defaultdict(list)
    console = Console(stderr=True)
    matrices = track(
        weights_of(base),
        "Spectra of the weights",
        total=len(base.linears),
        console=console,
        disable=not console.is_terminal,
    )
    for name, weight in matrices:
        try:
            found[layers[name]].append(power_law_exponent(eigenvalues(weight.to(target))))
        except MolaError as error:
            raise MolaError(
                f"`base_model` has a weight without a power law, {name}: {error} Leave it out of `target_modules`."
            ) from error
    return mean_scores(found, base)


def redundancy_scores(base: Base, adapter: str, check_layers: CheckLayers) -> Scores:
    """How different the experts of a probe are, compared with the same linears of other layers.

        d_m = mean over pairs of experts of (1 / r) * ||B_i A_i - B_j A_j||_F        of a module m
        score_l = mean over the modules m of layer l of d_m / (mean of d over all modules of that name)

    `check_layers` is called with the number of adapted layers before anything is computed. Scores are 1 in the mean
    where all layers adapt the same linears.

    Raises:
        MolaError: the probe does not fit, has a layer with one expert, or has learnt nothing.
    """
    probe = read_probe(adapter, base)
    check_layers(len(set(probe.layers.values())))
    distances = {}
    for module in probe.layers:
        experts_A, experts_B = probe.factors(module)
        # `lora_alpha` is the same everywhere, and a common factor changes nothing.
        distances[module] = mean_pairwise(expert_distances(experts_A, experts_B, 1 / experts_A.shape[1]))
    scores = relative_scores(distances, base)
    if not any(scores):
        raise MolaError(
            f"`adapter` must have experts that differ: those of {adapter!r} are all the same or zero. Train the probe "
            "for longer."
        )
    return scores


def usage_scores(base: Base, adapter: str | None, inspection: str | None, check_layers: CheckLayers) -> Scores:
    """Effective number of experts that a probe uses, `effective_experts`, mean over a layer's linears.

    Read are the records of `routing_records`; `check_layers` as in `redundancy_scores`.

    Raises:
        MolaError: a file is missing or broken, or does not fit the model.
    """
    is_adapted = base.is_adapted if adapter is None else base.has_some(read_probe(adapter, base).layers.values())
    records, source = routing_records(adapter, inspection)
    found: dict[int | None, list[float]] = defaultdict(list)
    for record in records:
        found[record["layer_index"]].append(effective_experts(record["mean_gates"]))
    wanted = {index for index, adapted in enumerate(is_adapted) if adapted}
    if stray := found.keys() - wanted:
        raise MolaError(
            f"{source} must belong to `base_model` and `adapter`: it speaks of layer {next(iter(stray))}, which has no "
            f"adapted linear there ({base.name!r} has {base.num_layers} layers)."
        )
    if missing := sorted(wanted - found.keys()):
        raise MolaError(
            f"{source} must speak of every adapted layer: nothing about {', '.join(map(str, missing))}. Those had one "
            "expert or were not adapted: use a probe with at least 2 experts everywhere, and pass --adapter as well if "
            "it adapts some layers only."
        )
    check_layers(len(wanted))
    return mean_scores(found, base)


def effective_experts(mean_gates: Sequence[float]) -> float:
    """`exp` of the entropy of the mean gates, in any unit: 1 if one expert does all, `E` if all weigh the same."""
    gates = torch.tensor(mean_gates, dtype=torch.float64)
    return math.exp(torch.special.entr(gates / gates.sum()).sum().item())


def relative_scores(values: Mapping[str, float], base: Base) -> Scores:
    """Of each layer the mean over its modules of their value, divided by the mean of all modules of that name."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for module, value in values.items():
        kinds[module.rpartition(".")[2]].append(value)
    usual = {kind: fmean(of_kind) for kind, of_kind in kinds.items()}
    found: dict[int | None, list[float]] = defaultdict(list)
    for module, value in values.items():
        mean = usual[module.rpartition(".")[2]]
        found[base.layer_of[module]].append(value / mean if mean > 0 else 0.0)
    return mean_scores(found, base)


def mean_scores(found: Mapping[int | None, Sequence[float]], base: Base) -> Scores:
    """Of each layer the mean of its modules' values; None without any."""
    return [fmean(found[index]) if index in found else None for index in range(base.num_layers)]
