"""`RouterLosses`: adds the routers' balance loss and z-loss to the loss that the wrapped model returns.

1. Before a forward pass in training mode, a hook on the model clears old records and notes which tokens count.
2. During the forward pass, each `MolaLinear` records the output of its router.
3. After the forward pass, a second hook turns the records into a loss and adds it to the model's output.

The formulas of the losses are in `router_statistics`; `counted_tokens` says which tokens count. In gradient
accumulation, the Trainer divides the model's loss by the tokens of all micro-batches (`num_items_in_batch`). The router
losses of a micro-batch are then multiplied by its share of these tokens.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from mola.architecture.layer_stacks import LayerStacks
from mola.errors import MolaError
from mola.tuner.config import MolaConfig
from mola.tuner.counted_tokens import CountedTokens
from mola.tuner.layer import MolaLinear
from mola.tuner.log_prob_loss import LikelihoodCheck, add_loss_to_log_probs
from mola.tuner.router_statistics import RouterOutput, RouterStatistics, balance_loss, pool, router_statistics, z_loss
from mola.tuner.router_warnings import RouterWarnings

# Routers whose outputs have equal shapes: their decoder layers, and their stacked statistics.
StatisticsGroup = tuple[list[int | None], RouterStatistics]
_ATTRIBUTE = "_mola_router_losses"


class _RouterGroup(NamedTuple):
    """Routers whose outputs have equal shapes: their decoder layers and outputs, in the same order."""

    num_calls: int  # calls of each router in the forward pass
    layer_indices: list[int | None]
    outputs: list[RouterOutput]


class RouterLosses:
    """Collects router outputs in a model's training forward passes, and adds their losses to the model's loss.

    Attributes:
        model: the wrapped model.
        collecting: whether layers record their router's output in the current forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.collecting = False
        self._has_outputs = False  # whether layers may hold outputs of an earlier forward pass
        self._warnings = RouterWarnings()
        self._likelihood_check = LikelihoodCheck()  # checks trainers that compute their loss from log-probabilities
        self._layers: list[MolaLinear] = []
        self._first_router_layer: dict[str, MolaLinear] = {}  # for each adapter, the first layer where it has a router
        self._layer_stacks = LayerStacks.of(model)
        self._counted_tokens = CountedTokens(model, self._layer_stacks)
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
        """The `RouterLosses` of a model, connected to all its `MolaLinear`; the first call creates it and its hooks."""
        losses = getattr(model, _ATTRIBUTE, None)
        if losses is None:
            losses = cls(model)
            setattr(model, _ATTRIBUTE, losses)
        losses._layers = [module for module in model.modules() if isinstance(module, MolaLinear)]
        losses._first_router_layer = {name: layer for layer in losses._layers[::-1] for name in layer.mola_router}
        for layer in losses._layers:
            layer.router_losses = losses
        return losses

    @staticmethod
    def remove(model: nn.Module) -> None:
        """Remove the hooks from a model, if it has any."""
        losses = getattr(model, _ATTRIBUTE, None)
        if losses is not None:
            for handle in losses._handles:
                handle.remove()
            delattr(model, _ATTRIBUTE)

    # ------------------------------------------------------------------ hooks

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Clear old records. In training mode, start recording and note which tokens count."""
        if not module.training:
            # Avoid a loop over layers: this runs for each generated token, and `torch.compile` guards all it reads.
            self.collecting = False
            if self._has_outputs:
                self._clear()
            if not torch.compiler.is_compiling():
                self._warn_in_evaluation(kwargs)
            return
        self._clear()
        adapters = self._active_adapters()
        configs = [self._config(name) for name in adapters]
        self.collecting = self._has_outputs = any(_has_router_loss(config) for config in configs)
        for name, config in zip(adapters, configs, strict=True):
            if config.router_aux_loss_coef == 0:  # with a balance loss every router has a gradient
                self._warnings.check_gradient(name, self._layers)
            self._warnings.check_precision(name, self._first_router_layer.get(name))
        if self.collecting:
            self._likelihood_check.raise_if_violated()
            if getattr(module, "_is_replica", False):
                raise MolaError(
                    "`router_aux_loss_coef` and `router_z_loss_coef` do not work under nn.DataParallel, whose copies "
                    "of the model share no state. Use one process per device (torchrun, accelerate launch) or one GPU."
                )
            task_types = {config.task_type for config in configs}
            self._counted_tokens.read(call_arguments(module, args, kwargs), task_types)

    def _warn_in_evaluation(self, kwargs: dict[str, Any]) -> None:
        names = self._active_adapters()
        for name in names:
            self._warnings.check_precision(name, self._first_router_layer.get(name))
        # The cheap conditions come first, because this runs for each generated token.
        computes_loss = torch.is_grad_enabled() and kwargs.get("labels") is not None
        if computes_loss and any(_has_router_loss(self._config(name)) for name in names):
            self._warnings.check_training_mode(self._layers)

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Add the router losses of this forward pass to the model's output."""
        if not self.collecting:
            return output
        self.collecting = False
        loss = self.weighted_loss()
        return output if loss is None else self._attach(output, loss, call_arguments(module, args, kwargs))

    def _clear(self) -> None:
        for layer in self._layers:
            # Gradient checkpointing records outputs again in the backward pass; they are cleared here, too.
            # A new dict is assigned because `torch.compile` would recompile if the old one were emptied.
            if torch.compiler.is_compiling() or layer.router_outputs:
                layer.router_outputs = {}
                layer.router_calls = {}
        self._counted_tokens.clear()
        self._has_outputs = False

    # ------------------------------------------------------------------ from records to a loss

    def weighted_loss(self) -> torch.Tensor | None:
        """Balance loss and z-loss of the last training forward pass, times their coefficients.

        Returns a float32 scalar, summed over the active adapters; None if no active adapter has both recorded outputs
        and a router loss.
        """
        terms = [term for name in self._active_adapters() if (term := self._weighted_loss_of(name)) is not None]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else None

    def balance_loss(self, adapter_name: str) -> torch.Tensor:
        """See `MolaModel.get_balance_loss`."""
        groups = self._statistics(adapter_name)
        if not groups:
            raise no_records_error()
        return self._reduce_balance_loss(adapter_name, groups)

    def _weighted_loss_of(self, adapter_name: str) -> torch.Tensor | None:
        config = self._config(adapter_name)
        groups = self._statistics(adapter_name)
        if not groups or not _has_router_loss(config):
            return None
        self._refuse_reentrant_checkpointing(adapter_name)
        loss = config.router_aux_loss_coef * self._reduce_balance_loss(adapter_name, groups)
        if config.router_z_loss_coef > 0:
            loss = loss + config.router_z_loss_coef * _mean([z_loss(statistics) for _, statistics in groups])
        return loss

    def _reduce_balance_loss(self, adapter_name: str, groups: list[StatisticsGroup]) -> torch.Tensor:
        if self._config(adapter_name).router_aux_loss_reduction == "module":
            return _mean([balance_loss(statistics) for _, statistics in groups])
        # "layer": pool those routers of a layer that have equally many experts, then sum over layers.
        layers = defaultdict(list)
        for layer_indices, statistics in groups:
            for row, layer_index in enumerate(layer_indices):
                router = RouterStatistics(*(each[row] for each in statistics))
                layers[layer_index, router.expert_counts.shape[-1]].append(router)
        per_layer = [balance_loss(pool(routers)) for routers in layers.values()]
        total = torch.stack([each.to(per_layer[0].device) for each in per_layer]).sum()
        # A layer with one expert has no router; it adds exactly 1 in the paper's code.
        single = {layer.layer_index for layer in self._layers if layer.num_experts.get(adapter_name) == 1}
        return total + len(single - {layer_index for layer_index, _ in layers})

    def _statistics(self, adapter_name: str) -> list[StatisticsGroup]:
        """Statistics of the routers that ran. Routers whose outputs have equal shapes share tensors.

        With the reduction "layer" all tokens are counted, including padding, as in the paper's code.
        """
        statistics = []
        for num_calls, layer_indices, outputs in self._groups_of_equal_shape(adapter_name):
            stacked = RouterOutput(*(torch.stack(tensors) for tensors in zip(*outputs, strict=True)))
            mask = None
            if self._config(adapter_name).router_aux_loss_reduction == "module":
                mask = self._counted_tokens.mask(stacked.logits.shape[1], layer_indices[0], num_calls)
            statistics.append((layer_indices, router_statistics(stacked, mask)))
        return statistics

    def _groups_of_equal_shape(self, adapter_name: str) -> list[_RouterGroup]:
        groups_of: dict[Any, list[_RouterGroup]] = defaultdict(list)
        for layer in self._layers:
            output = layer.router_outputs.get(adapter_name)
            if output is None:
                continue
            sizes = layer.num_experts[adapter_name], layer.top_k[adapter_name]
            num_calls = layer.router_calls.get(adapter_name, 1)
            candidates = groups_of[
                *sizes, output.logits.device, self._layer_stacks.is_encoder(layer.layer_index), num_calls
            ]
            # The number of tokens is compared here instead of being part of the key: `torch.compile` would otherwise
            # recompile for every new number.
            for group in candidates:
                if group.outputs[0].logits.shape[0] == output.logits.shape[0]:
                    group.layer_indices.append(layer.layer_index)
                    group.outputs.append(output)
                    break
            else:
                candidates.append(_RouterGroup(num_calls, [layer.layer_index], [output]))
        return [group for candidates in groups_of.values() for group in candidates]

    def _refuse_reentrant_checkpointing(self, adapter_name: str) -> None:
        """Raise MolaError if re-entrant checkpointing has detached the logits of a trainable router from the graph."""
        trainable_logits = [
            layer.router_outputs[adapter_name].logits
            for layer in self._layers
            if adapter_name in layer.router_outputs and layer.mola_router[adapter_name].requires_grad
        ]
        if torch.is_grad_enabled() and not all(logits.requires_grad for logits in trainable_logits):
            raise MolaError(
                "`router_aux_loss_coef` and `router_z_loss_coef` do not work with re-entrant gradient "
                "checkpointing: router losses would have no gradient. Pass "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )

    # ------------------------------------------------------------------ from the loss to the model's output

    def _attach(self, output: Any, loss: torch.Tensor, inputs: dict[str, Any]) -> Any:
        """The model's output with the router losses `loss` added to its task loss; warns if it has no task loss."""
        log_probs = getattr(output, "log_probs", None)
        if torch.is_tensor(log_probs):
            # TRL's SFTTrainer computes its loss from the log-probabilities and ignores `output.loss`.
            label_mask = getattr(output, "label_mask", None)
            output.log_probs = add_loss_to_log_probs(log_probs, loss, label_mask, self._likelihood_check)
        weighted = loss * self._counted_tokens.share_of_batch(inputs.get("num_items_in_batch"), loss.device)

        def add_to(task_loss: torch.Tensor) -> torch.Tensor:
            return task_loss + weighted.to(task_loss.device)

        has_loss = torch.is_tensor(getattr(output, "loss", None))
        if has_loss and not isinstance(output, tuple):
            output.loss = add_to(output.loss)
        elif isinstance(output, dict) and torch.is_tensor(output.get("loss")):
            output = {**output, "loss": add_to(output["loss"])}
        elif has_loss and hasattr(output, "_replace"):  # a named tuple
            output = output._replace(loss=add_to(output.loss))
        elif isinstance(output, tuple) and inputs.get("labels") is not None and torch.is_tensor(output[0]):
            output = (add_to(output[0]), *output[1:])
        elif not torch.is_tensor(log_probs):
            self._warnings.warn_once(
                "no loss",
                "The model returned no loss, so the router losses could not be added. Add them yourself: "
                "`loss = loss + model.get_router_loss()`.",
            )
        return output

    def _config(self, adapter_name: str) -> Any:
        return cast(Any, self.model).peft_config.get(adapter_name)

    def _active_adapters(self) -> list[str]:
        for layer in self._layers:
            if not layer.disable_adapters:
                return [name for name in layer.active_adapters if isinstance(self._config(name), MolaConfig)]
        return []


def no_records_error() -> MolaError:
    """The error for asking for a router loss without recorded router outputs."""
    return MolaError(
        "No router has run: run a forward pass in training mode first, with `router_aux_loss_coef` or "
        "`router_z_loss_coef` above 0 and more than one expert somewhere. Ask for the loss before the next pass in "
        "eval mode, which clears the records, and keep the same active adapters."
    )


def call_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of `module` by name."""
    if not args:
        return kwargs
    return {**inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments, **kwargs}


def _mean(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([each.to(values[0].device) for each in values]).mean()


def _has_router_loss(config: MolaConfig) -> bool:
    return config.router_aux_loss_coef > 0 or config.router_z_loss_coef > 0
