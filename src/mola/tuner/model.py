"""`MolaModel`: puts MoLA layers into any PyTorch model, layer by layer with its own number of experts."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from mola._compat import asks_before_loading, ties_saved_modules
from mola.architecture.allocation import StackShape
from mola.architecture.layer_stacks import LayerStacks, config_of
from mola.architecture.linears import is_adaptable
from mola.architecture.targets import find_stacks, resolve_target_modules
from mola.errors import MolaError
from mola.tuner.config import MolaConfig
from mola.tuner.frozen import flags_kept
from mola.tuner.heads import add_head
from mola.tuner.layer import MolaLinear
from mola.tuner.loading import check_adapter_tensors, check_model_type, check_when_loaded
from mola.tuner.merging import check_not_replicated, check_own_weights
from mola.tuner.mixed_batch import RowAdapters
from mola.tuner.names import check_names
from mola.tuner.per_layer import PerLayer
from mola.tuner.places import check_places
from mola.tuner.reference_adapter import copy_experts, original_of
from mola.tuner.replication import replicated_layers
from mola.tuner.rescaling import stop_fast_paths, stop_rescaling
from mola.tuner.router_losses import RouterLosses
from mola.tuner.saved_modules import check_not_inside, resolved, tie
from mola.tuner.stacked import StackedParameters
from mola.tuner.undoing import taken_back


class MolaModel(BaseTuner):
    """A model whose targeted linears are `MolaLinear` (paper, section 3), and its stacked experts `StackedParameters`.

    Made by `get_peft_model(model, MolaConfig(...))`; PEFT works on it: several adapters, also in one batch
    (`adapter_names`), `disable_adapter`, `delete_adapter`, `modules_to_save`, saving and loading. The passed
    configuration is copied, so one object can be used for models of different depth.

    Not possible: merging more than one expert, whose gates depend on the input, and `add_weighted_adapter`; both raise.
    PEFT's `hotswap_adapter`, `rescale_adapter_scale` and `PeftMixedModel` are for PEFT's own methods.
    """

    prefix: str = "mola_"
    tuner_layer_cls = (MolaLinear, StackedParameters)  # type: ignore[assignment] # PEFT only asks whether one is such
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's attribute; see _prepare_adapter_config

    @staticmethod
    def get_model_config(model: nn.Module) -> Any:
        """The base model's configuration, as a mapping; PEFT's may be None or an object that is none."""
        return config_of(model) or {"model_type": "custom"}

    # ------------------------------------------------------------------ injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Replace the targeted linears; every way of adding an adapter passes here.

        Raises:
            MolaError: a target matches nothing, or the per-layer numbers do not fit the model.
        """
        original = original_of(adapter_name, self.peft_config)
        self._passed_config = self.peft_config[adapter_name]
        config = copy.deepcopy(self.peft_config[adapter_name])
        if not isinstance(config, MolaConfig):
            raise MolaError(
                f"Adapter {adapter_name!r} has peft_type {config.peft_type}; all adapters of a model must be of "
                "one kind, here MOLA."
            )
        if config.bias != "none" and not asks_before_loading(BaseTuner):
            raise MolaError(
                f"`bias` {config.bias!r} needs PEFT 0.21 or newer, which saves trained biases: "
                "upgrade peft, or pass 'none'."
            )
        if config.ensure_weight_tying and config.modules_to_save and not ties_saved_modules(BaseTuner):
            raise MolaError("`ensure_weight_tying` with `modules_to_save` needs PEFT 0.19 or newer: upgrade peft.")
        # Whatever is saved again can lose tensors, also by the name of another adapter.
        if not all(each.inference_mode for each in self.peft_config.values()):
            check_names(self.peft_config, model)
        # A copy: filling in what depends on this model must not change the user's object.
        self.peft_config[adapter_name] = config
        # A saved one says what it is of: what it has trained is in its file.
        self._is_new = config.base_model_type is None and config.weights_sha256 is None
        found = getattr(getattr(model, "config", None), "model_type", None)
        check_model_type(config.base_model_type, found)
        config.base_model_type = found or config.base_model_type
        add_head(model, config, self._is_new)
        with replicated_layers(model, config.layer_replication), taken_back(model, adapter_name):
            self._inject(model, adapter_name, config, *args, **kwargs)
        stop_rescaling(model)
        stop_fast_paths(model)
        if original is not None:
            copy_experts(model, original, adapter_name)
        RouterLosses.install(model)
        if not asks_before_loading(BaseTuner):
            check_when_loaded(model)

    def _inject(self, model: nn.Module, adapter_name: str, config: MolaConfig, *args: Any, **kwargs: Any) -> None:
        """Resolve what depends on the model, and put the adapter into it."""
        self._stacks = LayerStacks.of(model)
        if config.target_modules or config.target_modules is None or not config.target_parameters:
            config.target_modules, config.exclude_modules = resolve_target_modules(
                model, self._stacks, config.target_modules, config.exclude_modules
            )
        # Without decoder layers (one custom block, say) a single value still means something.
        self._per_layer = PerLayer.resolved(config, self._stacks.num_layers or 1)
        self._stacked = self._find_stacks(model, config)
        modules = dict(model.named_modules())
        adapted = [name for name in modules if name and self._check_target_module_exists(config, name)]
        check_not_inside(adapted, modules)
        config.modules_to_save = resolved(config.modules_to_save, modules, is_new=self._is_new)
        check_places(config, modules, adapted, self._per_layer, self._stacks, self._stacked, self._is_new)
        with warnings.catch_warnings():
            # PEFT looks for them among linears only; `check_places` has looked everywhere.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        with flags_kept(self):
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not for mixtures: gates of several routers have no sum.

        Raises:
            MolaError: always.
        """
        raise MolaError(
            "`add_weighted_adapter` cannot add up mixtures, whose routers choose for themselves. `mola convert --to "
            "lora` makes LoRAs of them, which PEFT adds up, and `mola convert --from lora` a mixture of LoRAs."
        )

    def _find_stacks(self, model: nn.Module, config: MolaConfig) -> list[StackShape]:
        if not config.target_parameters:
            return []
        # As for linears, so that `exclude_modules` and `layers_to_transform` leave parameters out, too.
        named = copy.copy(config)
        named.target_modules = set(config.target_parameters)
        return find_stacks(model, config.target_parameters, lambda name: self._check_target_module_exists(named, name))

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: Any) -> None:
        # PEFT goes on with the user's object, so it is told there, too.
        tie(self.model, (peft_config, self._passed_config), tied_weight_keys)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config  # done before, in inject_adapter, where the model's modules are known

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **optional_kwargs: Any,
    ) -> None:
        index = self._stacks.index(current_key)
        settings = self._per_layer.settings(peft_config, current_key, index)
        if isinstance(target, MolaLinear):
            target.update_layer(adapter_name, settings, inference_mode=peft_config.inference_mode)
            return
        if not is_adaptable(target):
            raise MolaError(
                f"`target_modules` matches {current_key!r}, a {type(target).__name__}. Only linear maps can be "
                "adapted (nn.Linear, Conv1D of Transformers, quantised linears); use `modules_to_save` to train "
                "other modules in full."
            )
        layer = MolaLinear(target, adapter_name, settings, layer_index=index, inference_mode=peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trainable until it is set active
        self._replace_module(parent, target_name, layer, target)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        # In place of PEFT's, which nests one wrapper per parameter: here one has all of a module's.
        for stack in self._stacked:
            target: Any = model.get_submodule(stack.module)
            if not isinstance(target, StackedParameters):
                target = StackedParameters(target, adapter_name)
                parent, _, name = stack.module.rpartition(".")
                setattr(model.get_submodule(parent), name, target)
            settings = replace(
                self._per_layer.settings(peft_config, stack.name, stack.layer_index), num_experts=1, top_k=1
            )
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                target.update_layer(adapter_name, stack, settings, inference_mode=peft_config.inference_mode)
        names = [stack.name for stack in self._stacked]
        # PEFT before 0.21 does not read what is returned.
        self.targeted_parameter_names = list(dict.fromkeys([*self.targeted_parameter_names, *names]))
        return names

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        # PEFT's would look for a weight, which packed linears need not have either.
        is_base = isinstance(child, MolaLinear) and new_module is child.base_layer
        if is_base or isinstance(child, (StackedParameters, AuxiliaryTrainingWrapper)):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    # ------------------------------------------------------------------ what differs from other methods

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters with one expert into the base weights, see PEFT; the active ones by default.

        Raises:
            MolaError: one of them has several experts somewhere; no layer has been touched then.
        """
        self.check_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def check_mergeable(self, adapter_names: list[str] | None = None) -> None:
        """Whether adapters, by default the active ones, could be merged: asked of all layers before one is touched.

        Raises:
            MolaError: several experts somewhere, a quantised base layer, or layers that share their weights.
        """
        for adapter_name in self.active_adapters if adapter_names is None else adapter_names:
            config = self.peft_config.get(adapter_name)
            check_not_replicated(getattr(config, "layer_replication", None), f"Adapter {adapter_name!r}")
        for name, module in self.model.named_modules():
            if isinstance(module, MolaLinear):
                for adapter_name in module.active_adapters if adapter_names is None else adapter_names:
                    module.check_mergeable(adapter_name, repr(name))
        check_own_weights(self.model, self.active_adapters if adapter_names is None else adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self.check_mergeable(adapter_names)
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        RouterLosses.remove(model)
        return model

    def save_pretrained_merged(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what unsloth hangs on a base model, where PEFT would find it: no program reads what it would save.

        Raises:
            MolaError: always.
        """
        raise MolaError(
            "A merged or GGUF file cannot hold a mixture, whose gates depend on the input: save the adapter with "
            "`save_pretrained`. With one expert everywhere, call `merge_and_unload` first. With several, `mola convert "
            "ADAPTER --to lora --rank R ...` writes the plain LoRA nearest to it, and `mola merge` then a model."
        )

    push_to_hub_merged = save_pretrained_gguf = push_to_hub_gguf = save_pretrained_merged

    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        return nullcontext() if adapter_names is None else RowAdapters(self, adapter_names, kwargs)

    def get_balance_loss(self, adapter_name: str | None = None) -> torch.Tensor:
        """Balance loss of the last forward pass, if that was in training mode, before its coefficient.

            loss = E * sum_e f_e P_e       of each router, with E experts

        where `f_e` is the share of an expert in all choices, and `P_e` its mean softmax probability (Fedus et al. 2021,
        equations 4 to 6): 1 when perfectly even, E at most. With "module" tokens count by the `attention_mask` and
        `labels` of the call; "layer" counts all, takes a layer's routers together, and adds 1 for a layer without one.

        Args:
            adapter_name: default: the first active adapter.

        Returns:
            Scalar, float32: the mean over routers ("module"), or the sum over decoder layers ("layer").

        Raises:
            MolaError: there is no such adapter, or the last pass was none in training mode with a router loss on.
        """
        if adapter_name is not None and adapter_name not in self.peft_config:
            raise MolaError(f"`adapter_name` must be one of {', '.join(self.peft_config)}: got {adapter_name!r}.")
        return RouterLosses.install(self.model).balance_loss(adapter_name or self.active_adapters[0])

    def get_router_loss(self) -> torch.Tensor:
        """Balance loss and z-loss of the last forward pass, times their coefficients, summed over active adapters.

        The z-loss is the mean over tokens of `logsumexp(logits) ** 2` (Zoph et al. 2022, equation 5), and over routers.
        For training loops that compute their own loss, before any pass in eval mode: `loss = loss +
        model.get_router_loss()`. A scalar, float32. Raises as `get_balance_loss`, and with re-entrant checkpointing.
        """
        loss = RouterLosses.install(self.model).weighted_loss()
        return self.get_balance_loss() if loss is None else loss  # which says what is missing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, not its `forward` as PEFT before 0.21 does: hooks add the routers' losses."""
        return self.model(*args, **kwargs)

    # ------------------------------------------------------------------ saving and loading

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        # Those that were only used may be called as modules are, until something is saved.
        check_names(unwanted_adapter_names, model)
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_adapter_tensors(model, adapter_name, remapped)
        return remapped
