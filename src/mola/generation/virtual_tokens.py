"""Generation with methods of PEFT that put virtual tokens before a prompt, where PEFT does not find the cache.

Since Transformers 5.24 a model calls its cache `cache`. PEFT 0.21 looks for `past_key_values`: it adds virtual tokens
at every step anew, where a cache has those of before, and a prefix of keys and values reaches no model.
"""

import logging
from typing import Any

from peft import PeftModel, PeftType

from mola._compat import cache_argument, generation_finds_cache
from mola.errors import MolaError

logger = logging.getLogger(__name__)

_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE", "MULTITASK_PROMPT_PREFIX")
_told: list[PeftType] = []


def may_cache(model: Any) -> bool:
    """Whether `generate` of a model may keep keys and values.

    Raises:
        MolaError: its virtual tokens are keys and values themselves.
    """
    if not isinstance(model, PeftModel):
        return True
    # PEFT puts the base's there to switch tokens off, and afterwards the model's own.
    if getattr(vars(model).get("forward"), "__self__", model) is not model:
        return True
    config = model.active_peft_config
    if not config.is_prompt_learning:
        return True
    if cache_argument(model.get_base_model()) != "cache" or generation_finds_cache():
        return True
    if PeftType(config.peft_type).value in _PREFIXES:
        raise MolaError(
            f"`adapter` of type {PeftType(config.peft_type).value} cannot be generated with: the installed PEFT hands "
            "its prefix to no model of Transformers 5.24 or newer. Install an older Transformers, or a newer PEFT."
        )
    if config.peft_type not in _told:
        _told.append(config.peft_type)
        logger.warning(
            "Every token is made from the whole text: the installed PEFT cannot put the virtual tokens of %s before a "
            "cache of Transformers 5.24 or newer.",
            PeftType(config.peft_type).value,
        )
    return False
