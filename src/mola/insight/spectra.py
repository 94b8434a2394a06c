"""The distribution of a weight matrix's eigenvalues: its power-law exponent."""

import torch

from mola.errors import MolaError
from mola.insight.redundancy import in_float64


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
