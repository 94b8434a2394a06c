"""A loss that is added where a trainer looks at log-probabilities only, as TRL's `SFTTrainer` does."""

from __future__ import annotations

from typing import Any

import torch

from mola.errors import MolaError


class LossSigns:
    """Refuses losses that also lower the likelihood of tokens, on a GPU when it has got there: nobody waits for it."""

    def __init__(self) -> None:
        self._copies: list[tuple[torch.Tensor, Any]] = []

    def __reduce__(self) -> Any:
        return LossSigns, ()  # copies of a model wait for nothing

    def see(self, weights: torch.Tensor) -> None:
        """Look at the weights of the tokens: all must be at least 0."""
        if torch.compiler.is_compiling():
            return
        is_wrong = (weights < 0).any()
        if not is_wrong.is_cuda:
            self._refuse_if(is_wrong)
        elif not torch.cuda.is_current_stream_capturing():
            copy = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True).copy_(is_wrong, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._copies.append((copy, event))

    def check(self) -> None:
        """Refuse what was seen to be wrong by now."""
        while self._copies and self._copies[0][1].query():
            self._refuse_if(self._copies.pop(0)[0])

    @staticmethod
    def _refuse_if(is_wrong: torch.Tensor) -> None:
        if is_wrong:
            raise MolaError(
                "`router_aux_loss_coef` and `router_z_loss_coef` must be 0 where the trainer's loss is not a mean of "
                "negative log-likelihoods: this one also lowers the likelihood of some tokens, as DPO, KTO and GRPO "
                "do, so the weight of the routers' losses does not follow from it. Set them to 0 in the MolaConfig, "
                "or for a loaded adapter in `model.peft_config[name]`."
            )


class _AddLoss(torch.autograd.Function):
    """Identity on log-probabilities that also backpropagates a loss, weighted as the tokens are.

    A mean or sum over tokens gives each log-probability the gradient `-w`; the added loss gets the sum
    of those `w` over real tokens, which is this batch's share of the total. A loss of preferences gives some
    tokens `+w`, and its size says nothing about that share: it is refused.
    """

    @staticmethod
    def forward(ctx, log_probs, loss, label_mask, signs):
        ctx.signs = signs
        ctx.save_for_backward(label_mask if label_mask is not None else torch.ones_like(log_probs))
        ctx.loss_like = loss.dtype, loss.device
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx, grad_output):
        (mask,) = ctx.saved_tensors
        dtype, device = ctx.loss_like
        weights = -grad_output * mask
        ctx.signs.see(weights)
        return grad_output, weights.sum().to(device, dtype), None, None


def add_loss(
    log_probs: torch.Tensor, loss: torch.Tensor, label_mask: torch.Tensor | None, signs: LossSigns
) -> torch.Tensor:
    """The same log-probabilities, whose gradient also goes into `loss`, weighted as the tokens are.

    Args:
        log_probs: of tokens, in any shape.
        loss: scalar.
        label_mask: of the shape of `log_probs`, True for tokens that count; None counts all.
        signs: refuses what gives a token's log-probability a gradient above 0.
    """
    return _AddLoss.apply(log_probs, loss, label_mask, signs)
