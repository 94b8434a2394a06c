"""vLLM's load format `mola`: loads the base model by a different load format, and adds a mixture to its linears.

    --load-format mola --model-loader-extra-config '{"adapter": "FOLDER"}'

Other entries of the configuration: `load_format` of the base model ("auto" by default) and `untried_architecture` (true
accepts an architecture that was not tried). All further entries go to the base model's load format.

On a CPU the mixture is one operator for the compiler: generating loops for its small steps takes minutes and gains
nothing. The operator finds the mixture by name in the context of the forward pass, like vLLM's attention.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig, replace
from vllm.config.load import LoadConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.model_loader import BaseModelLoader, get_model_loader

from mola.errors import MolaError
from mola.integrations.vllm_server.linears import find_linears
from mola.integrations.vllm_server.mixture import FusedMixture, Product
from mola.integrations.vllm_server.parts import Adapter, Part, read_adapter

_TRIED_MODELS = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "PhiForCausalLM",
    "Phi3ForCausalLM",
    "OPTForCausalLM",
    "GPT2LMHeadModel",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "TransformersForCausalLM",  # Transformers' own model inside vLLM
)


def _add_mixture(output: torch.Tensor, x: torch.Tensor, name: str) -> None:
    get_forward_context().no_compile_layers[name](x, output)


_LIBRARY = torch.library.Library("mola_vllm", "FRAGMENT")
_LIBRARY.define("add_mixture(Tensor(a!) output, Tensor x, str name) -> ()", tags=(torch.Tag.needs_fixed_stride_order,))
_LIBRARY.impl("add_mixture", _add_mixture, "CPU")
_LIBRARY.impl("add_mixture", lambda *arguments: None, "Meta")


class MixtureLoader(BaseModelLoader):
    """Loads the base model in its own format and adds the mixture."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        own = dict(load_config.model_loader_extra_config)
        self._folder, inner = own.pop("adapter", None), own.pop("load_format", "auto")
        self._accepts_untried = own.pop("untried_architecture", False)
        if not isinstance(self._folder, str) or not self._folder:
            raise MolaError(
                "`--load-format mola` needs the adapter's folder: --model-loader-extra-config "
                f"""'{{"adapter": "FOLDER"}}'. Got {load_config.model_loader_extra_config!r}."""
            )
        self._base = get_model_loader(replace(load_config, load_format=inner, model_loader_extra_config=own))
        if type(self._base).load_model is not BaseModelLoader.load_model:
            raise MolaError(f"`load_format` {inner!r} fills a model in a way of its own. Pass 'auto', or leave it out.")
        self._adapter: Adapter | None = None
        self._parts_by_linear: dict[str, list[Part]] = {}

    def download_model(self, model_config: ModelConfig) -> None:
        """Download the base model."""
        self._base.download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Load the weights of the base model."""
        self._base.load_weights(model, model_config)

    def create_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Create the model without weights, and find every linear of the adapter in it."""
        model = super().create_model(vllm_config, model_config, prefix)
        assert self._adapter is not None
        _check_architecture(model, self._accepts_untried)
        self._parts_by_linear = find_linears(model, self._adapter.parts)
        return model

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Load the model with the mixture; everything is checked before the weights are read."""
        _check_engine(vllm_config, model_config)
        self._adapter = read_adapter(self._folder, model_config.model, model_config.trust_remote_code)
        # The key of the cache of compiled code includes this, but not the loader's own settings.
        vllm_config.additional_config["mola"] = self._adapter.digest
        model = super().load_model(vllm_config, model_config, prefix)
        device = torch.device(self.load_config.device or vllm_config.device_config.device)
        for name, parts in self._parts_by_linear.items():
            _add(model.get_submodule(name), parts, device, vllm_config.compilation_config.static_forward_context)
        return model


def _check_engine(vllm_config: VllmConfig, model_config: ModelConfig) -> None:
    if vllm_config.lora_config is not None:
        raise MolaError(
            "`--enable-lora` must be off with `--load-format mola`: both adapt the same linears. Leave it out."
        )
    if vllm_config.speculative_config is not None:
        raise MolaError("`--speculative-config` must be off with `--load-format mola`, which was not tried with it.")
    if vllm_config.kv_transfer_config is not None:
        raise MolaError(
            "`--kv-transfer-config` and `--kv-offloading-size` must be off with `--load-format mola`: they could reuse "
            "keys and values of a different adapter. Leave them out."
        )
    if model_config.use_mla:
        raise MolaError(
            f"`--load-format mola` cannot serve {model_config.model!r}: its attention (MLA) reads weights past their "
            "linears. Serve the adapter with `mola serve`, without --engine vllm."
        )
    if not isinstance(vllm_config.additional_config, dict):
        raise MolaError(f"`--additional-config` must be a dictionary, got {vllm_config.additional_config!r}.")


def _check_architecture(model: nn.Module, accepts_untried: Any) -> None:
    name = type(model).__name__
    if name not in _TRIED_MODELS and not accepts_untried:
        raise MolaError(
            f"`--load-format mola` was not tried with {name}; tried are {', '.join(_TRIED_MODELS)}. vLLM may have its "
            'columns in a different order. To try it, add "untried_architecture": true to --model-loader-extra-config '
            "and compare answers with `mola generate`."
        )


def _add(layer: Any, parts: list[Part], device: torch.device, named: dict[str, Any]) -> None:
    """Make a linear add the updates of its parts after its own method has computed the output."""
    is_sum = type(layer) is RowParallelLinear and layer.tp_size > 1
    reduce = tensor_model_parallel_all_reduce if is_sum else None
    is_cpu = device.type == "cpu"
    layer.mola = FusedMixture(parts, layer.params_dtype, device, reduce, _linear_of_vllm if is_cpu else None)
    layer.requires_unquantized_input = True
    name = f"{layer.prefix}.mola"
    named[name] = layer.mola
    compute, method = layer.quant_method.apply, copy.copy(layer.quant_method)

    def apply(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        output = compute(layer, x, bias)
        if not (is_cpu and torch.compiler.is_compiling()):
            return layer.mola(x, output)
        torch.ops.mola_vllm.add_mixture(output, x, name)
        return output

    method.apply = apply
    layer.quant_method = method


def _linear_of_vllm(matrix: torch.Tensor) -> Product:
    """vLLM's own CPU product with a constant matrix, which is faster than torch's on some processors."""
    method, holder = UnquantizedLinearMethod(), nn.Module()
    holder.weight = nn.Parameter(matrix, requires_grad=False)
    method.process_weights_after_loading(holder)
    return functools.partial(method.apply, holder)
