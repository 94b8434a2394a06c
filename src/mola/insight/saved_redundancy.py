"""How different the experts of a saved adapter are, with numpy: importing torch would take longer than all the rest.

The values are those of `mola.insight.redundancy`, which computes with the tensors of a loaded model.
"""

from dataclasses import dataclass

import numpy as np

_Array = np.ndarray


@dataclass(frozen=True)
class ModuleRedundancy:
    """How alike the experts of one module are; means over pairs of experts."""

    module: str  # its name in the model
    layer_index: int | None  # its decoder layer, None outside the layers
    distance: float  # Frobenius distance of the updates, see `mola.insight.redundancy.expert_distances`
    input_overlap: float  # overlap of what experts read, from 0 to 1; NaN if a matrix is zero
    output_overlap: float  # overlap of what experts write


def redundancy_of_arrays(
    module: str, layer_index: int | None, experts_A: _Array, experts_B: _Array, scaling: float
) -> ModuleRedundancy:
    """Redundancy of one module with several experts, A `(E, r, in)` and B `(E, r, out)`."""
    gram_A, gram_B = _gram(experts_A), _gram(experts_B)
    inner = (gram_A * gram_B).sum((1, 3))
    norms = inner.diagonal()
    distances = np.sqrt(np.maximum(norms[:, None] + norms - 2 * inner, 0)) * scaling
    overlaps = _overlaps(gram_A, experts_A.shape[2]), _overlaps(gram_B, experts_B.shape[2])
    return ModuleRedundancy(module, layer_index, *map(_mean_over_pairs, (distances, *overlaps)))


def _gram(stack: _Array) -> _Array:
    """Inner products of all rows of `(E, r, features)`: float64 `(E, r, E, r)`."""
    num_experts, r, features = stack.shape
    rows = stack.reshape(-1, features).astype(np.float64)
    return (rows @ rows.T).reshape(num_experts, r, num_experts, r)


def _overlaps(gram: _Array, features: int) -> _Array:
    """Overlaps `(E, E)` of the spaces that the rows of each expert span, see `mola.insight.redundancy`.

    With eigenvectors `V` and eigenvalues `s^2` of an expert's inner products `S S^T`, the rows of `V^T S / s` are an
    orthonormal basis. So the products of two bases follow from the inner products of all rows.
    """
    num_experts, r = gram.shape[:2]
    experts = np.arange(num_experts)
    squares, vectors = np.linalg.eigh(gram[experts, :, experts, :])
    lengths = np.sqrt(np.maximum(squares, 0))
    smallest = lengths[:, -1:] * max(r, features) * np.finfo(np.float32).eps
    is_spanned = lengths > smallest  # (E, r)
    to_basis = vectors * (is_spanned / np.where(is_spanned, lengths, 1))[:, None, :]
    to_basis = to_basis.transpose(0, 2, 1)
    left = to_basis @ gram.reshape(num_experts, r, -1)  # the basis of each expert with all rows: (E, r, E r)
    cosines = to_basis @ left.reshape(-1, num_experts, r).transpose(1, 2, 0)  # (E, r, E r)
    ranks = is_spanned.sum(1)
    with np.errstate(invalid="ignore"):  # NaN if a factor is zero
        return (cosines**2).reshape(num_experts, r, num_experts, r).sum((1, 3)) / np.minimum(ranks[:, None], ranks)


def _mean_over_pairs(matrix: _Array) -> float:
    return float(matrix[np.triu_indices(len(matrix), 1)].mean())
