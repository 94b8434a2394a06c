"""Scores of decoder layers that are measured: on the base model's weights, or on a probe adapter."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch
from rich.console import Console
from rich.progress import track

from mola.allocation_methods.base import Base
from mola.allocation_methods.probe import read_probe, routing_records
from mola.allocation_methods.weights import weights_of
from mola.devices import resolve_device
from mola.errors import MolaError
from mola.insight.redundancy import expert_distances, mean_pairwise
from mola.insight.spectra import eigenvalues, power_law_exponent

Scores = list[float | None]
CheckLayers = Callable[[int], None]


def alphalora_scores(base: Base, device: str = "cpu") -> Scores:
    """Power-law exponents of the weights (arXiv 2410.10054), mean over a layer's linears; see `power_law_exponent`.

    Args:
        base: the model; its weights are read one matrix at a time.
        device: where to compute; it needs float64.

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
    return _means(found, base)


def redundancy_scores(base: Base, adapter: str, check_layers: CheckLayers) -> Scores:
    """How different the experts of a probe are: `relative_distance`, mean over a layer's linears.

    Args:
        base: the model, without weights.
        adapter: folder of the probe.
        check_layers: called with the number of adapted layers before anything is computed.

    Raises:
        MolaError: the probe does not fit, has a layer with one expert, or has learnt nothing.
    """
    probe = read_probe(adapter, base)
    check_layers(len(set(probe.layers.values())))
    found: dict[int | None, list[float]] = defaultdict(list)
    for module, layer in probe.layers.items():
        found[layer].append(relative_distance(*probe.factors(module)))
    scores = _means(found, base)
    if not any(scores):
        raise MolaError(
            f"`adapter` must have experts that differ: those of {adapter!r} are all the same or zero. Train the probe "
            "for longer."
        )
    return scores


def relative_distance(experts_A: torch.Tensor, experts_B: torch.Tensor) -> float:
    r"""Mean distance of a module's experts in units of their size.

        d = mean over pairs ||B_i A_i - B_j A_j||_F / sqrt(mean over experts ||B_e A_e||_F^2)

    0 for equal experts, sqrt(2) for orthogonal ones of equal norm: comparable between modules of different shape and
    between modules that were changed much and little.

    Args:
        experts_A: `(E, r, in)`, at least two experts.
        experts_B: `(E, r, out)`.

    Returns:
        The ratio; 0 where all updates are zero.
    """
    zero_A, zero_B = (torch.zeros_like(stack[:1]) for stack in (experts_A, experts_B))
    # The last row: distances to an update of zero, the norms.
    distances = expert_distances(torch.cat([experts_A, zero_A]), torch.cat([experts_B, zero_B]))
    size = distances[-1, :-1].square().mean().sqrt().item()
    return mean_pairwise(distances[:-1, :-1]) / size if size > 0 else 0.0


def usage_scores(base: Base, adapter: str | None, inspection: str | None, check_layers: CheckLayers) -> Scores:
    """Effective number of experts that a probe uses, `effective_experts`, mean over a layer's linears.

    Args:
        base: the model, without weights.
        adapter: folder of the probe; the last line of its `routing.jsonl` is read unless `inspection` is given.
        inspection: file of `mola inspect --json`; its use over all tokens is read.
        check_layers: called with the number of adapted layers before anything is computed.

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
    return _means(found, base)


def effective_experts(mean_gates: Sequence[float]) -> float:
    """`exp` of the entropy of the mean gates: 1 if one expert does all, `E` if all weigh the same.

    Args:
        mean_gates: one per expert, at least 0, in any unit.
    """
    gates = torch.tensor(mean_gates, dtype=torch.float64)
    return math.exp(torch.special.entr(gates / gates.sum()).sum().item())


def _means(found: Mapping[int | None, Sequence[float]], base: Base) -> Scores:
    return [fmean(found[index]) if index in found else None for index in range(base.num_layers)]
