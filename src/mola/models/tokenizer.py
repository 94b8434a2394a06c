"""Loads the tokenizers of base models, unchanged or with a padding token."""

import functools
import logging
import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from mola._compat import own_tokenizers
from mola.errors import MolaError
from mola.models.base_model import check_base_model, read_config, vocabulary_size

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TOKENIZER_FILES = (*_VOCABULARY_FILES, "tokenizer_config.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")

logger = logging.getLogger(__name__)

_warn_once = functools.cache(logger.warning)


def load_tokenizer(
    base_model: str | os.PathLike[str],
    padding_side: str = "left",
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    *,
    config: PretrainedConfig | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the base model with a padding token; the vocabulary never grows.

    A tokenizer without a padding token pads with the unknown token or else the end token. Padded positions are masked,
    so the choice changes no result.

    Args:
        base_model: folder or hub id.
        padding_side: `"left"` for generation, `"right"` for training.
        trust_remote_code: run code shipped with the model.
        gguf_file: GGUF file in that folder; its tokenizer is used only if the folder has no tokenizer of its own.
        config: the model's configuration, if it has been read.

    Returns:
        The tokenizer.

    Raises:
        MolaError: see `check_base_model`; there is no tokenizer, or it has no token to pad with.
    """
    name = os.fspath(base_model)
    if config is None:
        check_base_model(base_model, gguf_file)
        config = read_config(name, trust_remote_code, gguf_file)
    tokenizer = own_tokenizer(name, trust_remote_code, gguf_file, padding_side=padding_side)
    pads, vocabulary = tokenizer.pad_token_id, vocabulary_size(config)
    if pads is None or (vocabulary is not None and pads >= vocabulary):
        substitute = tokenizer.unk_token if tokenizer.unk_token is not None else tokenizer.eos_token
        if substitute is None:
            raise MolaError(
                f"`base_model` has a tokenizer without padding, unknown or end token: {name!r}. "
                "Set `pad_token` in its tokenizer_config.json to an existing token."
            )
        tokenizer.pad_token = substitute
        what = "no padding token" if pads is None else f"the padding token {pads}, which the model does not know"
        _warn_once("The tokenizer of %s has %s; padding with %r.", name, what, substitute)
    return tokenizer


def own_tokenizer(
    base_model: str, trust_remote_code: bool = False, gguf_file: str | None = None, **settings: Any
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the base model unchanged; `load_tokenizer` adds a padding token.

    `settings` go to `AutoTokenizer.from_pretrained`.

    Raises:
        MolaError: there is no tokenizer.
    """
    folder = Path(base_model)
    arguments: dict[str, str] = {}
    if gguf_file is not None and not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        logger.warning(
            "The tokenizer is rebuilt from %s, without its rules for splitting text before the vocabulary is used: "
            "for example, digits may become different tokens. To avoid this, put the model's tokenizer.json and "
            "tokenizer_config.json beside the file.",
            gguf_file,
        )
        arguments = {"gguf_file": gguf_file}
    # Transformers before 5.17 returns a tokenizer with next to no vocabulary.
    if folder.is_dir() and not arguments and not any(any(folder.glob(each)) for each in _TOKENIZER_FILES):
        raise MolaError(f"`base_model` has no tokenizer: {base_model!r} holds none of {', '.join(_TOKENIZER_FILES)}.")
    try:
        return AutoTokenizer.from_pretrained(
            base_model, trust_remote_code=trust_remote_code, **arguments, **own_tokenizers(), **settings
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        hint = ""
        if any(folder.glob("*.model")) and not (is_sentencepiece_available() and is_protobuf_available()):
            hint = " Its tokenizer.model needs: pip install 'mola-peft[sentencepiece]'"
        raise MolaError(f"`base_model` has no tokenizer that loads: {base_model!r}: {error}{hint}") from error
