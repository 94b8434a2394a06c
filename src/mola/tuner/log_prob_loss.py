"""A loss added through log-probabilities, for trainers that ignore the model's own loss, such as TRL's `SFTTrainer`."""

from __future__ import annotations

from typing import Any

import torch

from mola.errors import MolaError


class LikelihoodCheck:
    """Raises an error if the trainer's loss lowers the likelihood of a token.

    On a GPU the check never blocks a step: its result is copied in the background, and the error comes a few steps
    later.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[torch.Tensor, Any]] = []  # results on their way from a GPU, with their CUDA events

    def __reduce__(self) -> Any:
        return LikelihoodCheck, ()  # a copied model starts without pending results

    def observe(self, token_weights: torch.Tensor) -> None:
        """Check the weights of the tokens in the trainer's loss, which must all be at least 0."""
        if torch.compiler.is_compiling():
            return
        is_violated = (token_weights < 0).any()
        if not is_violated.is_cuda:
            _raise_if(is_violated)
        elif not torch.cuda.is_current_stream_capturing():
            on_cpu = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
            on_cpu.copy_(is_violated, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((on_cpu, event))

    def raise_if_violated(self) -> None:
        """Raise MolaError if a result that has arrived from the GPU shows a violation."""
        while self._pending and self._pending[0][1].query():
            _raise_if(self._pending.pop(0)[0])


def _raise_if(is_violated: torch.Tensor) -> None:
    if is_violated:
        raise MolaError(
            "`router_aux_loss_coef` and `router_z_loss_coef` must be 0 if the trainer's loss is not a mean of "
            "negative log-likelihoods: this loss also lowers the likelihood of some tokens, like DPO, KTO and "
            "GRPO. Set them to 0 in the MolaConfig, or for a loaded adapter in `model.peft_config[name]`."
        )


class _AddLoss(torch.autograd.Function):
    """Returns the log-probabilities unchanged; their gradient also flows into the loss."""

    @staticmethod
    def forward(ctx, log_probs, loss, label_mask, check):
        ctx.check = check
        ctx.save_for_backward(label_mask if label_mask is not None else torch.ones_like(log_probs))
        ctx.loss_like = loss.dtype, loss.device
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx, grad_log_probs):
        (mask,) = ctx.saved_tensors
        dtype, device = ctx.loss_like
        token_weights = -grad_log_probs * mask
        ctx.check.observe(token_weights)
        return grad_log_probs, token_weights.sum().to(device, dtype), None, None


def add_loss_to_log_probs(
    log_probs: torch.Tensor, loss: torch.Tensor, label_mask: torch.Tensor | None, check: LikelihoodCheck
) -> torch.Tensor:
    """The same log-probabilities, whose gradient also flows into `loss`.

    If the trainer's loss is a mean or a sum of negative log-likelihoods, the gradient for the log-probability of token
    t is `-w_t`. The gradient for `loss` is then the sum of `w_t`: the share of this batch in all tokens of an optimiser
    step. A preference loss has positive gradients for some tokens, so no share follows from it; `check` refuses it.

    Args:
        log_probs: log-probabilities of tokens, in any shape.
        loss: scalar.
        label_mask: same shape as `log_probs`, True for tokens that count; None counts all.
        check: checks the token weights in every backward pass.
    """
    return _AddLoss.apply(log_probs, loss, label_mask, check)
