"""Which code computes attention: whether it is there, and whether it fits a model."""

import torch
from transformers import AutoModelForCausalLM

from mola.errors import MolaError
from mola.models.base_model import load_config


def check_attention(
    attn_implementation: str | None,
    dtype: torch.dtype,
    base_model: str,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
) -> None:
    """Refuse an attention that is not installed, or that model or dtype cannot have; loads no weights.

    Args:
        attn_implementation: as in Transformers (`"eager"`, `"sdpa"`, `"flash_attention_2"` ...); None for its default.
        dtype: that of the base model.
        base_model: folder or hub id.
        trust_remote_code: run code shipped with the model.
        gguf_file: GGUF file in that folder, which holds everything.

    Raises:
        MolaError: one of these.
    """
    if attn_implementation is None:
        return
    if "flash" in attn_implementation and dtype == torch.float32:
        raise MolaError(
            f"`attn_implementation` {attn_implementation!r} computes in half precision only, and `dtype` is float32. "
            "Pass --dtype bfloat16, or --attn_implementation sdpa."
        )
    config = load_config(base_model, trust_remote_code, gguf_file)
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(
                config, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            )
    except (ValueError, ImportError) as error:
        raise MolaError(
            f"`attn_implementation` must be one that is installed and that the model knows, such as sdpa or eager: "
            f"{attn_implementation!r} cannot be used with {base_model!r} ({' '.join(str(error).split())})."
        ) from error
