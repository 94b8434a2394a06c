"""`mola merge`: writes base model and adapter as one ordinary model folder.

mola merge lora --base_model my-model --output merged
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors import safe_open

from mola.checkpoints.adapter_folder import read_tensors
from mola.errors import MolaError
from mola.exporting.options import MergeOptions
from mola.files.atomic import atomic_write_json, check_new_folder, write_new_folder
from mola.files.failures import memory_error_reason
from mola.generation.predicting import end_token_ids
from mola.models.adapters import check_adapter, check_fits, check_lora
from mola.models.base_model import load_config
from mola.models.devices import DTYPES
from mola.models.loading import load_model
from mola.models.meta import model_on_meta
from mola.models.prompts import copy_template_name, own_chat, use_chat, warn_of_unknown_tokens
from mola.models.quantization import stored_quantization
from mola.models.tokenizer import own_tokenizer
from mola.options.command_line import command_line, next_steps
from mola.tuner import MolaConfig
from mola.tuner.merging import check_no_shared_weights

__all__ = ["MergeOptions", "main", "merge"]


def merge(options: MergeOptions) -> Path:
    """Add an adapter's update to the weights of its base model and write the model with its tokenizer.

    Args:
        options: see `MergeOptions`.

    Returns:
        The folder written.

    Raises:
        MolaError: the adapter is a mixture or does not fit, the base model is quantised, or the folder is not empty.
    """
    adapter = os.path.expanduser(options.adapter)
    output = check_new_folder("output", options.output)
    config: Any = load_config(options.base_model, options.trust_remote_code)
    _check_mergeable(options, adapter, config)
    tokenizer = own_tokenizer(options.base_model, options.trust_remote_code)
    dtype = _own_dtype(config, options.base_model) if options.dtype == "auto" else options.dtype
    model: Any = load_model(options.base_model, adapter, dtype, options.device, options.trust_remote_code)
    check_no_shared_weights(model)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        if isinstance(error, MolaError) or memory_error_reason(error):
            raise
        raise MolaError(f"`adapter` cannot be merged: {shlex.quote(adapter)}: {error}") from error
    embeddings, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if embeddings and head and embeddings.weight is not head.weight:
        merged.config.get_text_config().tie_word_embeddings = False  # PEFT before 0.20 leaves it true
    chat = own_chat(adapter)
    if chat is not None:
        warn_of_unknown_tokens(adapter, chat, tokenizer)
        use_chat(tokenizer, chat)
    with write_new_folder("output", output) as folder:
        _save(merged, folder, None if chat is None else end_token_ids(merged, tokenizer))
        tokenizer.save_pretrained(folder)
        copy_template_name(adapter, folder)
    return output


def _check_mergeable(options: MergeOptions, adapter: str, config: Any) -> None:
    """Raise before the weights are loaded if the adapter cannot be merged into the base model."""
    kind = check_adapter(adapter)["peft_type"]
    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING[kind], "merge_and_unload"):
        raise MolaError(f"`adapter` must be of a method that merges, such as LoRA: {shlex.quote(adapter)} is {kind}.")
    if (method := stored_quantization(config)) is not None:
        raise MolaError(
            f"`base_model` must not be quantised to be merged into: {options.base_model!r} is stored by {method}. Pass "
            "the model that it was made from."
        )
    if options.trust_remote_code:  # the model's own code may not work without weights
        return
    if kind == "LORA":
        on_meta = model_on_meta(options.base_model)
        check_lora(Path(adapter), on_meta)  # puts the LoRA into the model
        check_no_shared_weights(on_meta)
    elif kind == "MOLA":
        on_meta = model_on_meta(options.base_model)
        mixture: Any = check_fits(on_meta, MolaConfig.from_pretrained(adapter), read_tensors(Path(adapter)))
        mixture.base_model.check_mergeable()


def _own_dtype(config: Any, base_model: str) -> str:
    """Name of the dtype in the configuration, else of the weights in the folder; float32 if `DTYPES` lacks it."""
    own = getattr(config, "dtype", None)
    files = sorted(Path(os.path.expanduser(base_model)).glob("*.safetensors")) if own is None else []
    if files:
        with safe_open(files[0], "pt") as file:
            own = file.get_tensor(next(iter(file.keys()))).dtype
    return next((name for name, dtype in DTYPES.items() if dtype == own), "float32")


def _save(model: Any, folder: Path, end_tokens: list[int] | None) -> None:
    """Save a model; `end_tokens`, if given, replace the tokens that end an answer in its generation settings.

    The settings are written without Transformers, which refuses to save some settings of older base models, for example
    a temperature without sampling.
    """
    own: Any = getattr(model, "generation_config", None)
    if own is None:
        model.save_pretrained(folder)
        return
    settings = json.loads(own.to_json_string())
    known = settings.get("eos_token_id")
    if end_tokens is not None and end_tokens != (known if isinstance(known, list) else [known]):
        settings["eos_token_id"] = end_tokens
    model.generation_config = type(own)()
    model.save_pretrained(folder)
    atomic_write_json(folder / "generation_config.json", settings)


def main(options: MergeOptions) -> int:
    """Merge and print where the model is; returns 0, the exit code."""
    output = str(merge(options))
    serve = command_line("serve", {"base_model": output, "trust_remote_code": options.trust_remote_code})
    print(f"written to {output}", next_steps(serve), sep="\n")
    return 0
