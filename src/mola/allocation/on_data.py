"""Scores linears on samples of data, before anything is trained: by gradients or by spectra of their inputs."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import fsum
from typing import Any

import torch
from torch import nn

from mola.allocation.base import Base
from mola.allocation.measured import ModuleScore, relative_scores, scores_by_name
from mola.data.tasks import load_task
from mola.errors import MolaError
from mola.files.terminal import show_progress
from mola.insight.redundancy import in_float64
from mola.models.base_model import load_config, max_positions
from mola.models.loading import load_model
from mola.models.sample_data import encode_samples, read_samples
from mola.models.tokenizer import load_tokenizer

_RANK = 8  # components of a linear's input that count, on average
_TOKENS = 1024  # number of tokens for the spectrum of an input


def encoded_samples(
    base: Base, data: str, task: str | None, template: str | None, split: str, limit: int
) -> Sequence[Mapping[str, Any]]:
    """Read the first `limit` samples of a data file as `input_ids` and `labels`.

    Raises:
        MolaError: the data are of no known format or do not fit the task, or a sample is longer than the model's
            positions.
    """
    tokenizer = load_tokenizer(base.name, "right", base.trust_remote_code, base.gguf_file)
    read_as = None if task is None else load_task(task)
    samples = read_samples(data, read_as, tokenizer, split=split, limit=limit, template=template)
    positions = max_positions(load_config(base.name, base.trust_remote_code, base.gguf_file))
    return encode_samples(samples, tokenizer, positions)


def gradient_scores(base: Base, samples: Sequence[Mapping[str, Any]], model: Any) -> list[ModuleScore]:
    r"""Score linears by their squared gradients, compared with the same linears of other layers.

        f_m = mean over samples of || dL / dW_m ||_F^2                              of a linear m
        score_m = f_m / (mean of f over all linears of that name)

    L is the mean loss of a sample's answer. For a LoRA whose A is random with variance `s^2`, the expected squared
    gradient of B at the start is `r s^2` times that of the weight, with the same factor for all linears of a name.
    So `f_m` is the trace of the empirical Fisher matrix of a first LoRA step. With inputs X and output gradients D of
    one sample, `|| dL / dW ||_F^2` is the sum of `(X X^T) * (D D^T)`: no gradient as large as a weight is formed.

    Raises:
        MolaError: no linear gets a gradient.
    """
    found: dict[str, list[float]] = defaultdict(list)
    model.enable_input_require_grads()  # the base is frozen, so gradients need inputs that require them
    with _recorded_gradients(base, model) as recorded:
        for ids, labels in _tensors(samples, model, "Gradients"):
            with torch.enable_grad():
                model(input_ids=ids, labels=labels).loss.backward()
            for name, calls in recorded.items():
                x, gradient = (torch.cat(parts) for parts in zip(*calls, strict=True))
                products = (x @ x.T) * (gradient @ gradient.T)
                found[name].append(float(in_float64(products).sum()))
            recorded.clear()
    model.disable_input_require_grads()
    if not any(any(values) for values in found.values()):
        raise MolaError("`data` must have answers to compute a loss from: no linear got a gradient.")
    # A sample gives no gradient to a linear that it does not reach, such as one of the base's own experts.
    return relative_scores({each.name: fsum(found[each.name]) / len(samples) for each in base.linears}, base)


def activation_scores(base: Base, samples: Sequence[Mapping[str, Any]], model: Any) -> list[ModuleScore]:
    """Score linears by how many directions of their inputs are among the strongest, like EVA (arXiv 2410.07170).

        rho_mj = lambda_j / sum_j lambda_j       of the j-th eigenvalue of the covariance of the inputs of a linear m
        score_m = | {j: rho_mj is one of the 8 M largest of all M linears} |

    The covariance is computed from the first 1024 tokens.
    """
    rows: dict[str, list[torch.Tensor]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)

    def recorder(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])[: _TOKENS - counts[name]]
            counts[name] += len(x)
            if len(x):
                rows[name].append(x.float())

        return hook

    names = [linear.name for linear in base.linears]
    with ExitStack() as hooks, torch.no_grad():
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(recorder(name)))
        for ids, _ in _tensors(samples, model, "Inputs"):
            model(input_ids=ids)
            if all(counts[name] >= _TOKENS for name in names):
                break
    shares = {name: _variance_shares(torch.cat(rows.pop(name))) for name in list(rows)}
    strongest = torch.cat(list(shares.values())).topk(min(_RANK * len(shares), sum(map(len, shares.values()))))
    smallest = strongest.values[-1]
    numbers = {name: float((shares[name] >= smallest).sum()) if name in shares else 0.0 for name in names}
    return scores_by_name(numbers, base)


def load_for_scores(base: Base, device: str) -> Any:
    """Load the base model in float32: half precision would round small gradients to zero."""
    return load_model(base.name, None, "float32", device, base.trust_remote_code)


def _tensors(
    samples: Sequence[Mapping[str, Any]], model: Any, title: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    device = next(model.parameters()).device
    for sample in show_progress(samples, title):
        ids, labels = (torch.tensor([list(sample[name])], device=device) for name in ("input_ids", "labels"))
        yield ids, labels


@contextmanager
def _recorded_gradients(base: Base, model: Any) -> Iterator[dict[str, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """Record every linear's input and output gradient, both `(tokens, features)`, in each backward pass.

    Each call of a linear adds one pair, since some models call a layer several times.
    """
    recorded: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)

    def recorder(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            if output.requires_grad:
                output.register_hook(lambda grad: recorded[name].append((x, grad.reshape(len(x), -1))))

        return hook

    with ExitStack() as hooks:
        for linear in base.linears:
            hooks.enter_context(model.get_submodule(linear.name).register_forward_hook(recorder(linear.name)))
        yield recorded


def _variance_shares(x: torch.Tensor) -> torch.Tensor:
    """Shares of the variance of rows `(tokens, features)` that their principal components explain, largest first."""
    centred = in_float64(x - x.mean(dim=0))
    gram = centred @ centred.T if len(x) < x.shape[1] else centred.T @ centred
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
