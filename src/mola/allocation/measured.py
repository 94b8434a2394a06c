"""Scores linears by the base model's weights or by a probe adapter; a layer's score is the mean of its linears."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple, cast

import torch

from mola.allocation.base import Base, iterate_weights
from mola.allocation.probe import read_probe, read_routing_records
from mola.architecture.layer_names import PREFIX, module_kinds
from mola.architecture.patterns import scaling_of
from mola.errors import MolaError
from mola.files.terminal import show_progress
from mola.insight.redundancy import expert_distances, in_float64, mean_pairwise
from mola.models.devices import resolve_device

LayerScores = list[float | None]  # one per layer; None without an adapted linear


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


def redundancy_scores(base: Base, adapter: str) -> list[ModuleScore]:
    """Score linears by how different the experts of a probe are, compared with the same linears of other layers.

        d_m = mean over pairs of experts of scaling * ||B_i A_i - B_j A_j||_F        of a module m
        score_m = d_m / (mean of d over all modules of that name)

    Raises:
        MolaError: the probe does not fit, has a layer with one expert, or its experts do not differ.
    """
    probe = read_probe(adapter, base)
    distances = {}
    for module in probe.layers:
        experts_A, experts_B = (probe.tensors[f"{PREFIX}{module}.mola_{factor}"] for factor in "AB")
        scaling = scaling_of(probe.config, module, experts_A.shape[1])
        distances[module] = mean_pairwise(expert_distances(experts_A, experts_B, scaling))
    if not any(distances.values()):
        raise MolaError(
            f"`adapter` must have experts that differ: the experts of {adapter!r} are all equal or zero. Train the "
            "probe for longer."
        )
    return relative_scores(distances, base)


def usage_scores(
    base: Base, adapter: str | None, inspection: str | None, per_module: bool = False
) -> list[ModuleScore]:
    """Score linears by the effective number of experts that a probe uses, see `effective_experts`.

    Reads the records of `read_routing_records`, which must cover every adapted layer, or with `per_module` every
    adapted linear.

    Raises:
        MolaError: a file is missing or broken, or does not fit the model.
    """
    adapted: Iterable[str] = (
        [linear.name for linear in base.linears] if adapter is None else read_probe(adapter, base).layers
    )
    records, source = read_routing_records(adapter, inspection)
    found = [
        ModuleScore(row["module"].removeprefix(PREFIX), row["layer_index"], effective_experts(row["mean_gates"]))
        for row in records
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


def eigenvalues(weight: torch.Tensor) -> torch.Tensor:
    """Eigenvalues of `W W^T`, the squared singular values of `W`.

    Computed from the smaller of `W W^T` and `W^T W`, which have the same eigenvalues except zeros.

    Args:
        weight: a matrix, `(out, in)`, in any dtype.

    Returns:
        float64 `(min(out, in),)`, in ascending order, at least 0.

    Raises:
        MolaError: `weight` is not a matrix, or holds values that are not finite.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise MolaError(
            f"a spectrum needs a matrix of floating-point numbers: got shape {tuple(weight.shape)} of {weight.dtype}."
        )
    # float64: the ratio of the largest to the middle eigenvalue can exceed what float32 resolves in a Gram matrix.
    matrix = in_float64(weight.detach())
    if not torch.isfinite(matrix).all():
        raise MolaError("a spectrum needs finite numbers: the matrix holds NaN or infinity.")
    gram = matrix @ matrix.t() if matrix.shape[0] <= matrix.shape[1] else matrix.t() @ matrix
    return torch.linalg.eigvalsh(gram).clamp_min(0)


def power_law_exponent(spectrum: torch.Tensor) -> float:
    r"""Exponent of the power law that the upper half of a spectrum follows (PL_Alpha_Hill, arXiv 2410.10054).

        alpha = 1 + k / sum_{i=1..k} ln(lambda_{n-i+1} / lambda_{n-k})        Hill estimator, k = n // 2

    `lambda_1 <= ... <= lambda_n`: the `k` largest eigenvalues against the one below them. A heavy tail, the sign of a
    well trained matrix in that work, has a small exponent. Scaling all eigenvalues by one factor does not change
    the exponent.

    Args:
        spectrum: eigenvalues `(n,)` in ascending order, as `eigenvalues` returns them.

    Raises:
        MolaError: fewer than two eigenvalues, a rank below half of `n`, or an upper half of equal values, whose
            exponent is infinite.
    """
    count = len(spectrum)
    half = count // 2
    if half < 1:
        raise MolaError(f"a power law needs at least 2 eigenvalues: got {count}.")
    threshold = spectrum[count - half - 1]
    smallest = spectrum[-1] * count * torch.finfo(torch.float64).eps
    if not threshold > smallest:
        raise MolaError("a power law needs a matrix of at least half its full rank: more eigenvalues are zero.")
    logarithms = torch.log(spectrum[count - half :] / threshold).sum().item()
    if not logarithms > 0:
        raise MolaError("a power law needs eigenvalues that differ: the upper half of them is equal.")
    return 1 + half / logarithms
