"""The recipes of a comparison that names none: a LoRA, and mixtures with the same number of trainable parameters."""

from typing import Any

from mola.errors import MolaError
from mola.models.cost import cost_of_allocation
from mola.models.meta import model_on_meta
from mola.options.fields import is_folder_name
from mola.training.model import base_config
from mola.training.options import TrainOptions

LORA = "lora"
_MIXTURES = ("2468", "5555")
_SET_IN_RECIPES = ("adapter", "target_parameters", "num_experts_pattern", "rank_pattern", "alpha_pattern")


def default_recipes(options: TrainOptions) -> dict[str, dict[str, Any]]:
    r"""A LoRA, and the mixture `num_experts`; without this option the mixtures 2468 and 5555.

    Smaller mixtures get a higher rank, so that all have about the size of the largest. With the mean number `P` of the
    mixtures' trainable parameters, routers included, and the number `p` of a LoRA with rank 1, the rank of the LoRA is
    `P / p`, rounded. Each `lora_alpha` gives the update the scale that it has with `r`.

    Returns:
        Name of the recipe -> options of `mola train`. The LoRA is the first.

    Raises:
        MolaError: the base model cannot be read, or an option has no meaning for a LoRA of equal size.
    """
    if given := [name for name in _SET_IN_RECIPES if getattr(options, name) is not None]:
        raise MolaError(f"`recipes` must be set if `{given[0]}` is: a LoRA of equal size would not be comparable.")
    r = str(options.adapter_setting("r"))
    if not r.isdecimal():
        raise MolaError(f"`recipes` must be set if `r` differs by layer: got {r!r}.")
    config = base_config(options)
    base_model, top_k = str(options.base_model), options.adapter_setting("top_k")
    model = model_on_meta(base_model, options.trust_remote_code, options.gguf_file, config=config)

    def size(num_experts: str, rank: str) -> int:
        chosen = "1" if num_experts == "1" else top_k
        plan = cost_of_allocation(base_model, num_experts, chosen, rank, options.target_modules, model=model)
        return plan.trainable_parameters

    numbers = _MIXTURES if options.num_experts is None else (options.num_experts,)
    largest = max(size(each, r) for each in numbers)
    ranks = {each: round(int(r) * largest / size(each, r)) for each in numbers}
    rank = max(1, round(sum(size(each, str(ranks[each])) for each in numbers) / len(numbers) / size("1", "1")))
    mixtures = {
        each if is_folder_name(each) else "mixture": {"num_experts": each}
        | (with_rank(options, ranks[each]) if ranks[each] != int(r) else {})
        for each in numbers
    }
    return {LORA: {"num_experts": "1", "top_k": "1", **with_rank(options, rank)}, **mixtures}


def with_rank(options: TrainOptions, rank: int) -> dict[str, Any]:
    """The options `r` and `lora_alpha` of a rank whose update has the same scale as that of `options`."""
    scale = (rank / int(options.adapter_setting("r"))) ** (0.5 if options.adapter_setting("use_rslora") else 1.0)
    return {"r": str(rank), "lora_alpha": options.adapter_setting("lora_alpha") * scale}
