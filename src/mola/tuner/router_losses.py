"""Adds the routers' balance loss and z-loss to whatever the wrapped model returns as its loss.

Layers record their router's output while the model runs forward in training mode; hooks on the wrapped model clear
what was recorded before, and turn it into a loss after. The weight of that loss follows the task loss: with
`num_items_in_batch` (gradient accumulation in the HF Trainer) a micro-batch weighs in by its share of the tokens,
otherwise by 1.
"""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from typing import Any, cast

import torch
from torch import nn

from mola.architecture.layer_stacks import LayerStacks
from mola.errors import MolaError
from mola.tuner.config import MolaConfig
from mola.tuner.layer import MolaLinear
from mola.tuner.router_statistics import RouterStatistics, balance_loss, pool, router_statistics, z_loss

Groups = dict[int | None, list[RouterStatistics]]
_ATTRIBUTE = "_mola_router_losses"
_UNSHIFTED_TASKS = ("SEQ_2_SEQ_LM", "TOKEN_CLS", "SEQ_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


class RouterLosses:
    """Collects what routers gave in a model's training forward passes and adds their losses.

    Attributes:
        collecting: whether layers record their router's output in the current forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.collecting = False
        self._has_outputs = False  # whether layers hold outputs of the last forward passes in training mode
        self._attention_mask: torch.Tensor | None = None
        self._label_mask: torch.Tensor | None = None
        self._warned: set[str] = set()
        self._layers: list[MolaLinear] = []
        self._stacks = LayerStacks.of(model)
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    @classmethod
    def install(cls, model: nn.Module) -> RouterLosses:
        """Put the hooks on `model` (once) and tell every MoLA layer about them."""
        losses = getattr(model, _ATTRIBUTE, None)
        if losses is None:
            losses = cls(model)
            setattr(model, _ATTRIBUTE, losses)
        losses._layers = [module for module in model.modules() if isinstance(module, MolaLinear)]
        for layer in losses._layers:
            layer.router_losses = losses
        return losses

    @staticmethod
    def remove(model: nn.Module) -> None:
        """Take the hooks off `model` again."""
        losses = getattr(model, _ATTRIBUTE, None)
        if losses is not None:
            for handle in losses._handles:
                handle.remove()
            delattr(model, _ATTRIBUTE)

    # ------------------------------------------------------------------ hooks

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not module.training:
            # Without a look at every layer: this runs for each generated token, and a compiler guards what it looks at.
            self.collecting = False
            if self._has_outputs:
                self._clear()
            return
        self._clear()
        adapters = self._active_adapters()
        configs = [self._config(name) for name in adapters]
        self.collecting = self._has_outputs = any(_wants_loss(config) for config in configs)
        self._warn_about_untrained_routers(adapters)
        if self.collecting:
            if module is not self.model:
                raise MolaError(
                    "`router_aux_loss_coef` and `router_z_loss_coef` do not work under nn.DataParallel, whose copies "
                    "of the model share no state. Use one process per device (torchrun, accelerate launch) or one GPU."
                )
            inputs = call_arguments(module, args, kwargs)
            self._set_masks(inputs, unshifted=any(config.task_type in _UNSHIFTED_TASKS for config in configs))

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if not self.collecting:
            return output
        self.collecting = False
        loss = None
        for name in self._active_adapters():
            term = self._weighted_loss(name)
            if term is not None:
                loss = term if loss is None else loss + term
        if loss is None:
            return output
        return self._attach(output, loss, call_arguments(module, args, kwargs))

    def _clear(self) -> None:
        for layer in self._layers:
            # Also drops what a recomputation under gradient checkpointing stored after the last forward. A new dict,
            # since a compiler that sees the old one cleared makes another graph for one that is empty.
            if torch.compiler.is_compiling() or layer.router_outputs:
                layer.router_outputs = {}
        self._attention_mask = self._label_mask = None
        self._has_outputs = False

    # ------------------------------------------------------------------ the loss

    def balance_loss(self, adapter_name: str) -> torch.Tensor:
        """Balance loss of the last training forward pass, before its coefficient (scalar, float32).

        Raises:
            MolaError: no training forward pass with a router loss switched on has run yet.
        """
        groups = self._statistics(adapter_name)
        if not groups:
            raise MolaError(
                "No router has run: run a forward pass in training mode first, with "
                "`router_aux_loss_coef` or `router_z_loss_coef` above 0 and more than one expert somewhere."
            )
        return self._reduce(adapter_name, groups)

    def _reduce(self, adapter_name: str, groups: Groups) -> torch.Tensor:
        if self._config(adapter_name).router_aux_loss_reduction == "layer":
            per_layer = [balance_loss(pool(statistics)) for statistics in groups.values()]
            # A layer with one expert has no router here; in the paper's code it adds exactly 1.
            single = {layer.layer_index for layer in self._layers if layer.num_experts.get(adapter_name) == 1}
            return torch.stack(per_layer).sum() + len(single)
        return torch.stack([balance_loss(s) for statistics in groups.values() for s in statistics]).mean()

    def _weighted_loss(self, adapter_name: str) -> torch.Tensor | None:
        config = self._config(adapter_name)
        groups = self._statistics(adapter_name)
        if not groups or not _wants_loss(config):
            return None
        self._refuse_reentrant_checkpointing(adapter_name, groups)
        loss = config.router_aux_loss_coef * self._reduce(adapter_name, groups)
        if config.router_z_loss_coef > 0:
            per_router = [z_loss(s) for statistics in groups.values() for s in statistics]
            loss = loss + config.router_z_loss_coef * torch.stack(per_router).mean()
        return loss

    def _statistics(self, adapter_name: str) -> Groups:
        """Statistics of the routers that ran, grouped by decoder layer."""
        groups: Groups = defaultdict(list)
        for layer in self._layers:
            output = layer.router_outputs.get(adapter_name)
            if output is not None:
                mask = self._token_mask(adapter_name, output.logits.shape[0], layer.layer_index)
                groups[layer.layer_index].append(router_statistics(output, mask))
        return groups

    def _refuse_reentrant_checkpointing(self, adapter_name: str, groups: Groups) -> None:
        if not torch.is_grad_enabled() or not any(
            layer.mola_router[adapter_name].requires_grad for layer in self._layers if adapter_name in layer.mola_router
        ):
            return
        if any(not s.probability_sum.requires_grad for statistics in groups.values() for s in statistics):
            raise MolaError(
                "`router_aux_loss_coef` and `router_z_loss_coef` do not work with re-entrant gradient "
                "checkpointing: the routers' losses get no gradient there. Pass "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )

    # ------------------------------------------------------------------ into the model's output

    def _attach(self, output: Any, loss: torch.Tensor, inputs: dict[str, Any]) -> Any:
        log_probs = getattr(output, "log_probs", None)
        if torch.is_tensor(log_probs):
            # TRL's SFTTrainer computes its loss from the log-probabilities and ignores `output.loss`.
            output.log_probs = _AddLoss.apply(log_probs, loss, getattr(output, "label_mask", None))
        num_items = inputs.get("num_items_in_batch")
        share = 1.0 if num_items is None or self._label_mask is None else self._label_mask.sum() / num_items
        weighted = loss * share
        if torch.is_tensor(getattr(output, "loss", None)):
            output.loss = output.loss + weighted.to(output.loss.device)
        elif isinstance(output, tuple) and inputs.get("labels") is not None and torch.is_tensor(output[0]):
            output = (output[0] + weighted.to(output[0].device), *output[1:])
        elif not torch.is_tensor(log_probs):
            self._warn_once(
                "no loss",
                "The model returned no loss, so the router losses were not added to it. Add them yourself: "
                "`loss = loss + config.router_aux_loss_coef * model.get_balance_loss()`.",
            )
        return output

    def _set_masks(self, inputs: dict[str, Any], *, unshifted: bool) -> None:
        attention_mask, labels = inputs.get("attention_mask"), inputs.get("labels")
        if torch.is_tensor(attention_mask) and attention_mask.dim() == 2:
            self._attention_mask = attention_mask.bool()
        if torch.is_tensor(labels) and labels.dim() == 2:
            mask = labels.ne(-100)
            # Position t predicts token t + 1: it counts when that token does. The last one predicts nothing.
            self._label_mask = mask if unshifted else torch.cat([mask[:, 1:], mask.new_zeros(len(mask), 1)], 1)
        elif inputs.get("shift_labels") is not None:  # alone: beside labels they may be of `logits_to_keep` only
            self._label_mask = inputs["shift_labels"].ne(-100)

    def _token_mask(self, adapter_name: str, num_tokens: int, layer_index: int | None) -> torch.Tensor | None:
        """The `(num_tokens,)` mask of counted tokens, or None when all count.

        The "layer" reduction counts padding, as the paper's code does. A module that sees another
        number of tokens than the mask has (experts of a MoE base) counts all of its own.
        """
        if self._config(adapter_name).router_aux_loss_reduction == "layer":
            return None
        masks = [m for m in (self._attention_mask, self._label_mask) if m is not None and m.numel() == num_tokens]
        if self._stacks.num_encoder_layers:
            # The attention mask is of the encoder's tokens, which cross attention reads too; labels are the decoder's.
            masks = masks[:1] if self._stacks.is_encoder(layer_index) else masks[-1:]
        if not masks:
            return None
        mask = masks[0].reshape(-1)
        return mask if len(masks) == 1 else mask * masks[1].reshape(-1).to(mask.device)

    # ------------------------------------------------------------------ small things

    def _config(self, adapter_name: str) -> Any:
        return cast(Any, self.model).peft_config.get(adapter_name)

    def _active_adapters(self) -> list[str]:
        for layer in self._layers:
            if not layer.disable_adapters:
                return [name for name in layer.active_adapters if isinstance(self._config(name), MolaConfig)]
        return []

    def _warn_about_untrained_routers(self, adapters: list[str]) -> None:
        for name in adapters:
            routed = [layer for layer in self._layers if layer.num_experts.get(name, 1) > 1]
            if not _wants_loss(self._config(name)) and any(layer.top_k[name] == 1 for layer in routed):
                self._warn_once(
                    f"top_k {name}",
                    f"Adapter {name!r} has `top_k=1`: the only gate is always 1, so the task loss gives the "
                    "router no gradient and it never learns. Set `router_aux_loss_coef` (e.g. 1e-3) or `top_k=2`.",
                )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=2)


def call_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module`, all by name."""
    if not args:
        return kwargs
    return {**inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments, **kwargs}


def _wants_loss(config: MolaConfig) -> bool:
    return config.router_aux_loss_coef > 0 or config.router_z_loss_coef > 0


class _AddLoss(torch.autograd.Function):
    """Identity on log-probabilities that also backpropagates a loss, weighted as the tokens are.

    A mean or sum over tokens gives each log-probability the gradient `-w`; the added loss gets the sum
    of those `w` over real tokens, which is this batch's share of the total. A loss of preferences gives some
    tokens `+w`, and its size says nothing about that share: it is refused.
    """

    @staticmethod
    def forward(ctx, log_probs, loss, label_mask):
        ctx.save_for_backward(label_mask if label_mask is not None else torch.ones_like(log_probs))
        ctx.loss_like = loss.dtype, loss.device
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx, grad_output):
        (mask,) = ctx.saved_tensors
        dtype, device = ctx.loss_like
        weights = -grad_output * mask
        if not torch.compiler.is_compiling() and bool((weights < 0).any()):
            raise MolaError(
                "`router_aux_loss_coef` and `router_z_loss_coef` must be 0 where the trainer's loss is not a mean of "
                "negative log-likelihoods: this one also lowers the likelihood of some tokens, as DPO, KTO and GRPO "
                "do, so the weight of the routers' losses does not follow from it. Set them to 0 in the MolaConfig, "
                "or for a loaded adapter in `model.peft_config[name]`."
            )
        return grad_output, weights.sum().to(device, dtype), None
