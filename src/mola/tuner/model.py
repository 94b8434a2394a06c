"""`MolaModel`: replaces the targeted linears of a model by `MolaLinear`, and saves, loads and merges them with PEFT.

- Injection: `inject_adapter` resolves the configuration for this model, checks it, and replaces the linears.
- Losses: `get_balance_loss`, `get_router_loss`; `RouterLosses` adds them to the model's loss.
- Most methods with a leading underscore override PEFT's.
"""

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

from mola._compat import has_load_hook, ties_saved_modules
from mola.architecture.allocation import StackShape
from mola.architecture.layer_stacks import LayerStacks, config_of
from mola.architecture.targets import find_stacks, resolve_target_modules
from mola.errors import MolaError
from mola.tuner.config import MolaConfig
from mola.tuner.injection_checks import check_adapter_names, check_base_model, check_injection
from mola.tuner.layer import MolaLinear, keep_requires_grad
from mola.tuner.loading import check_adapter_tensors, check_on_load_state_dict
from mola.tuner.merging import check_no_shared_weights
from mola.tuner.mixed_batch import RowAdapters
from mola.tuner.per_layer import PerLayer
from mola.tuner.router_losses import RouterLosses, no_records_error
from mola.tuner.saved_modules import add_task_heads, resolve_modules_to_save, tie_saved_embeddings
from mola.tuner.stacked import StackedParameters


class MolaModel(BaseTuner):
    """A model whose targeted linears are `MolaLinear` (paper, section 3), and targeted parameters `StackedParameters`.

    `get_peft_model(model, MolaConfig(...))` creates one. It supports PEFT's features: several adapters, also in one
    batch (`adapter_names`), `disable_adapter`, `delete_adapter`, `modules_to_save`, saving and loading. The passed
    configuration is copied, so one object can be used for models of different depth.

    These raise an error: merging several experts (their gates depend on the input), `add_weighted_adapter`, and
    unsloth's methods that save merged or GGUF files. PEFT's `hotswap_adapter`, `rescale_adapter_scale` and
    `PeftMixedModel` support PEFT's own adapter types only.
    """

    prefix: str = "mola_"
    tuner_layer_cls = (MolaLinear, StackedParameters)  # type: ignore[assignment] # PEFT only uses it in `isinstance`
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's attribute; `_resolve` has the defaults

    @staticmethod
    def get_model_config(model: nn.Module) -> Any:
        """The base model's configuration as a mapping; PEFT's method may return None or an object."""
        return config_of(model) or {"model_type": "custom"}

    # ------------------------------------------------------------------ injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Replace the linears that an adapter targets. PEFT calls this for every new or loaded adapter.

        Raises:
            MolaError: a target matches nothing, the per-layer numbers do not fit the model, or the installed PEFT
                does not support a setting. The model is left unchanged.
        """
        passed = self._passed_config = self.peft_config[adapter_name]
        if not isinstance(passed, MolaConfig):
            raise MolaError(
                f"Adapter {adapter_name!r} has peft_type {passed.peft_type}; all adapters of this model must be of "
                "one kind, here MOLA."
            )
        _check_peft_version(passed)
        # Adapters for inference only are checked when they are saved, in `_get_adapter_state_dict`.
        if not all(each.inference_mode for each in self.peft_config.values()):
            check_adapter_names(self.peft_config, model)
        check_base_model(passed, model)
        # Values that depend on this model are written into a copy, so that the user's object does not change.
        config = self.peft_config[adapter_name] = copy.deepcopy(passed)
        is_new = config.base_model_type is None and config.weights_sha256 is None
        config.base_model_type = getattr(getattr(model, "config", None), "model_type", None) or config.base_model_type
        add_task_heads(model, config, is_new=is_new)
        self._resolve(model, config, is_new=is_new)
        with warnings.catch_warnings():
            # PEFT compares the keys of patterns with linears only; `check_injection` compares them with parameters too.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            try:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            except BaseException:
                _delete_experts(model, adapter_name)
                raise
        _disable_fast_paths(model)
        original = self._original_of_reference(adapter_name, passed)
        if original is not None:
            _copy_experts(model, original, adapter_name)
        RouterLosses.install(model)
        if not has_load_hook(BaseTuner):
            check_on_load_state_dict(model)

    def _resolve(self, model: nn.Module, config: MolaConfig, *, is_new: bool) -> None:
        """Write module names and numbers per layer into the configuration, and check that they fit the model."""
        self._layer_stacks = LayerStacks.of(model)
        has_no_linears = config.target_parameters and config.target_modules is not None and not config.target_modules
        if not has_no_linears:
            config.target_modules, config.exclude_modules = resolve_target_modules(
                model, self._layer_stacks, config.target_modules, config.exclude_modules
            )
        # A model without decoder layers counts as one layer.
        self._per_layer = PerLayer.resolve(config, self._layer_stacks.num_layers or 1)
        self._parameter_stacks = self._find_parameter_stacks(model, config)
        modules = dict(model.named_modules())
        adapted = [name for name in modules if name and self._check_target_module_exists(config, name)]
        config.modules_to_save = resolve_modules_to_save(config.modules_to_save, modules, is_new=is_new)
        check_injection(
            config, modules, adapted, self._per_layer, self._layer_stacks, self._parameter_stacks, is_new=is_new
        )

    def _find_parameter_stacks(self, model: nn.Module, config: MolaConfig) -> list[StackShape]:
        if not config.target_parameters:
            return []
        # Use PEFT's rule for linears, so that `exclude_modules` and `layers_to_transform` apply to parameters too.
        config_of_modules = copy.copy(config)
        config_of_modules.target_modules = set(config.target_parameters)
        return find_stacks(
            model, config.target_parameters, lambda name: self._check_target_module_exists(config_of_modules, name)
        )

    def _original_of_reference(self, adapter_name: str, passed: MolaConfig) -> str | None:
        """Name of the adapter that TRL is copying as its reference "ref"; None if `adapter_name` is no such copy.

        TRL adds the adapter "ref" with the configuration object of the adapter in training, and copies tensors whose
        names contain ".default.". The names of mola's tensors end with ".default", so TRL copies none of them,
        and mola copies them itself.
        """
        if adapter_name != "ref":
            return None
        same = [name for name, config in self.peft_config.items() if name != adapter_name and config is passed]
        return same[0] if same else None

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        with keep_requires_grad(self):
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: Any) -> None:
        # PEFT reads names from the user's configuration, and the model keeps a copy: both are updated.
        tie_saved_embeddings(self.model, (peft_config, self._passed_config), tied_weight_keys)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config  # `_resolve` has already chosen the targets

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
        """Wrap a targeted linear or, if it is a `MolaLinear`, add the adapter to it."""
        index = self._layer_stacks.index(current_key)
        settings = self._per_layer.settings(peft_config, current_key, index)
        if isinstance(target, MolaLinear):
            target.update_layer(adapter_name, settings, inference_mode=peft_config.inference_mode)
            return
        layer = MolaLinear(target, adapter_name, settings, layer_index=index, inference_mode=peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is trainable only after `set_adapter`
        self._replace_module(parent, target_name, layer, target)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Wrap the modules of `target_parameters`, and return the names of the parameters.

        PEFT's method nests one wrapper per parameter. One `StackedParameters` wraps all parameters of a module.
        """
        for stack in self._parameter_stacks:
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
        names = [stack.name for stack in self._parameter_stacks]
        # PEFT before 0.21 ignores the returned names.
        self.targeted_parameter_names = list(dict.fromkeys([*self.targeted_parameter_names, *names]))
        return names

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        # PEFT's method reads the attribute `weight`, which a packed base layer or a wrapper may lack.
        is_base = isinstance(child, MolaLinear) and new_module is child.base_layer
        if is_base or isinstance(child, (StackedParameters, AuxiliaryTrainingWrapper)):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    # ------------------------------------------------------------------ merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters with one expert into the base weights (see PEFT); the active ones by default.

        Raises:
            MolaError: see `check_mergeable`. No layer is changed.
        """
        self.check_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def check_mergeable(self, adapter_names: list[str] | None = None) -> None:
        """Check that adapters can be merged in all layers; the active adapters by default.

        Raises:
            MolaError: several experts in some layer, a quantised base layer, or a weight that two modules share.
        """
        for name, module in self.model.named_modules():
            if isinstance(module, MolaLinear):
                for adapter_name in module.active_adapters if adapter_names is None else adapter_names:
                    module.check_mergeable(adapter_name, repr(name))
        check_no_shared_weights(self.model, self.active_adapters if adapter_names is None else adapter_names)

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

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise MolaError: the gates of several routers cannot be added."""
        raise MolaError(
            "`add_weighted_adapter` cannot combine mixtures, because each has its own routers. `mola convert --to "
            "lora` turns them into LoRAs, which PEFT can combine, and `mola convert --from lora` turns LoRAs into a "
            "mixture."
        )

    def save_pretrained_merged(self, *args: Any, **kwargs: Any) -> None:
        """Raise MolaError. unsloth adds this method, and no program could read the file that it would write."""
        raise MolaError(
            "A merged or GGUF file cannot hold a mixture, because its gates depend on the input: save the adapter with "
            "`save_pretrained`. With one expert everywhere, call `merge_and_unload` first. With several, `mola convert "
            "ADAPTER --to lora --r R ...` writes the plain LoRA nearest to the mixture, which `mola merge` merges."
        )

    push_to_hub_merged = save_pretrained_gguf = push_to_hub_gguf = save_pretrained_merged

    # ------------------------------------------------------------------ forward and losses

    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        return nullcontext() if adapter_names is None else RowAdapters(self, adapter_names, kwargs)

    def get_balance_loss(self, adapter_name: str | None = None) -> torch.Tensor:
        """Balance loss of the last forward pass in training mode, not yet multiplied by its coefficient.

        For a router with `E` experts it is

            loss = E * sum_e f_e P_e

        where `f_e` is the fraction of the routing choices that went to expert `e`, and `P_e` its mean softmax
        probability (Fedus et al. 2021, equations 4 to 6). The loss is 1 if all experts are used equally, and at most E.

        With the reduction "module", only tokens that `attention_mask` and `labels` of the call select are counted. With
        "layer", all tokens are counted, the routers of a layer are pooled, and a layer without a router adds 1, as in
        the paper's code.

        Args:
            adapter_name: default: the first active adapter.

        Returns:
            Scalar, float32: the mean over routers ("module"), or the sum over decoder layers ("layer").

        Raises:
            MolaError: there is no adapter of this name, the last forward pass was in eval mode, or no router loss is
                switched on.
        """
        if adapter_name is not None and adapter_name not in self.peft_config:
            raise MolaError(f"`adapter_name` must be one of {', '.join(self.peft_config)}: got {adapter_name!r}.")
        return RouterLosses.install(self.model).balance_loss(adapter_name or self.active_adapters[0])

    def get_router_loss(self) -> torch.Tensor:
        """Balance loss and z-loss of the last forward pass, times their coefficients, summed over active adapters.

        The z-loss is the mean over tokens and routers of `logsumexp(logits) ** 2` (Zoph et al. 2022, equation 5).
        Training loops that compute their own loss add it with `loss = loss + model.get_router_loss()`, before the next
        forward pass.

        Returns:
            Scalar, float32.

        Raises:
            MolaError: see `get_balance_loss`; also with re-entrant gradient checkpointing.
        """
        loss = RouterLosses.install(self.model).weighted_loss()
        if loss is None:
            raise no_records_error()
        return loss

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, so that its hooks add the router losses; PEFT before 0.21 calls `model.forward` instead."""
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
        # `inject_adapter` does not check the names of adapters for inference.
        check_adapter_names(unwanted_adapter_names, model)
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_adapter_tensors(model, adapter_name, remapped)
        return remapped


def _check_peft_version(config: MolaConfig) -> None:
    if config.bias != "none" and not has_load_hook(BaseTuner):
        raise MolaError(
            f"`bias` {config.bias!r} needs PEFT 0.21 or newer, which saves trainable biases: "
            "upgrade peft, or pass 'none'."
        )
    if config.ensure_weight_tying and config.modules_to_save and not ties_saved_modules(BaseTuner):
        raise MolaError("`ensure_weight_tying` with `modules_to_save` needs PEFT 0.19 or newer: upgrade peft.")


def _disable_fast_paths(model: nn.Module) -> None:
    """Make PyTorch's own encoder layers call their linears; their fast paths would bypass the adapters."""
    for module in model.modules():
        if not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            continue
        if any(isinstance(part, (MolaLinear, StackedParameters)) for part in module.modules()):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False  # only the fast paths accept nested tensors
            else:
                module.activation_relu_or_gelu = 0  # 0 is another activation, which has no fast path


def _delete_experts(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter whose injection failed halfway: PEFT would save its experts with the other adapters."""
    for module in model.modules():
        if isinstance(module, (MolaLinear, StackedParameters)) and adapter_name in module.settings:
            module.delete_adapter(adapter_name)


@torch.no_grad()
def _copy_experts(model: nn.Module, source: str, target: str) -> None:
    """Give the adapter `target` the experts and routers of `source`, which have the same shapes."""
    for module in model.modules():
        if isinstance(module, (MolaLinear, StackedParameters)):
            for tensors in (getattr(module, name) for name in module.adapter_layer_names):
                if source in tensors:  # a new parameter: the dtype of `source` may differ
                    is_trainable = tensors[target].requires_grad
                    tensors[target] = nn.Parameter(tensors[source].detach().clone(), requires_grad=is_trainable)
