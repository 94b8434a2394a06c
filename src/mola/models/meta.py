"""Builds a model without weights, from its configuration on the meta device; this takes a moment and no memory."""

from __future__ import annotations

import copy
import os

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mola.architecture.layer_stacks import LayerStacks
from mola.errors import MolaError
from mola.models.base_model import check_base_model, check_own_code, one_line, read_config


def model_on_meta(
    base_model: str,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    *,
    config: PretrainedConfig | None = None,
) -> PreTrainedModel:
    """Build a causal language model from its configuration only.

    `base_model` is a folder with config.json, a config.json file, or a name on the hub. `config` is its configuration,
    if it has been read; it is not changed.

    Raises:
        MolaError: no configuration can be read, or the model is not a causal language model.
    """
    if config is None:
        place = os.path.expanduser(base_model) if gguf_file is None else base_model
        if gguf_file is None and not os.path.isfile(place):
            check_base_model(place)
        config = read_config(place, trust_remote_code, gguf_file)
    else:
        config = copy.deepcopy(config)  # Transformers writes a dtype into it
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError) as error:
        check_own_code(base_model, error)
        raise MolaError(
            f"`base_model` must be a causal language model: {base_model!r} of type "
            f"{config.model_type!r} cannot be built as one ({one_line(error)})."
        ) from error


def count_decoder_layers(model: PreTrainedModel, base_model: str) -> int:
    """Number of decoder layers of a model; raises if it has none."""
    num_layers = LayerStacks.of(model).num_layers
    if num_layers is None or num_layers < 1:
        raise MolaError(
            f"`base_model` must have decoder layers: found {num_layers or 'none'} in {base_model!r}. "
            "Check `num_hidden_layers` in its config.json."
        )
    return num_layers
