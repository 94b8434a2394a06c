"""Adds the routers' balance loss and z-loss to whatever the wrapped model returns as its loss.

Layers record their router's output while the model runs forward in training mode; hooks on the wrapped model clear
what was recorded before, and turn it into a loss after. The weight of that loss follows the task loss: with
`num_items_in_batch` (gradient accumulation in the HF Trainer) a micro-batch weighs in by its share of the tokens,
otherwise by 1.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Any, cast

import torch
from torch import nn

from mola.architecture.layer_stacks import LayerStacks
from mola.errors import MolaError
from mola.tuner.added_loss import LossSigns, add_loss
from mola.tuner.config import MolaConfig
from mola.tuner.labels import labels_of
from mola.tuner.layer import MolaLinear
from mola.tuner.router_statistics import (
    RouterOutput,
    RouterStatistics,
    balance_loss,
    pool,
    router_statistics,
    z_loss,
)
from mola.tuner.router_warnings import RouterWarnings

Stacks = list[tuple[list[int | None], RouterStatistics]]  # of routers: their decoder layers, and what they gave
_ATTRIBUTE = "_mola_router_losses"


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
        self._follows_items = True  # whether the model's loss is of its share of `num_items_in_batch`
        self._warnings = RouterWarnings()
        self._signs = LossSigns()
        self._layers: list[MolaLinear] = []
        self._stacks = LayerStacks.of(model)
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for layer in self._layers:
            layer.router_losses = self

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
            if not torch.compiler.is_compiling():
                self._look_outside_training(kwargs)
            return
        self._clear()
        adapters = self._active_adapters()
        configs = [self._config(name) for name in adapters]
        self.collecting = self._has_outputs = any(_wants_loss(config) for config in configs)
        for name, config in zip(adapters, configs, strict=True):
            self._warnings.look_at(name, self._layers, has_balance_loss=config.router_aux_loss_coef > 0)
        if self.collecting:
            self._signs.check()
            if getattr(module, "_is_replica", False):
                raise MolaError(
                    "`router_aux_loss_coef` and `router_z_loss_coef` do not work under nn.DataParallel, whose copies "
                    "of the model share no state. Use one process per device (torchrun, accelerate launch) or one GPU."
                )
            inputs = call_arguments(module, args, kwargs)
            unshifted, self._follows_items = labels_of(self.model, [config.task_type for config in configs])
            self._set_masks(inputs, unshifted=unshifted)

    def _look_outside_training(self, kwargs: dict[str, Any]) -> None:
        names = self._active_adapters()
        self._warnings.look_outside_training(names, self._layers)
        # Last what costs something: this runs for each generated token, which has no gradients.
        if (
            torch.is_grad_enabled()
            and kwargs.get("labels") is not None
            and any(map(_wants_loss, map(self._config, names)))
        ):
            self._warnings.say_left_out(self._layers)

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if not self.collecting:
            return output
        self.collecting = False
        loss = self.weighted_loss()
        return output if loss is None else self._attach(output, loss, call_arguments(module, args, kwargs))

    def _clear(self) -> None:
        for layer in self._layers:
            # Also drops what a recomputation under gradient checkpointing stored after the last forward. A new dict,
            # since a compiler that sees the old one cleared makes another graph for one that is empty.
            if torch.compiler.is_compiling() or layer.router_outputs:
                layer.router_outputs = {}
                layer.router_runs = {}
        self._attention_mask = self._label_mask = None
        self._has_outputs = False

    # ------------------------------------------------------------------ the loss

    def weighted_loss(self) -> torch.Tensor | None:
        """What the router losses of the last training forward pass add to a loss; None where no router has run."""
        terms = [term for name in self._active_adapters() if (term := self._weighted_loss(name)) is not None]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else None

    def balance_loss(self, adapter_name: str) -> torch.Tensor:
        """Balance loss of the last training forward pass, before its coefficient (scalar, float32).

        Raises:
            MolaError: no training forward pass with a router loss switched on has run yet.
        """
        stacks = self._statistics(adapter_name)
        if not stacks:
            raise MolaError(
                "No router has run: run a forward pass in training mode first, with `router_aux_loss_coef` or "
                "`router_z_loss_coef` above 0 and more than one expert somewhere, and ask before the next pass in eval "
                "mode, which forgets it."
            )
        return self._reduce(adapter_name, stacks)

    def _reduce(self, adapter_name: str, stacks: Stacks) -> torch.Tensor:
        if self._config(adapter_name).router_aux_loss_reduction == "layer":
            layers = defaultdict(list)
            for indices, statistics in stacks:
                for row, index in enumerate(indices):
                    router = RouterStatistics(*(each[row] for each in statistics))
                    layers[index, router.expert_counts.shape[-1]].append(router)
            # Routers of a layer are pooled, those with as many experts; on one device, as layers may be on several.
            per_layer = [balance_loss(pool(routers)) for routers in layers.values()]
            total = torch.stack([each.to(per_layer[0].device) for each in per_layer]).sum()
            # A layer without a router, since it has one expert, adds exactly 1 in the paper's code.
            single = {layer.layer_index for layer in self._layers if layer.num_experts.get(adapter_name) == 1}
            return total + len(single - {index for index, _ in layers})
        return _mean([balance_loss(statistics) for _, statistics in stacks])

    def _weighted_loss(self, adapter_name: str) -> torch.Tensor | None:
        config = self._config(adapter_name)
        stacks = self._statistics(adapter_name)
        if not stacks or not _wants_loss(config):
            return None
        self._refuse_reentrant_checkpointing(adapter_name)
        loss = config.router_aux_loss_coef * self._reduce(adapter_name, stacks)
        if config.router_z_loss_coef > 0:
            loss = loss + config.router_z_loss_coef * _mean([z_loss(statistics) for _, statistics in stacks])
        return loss

    def _statistics(self, adapter_name: str) -> Stacks:
        """Statistics of the routers that ran; those that saw as many tokens and have as many experts are one stack."""
        alike: dict[Any, list[list[tuple[int | None, RouterOutput]]]] = defaultdict(list)
        for layer in self._layers:
            output = layer.router_outputs.get(adapter_name)
            if output is None:
                continue
            shape = layer.num_experts[adapter_name], layer.top_k[adapter_name]
            runs = layer.router_runs.get(adapter_name, 1)
            key = *shape, output.logits.device, self._stacks.is_encoder(layer.layer_index), runs
            # Numbers of tokens are compared, not looked up: compiled code would be made anew for each of them.
            same = [each for each in alike[key] if each[0][1].logits.shape[0] == output.logits.shape[0]]
            if not same:
                same = [[]]
                alike[key] += same
            same[0].append((layer.layer_index, output))
        stacks = []
        for runs, routers in ((key[-1], each) for key, found in alike.items() for each in found):
            indices, outputs = zip(*routers, strict=True)
            stacked = RouterOutput(*(torch.stack(each) for each in zip(*outputs, strict=True)))
            mask = self._token_mask(adapter_name, stacked.logits.shape[1], indices[0], runs)
            stacks.append((list(indices), router_statistics(stacked, mask)))
        return stacks

    def _refuse_reentrant_checkpointing(self, adapter_name: str) -> None:
        trained = [
            layer.router_outputs[adapter_name].logits
            for layer in self._layers
            if adapter_name in layer.router_outputs and layer.mola_router[adapter_name].requires_grad
        ]
        if torch.is_grad_enabled() and not all(logits.requires_grad for logits in trained):
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
            output.log_probs = add_loss(log_probs, loss, getattr(output, "label_mask", None), self._signs)
        num_items = inputs.get("num_items_in_batch")
        # Models of other tasks take it too, and leave their loss as it is.
        is_followed = num_items is not None and self._label_mask is not None and self._follows_items
        share = cast(Any, self._label_mask).sum() / num_items if is_followed else 1.0
        weighted = loss * (share.to(loss.device) if isinstance(share, torch.Tensor) else share)
        if torch.is_tensor(getattr(output, "loss", None)) and not isinstance(output, tuple):
            output.loss = output.loss + weighted.to(output.loss.device)
        elif isinstance(output, dict) and torch.is_tensor(output.get("loss")):
            output = {**output, "loss": output["loss"] + weighted.to(output["loss"].device)}
        elif hasattr(output, "_replace") and torch.is_tensor(getattr(output, "loss", None)):
            output = output._replace(loss=output.loss + weighted.to(output.loss.device))
        elif isinstance(output, tuple) and inputs.get("labels") is not None and torch.is_tensor(output[0]):
            output = (output[0] + weighted.to(output[0].device), *output[1:])
        elif not torch.is_tensor(log_probs):
            self._warnings.warn_once(
                "no loss",
                "The model returned no loss, so the router losses were not added to it. Add them yourself: "
                "`loss = loss + model.get_router_loss()`.",
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

    def _token_mask(
        self, adapter_name: str, num_tokens: int, layer_index: int | None, runs: int
    ) -> torch.Tensor | None:
        """The `(num_tokens,)` mask of counted tokens, or None when all count.

        The "layer" reduction counts padding, as the paper's code does. A module that sees another
        number of tokens than the mask has (experts of a MoE base) counts all of its own. One that runs several times
        in a forward pass (ALBERT's) sees the tokens as often.
        """
        if self._config(adapter_name).router_aux_loss_reduction == "layer":
            return None
        # The attention mask is of the encoder's tokens, which cross attention reads too; labels are the decoder's.
        both = (self._attention_mask, self._label_mask)
        in_encoder = bool(self._stacks.num_encoder_layers) and self._stacks.is_encoder(layer_index)
        found = [mask for mask in (both[:1] if in_encoder else both) if mask is not None]
        masks = [m.reshape(-1).repeat(runs) for m in found if num_tokens == runs * m.numel()]
        if self._stacks.num_encoder_layers:
            masks = masks[-1:]
        if not masks:
            return None
        return masks[0] if len(masks) == 1 else masks[0] * masks[1].to(masks[0].device)

    # ------------------------------------------------------------------ small things

    def _config(self, adapter_name: str) -> Any:
        return cast(Any, self.model).peft_config.get(adapter_name)

    def _active_adapters(self) -> list[str]:
        for layer in self._layers:
            if not layer.disable_adapters:
                return [name for name in layer.active_adapters if isinstance(self._config(name), MolaConfig)]
        return []


def call_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module`, all by name."""
    if not args:
        return kwargs
    return {**inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments, **kwargs}


def _mean(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([each.to(values[0].device) for each in values]).mean()


def _wants_loss(config: MolaConfig) -> bool:
    return config.router_aux_loss_coef > 0 or config.router_z_loss_coef > 0
