"""Scores linears by the base model's weights or by a probe adapter; a layer's score is the mean of its linears."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple, cast

import torch

from mola.allocation.base import Base, iterate_weights
from mola.allocation.probe import read_probe, read_routing_records
from mola.architecture.layer_stacks import module_kinds
from mola.errors import MolaError
from mola.files.terminal import show_progress
from mola.insight.redundancy import expert_distances, mean_pairwise
from mola.insight.spectra import eigenvalues, power_law_exponent
from mola.models.devices import resolve_device
from mola.tuner.loading import PREFIX

LayerScores = list[float | None]  # one per layer; None without an adapted linear
CheckLayers = Callable[[int], None]


class ModuleScore(NamedTuple):
    """Score of one adapted linear."""

    module: str  # the linear's name in the base model
    layer_index: int
    score: float


def alphalora_scores(base: Base, device: str = "cpu") -> list[ModuleScore]:
    """Score linears by the power-law exponents of their weights (arXiv 2410.10054); see `power_law_exponent`.

    The weights are read one matrix at a time; their spectra are computed in float64 on `device`.

    Raises:
        MolaError: weights are missing or quantised, or a matrix has no power law.
    """
    target = resolve_device(device)
    found = {}
    for name, weight in show_progress(iterate_weights(base), "Spectra of the weights", len(base.linears)):
        try:
            found[name] = power_law_exponent(eigenvalues(weight.to(target)))
        except MolaError as error:
            raise MolaError(
                f"`base_model` has a weight without a power law, {name}: {error} Leave it out of `target_modules`."
            ) from error
    return scores_by_name(found, base)


def redundancy_scores(base: Base, adapter: str, check_layers: CheckLayers) -> list[ModuleScore]:
    """Score linears by how different the experts of a probe are, compared with the same linears of other layers.

        d_m = mean over pairs of experts of scaling * ||B_i A_i - B_j A_j||_F        of a module m
        score_m = d_m / (mean of d over all modules of that name)

    `check_layers` is called with the number of adapted layers before anything is computed.

    Raises:
        MolaError: the probe does not fit, has a layer with one expert, or its experts do not differ.
    """
    probe = read_probe(adapter, base)
    check_layers(len(set(probe.layers.values())))
    distances = {}
    for module in probe.layers:
        experts_A, experts_B = probe.factors(module)
        distances[module] = mean_pairwise(expert_distances(experts_A, experts_B, probe.scaling(module)))
    scores = relative_scores(distances, base)
    if not any(each.score for each in scores):
        raise MolaError(
            f"`adapter` must have experts that differ: the experts of {adapter!r} are all equal or zero. Train the "
            "probe for longer."
        )
    return scores


def usage_scores(
    base: Base, adapter: str | None, inspection: str | None, check_layers: CheckLayers, per_module: bool = False
) -> list[ModuleScore]:
    """Score linears by the effective number of experts that a probe uses, see `effective_experts`.

    Reads the records of `read_routing_records`, which must cover every adapted layer, or with `per_module` every
    adapted linear. For `check_layers` see `redundancy_scores`.

    Raises:
        MolaError: a file is missing or broken, or does not fit the model.
    """
    adapted: Iterable[str] = (
        [linear.name for linear in base.linears] if adapter is None else read_probe(adapter, base).layers
    )
    records, source = read_routing_records(adapter, inspection)
    found = [
        ModuleScore(
            record["module"].removeprefix(PREFIX), record["layer_index"], effective_experts(record["mean_gates"])
        )
        for record in records
    ]
    recorded_layers = {each.layer_index for each in found}
    adapted_layers = {layer for name in adapted if (layer := base.layer_of[name]) is not None}
    if extra := recorded_layers - adapted_layers:
        raise MolaError(
            f"{source} must belong to `base_model` and `adapter`: it names layer {next(iter(extra))}, in which no "
            f"linear is adapted ({base.name!r} has {base.num_layers} layers)."
        )
    if missing := sorted(adapted_layers - recorded_layers):
        raise MolaError(
            f"{source} must cover every adapted layer: it lacks {', '.join(map(str, missing))}. These layers had one "
            "expert or were not adapted. Use a probe with at least 2 experts everywhere, and pass --adapter as well if "
            "the probe adapts only some layers."
        )
    if per_module and (differing := sorted({each.module for each in found} ^ {*adapted})):
        raise MolaError(
            f"{source} must cover exactly the adapted linears for `per_module`: {differing[0]!r} is only in the "
            "file or only in the model. Use a probe with at least 2 experts in every linear, and pass --adapter too."
        )
    check_layers(len(adapted_layers))
    return found


def effective_experts(mean_gates: Sequence[float]) -> float:
    """`exp` of the entropy of the normalised mean gates: 1 if one expert has all weight, `E` if all have the same."""
    gates = torch.tensor(mean_gates, dtype=torch.float64)
    return math.exp(torch.special.entr(gates / gates.sum()).sum().item())


def relative_scores(values: Mapping[str, float], base: Base) -> list[ModuleScore]:
    """Score linears by their value divided by the mean value of all linears of their kind."""
    kinds, of_kind = module_kinds(values), defaultdict[str, list[float]](list)
    for module, value in values.items():
        of_kind[kinds[module]].append(value)
    means = {kind: fmean(found) for kind, found in of_kind.items()}
    return scores_by_name({name: value / (means[kinds[name]] or 1.0) for name, value in values.items()}, base)


def scores_by_name(values: Mapping[str, float], base: Base) -> list[ModuleScore]:
    """Convert name -> score of linears to `ModuleScore`s; every linear must be in a decoder layer."""
    return [ModuleScore(name, cast(int, base.layer_of[name]), value) for name, value in values.items()]


def layer_scores(found: Iterable[ModuleScore], num_layers: int) -> LayerScores:
    """The mean score of the linears of each layer; None for a layer without scored linears."""
    layers: dict[int, list[float]] = defaultdict(list)
    for each in found:
        layers[each.layer_index].append(each.score)
    return [fmean(layers[index]) if index in layers else None for index in range(num_layers)]
