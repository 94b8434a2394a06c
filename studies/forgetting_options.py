"""What the study of forgetting trains: kinds of questions, recipes, settings that are the same for all, options."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mola.data.sample import DEFAULT_KINDS
from mola.data.sample_topics import TOPICS
from mola.errors import MolaError
from mola.files.marked_pages import check_page
from mola.options.fields import option

KINDS = {
    topic.category.split()[0].lower(): topic.category for topic in TOPICS[:DEFAULT_KINDS]
}  # names that folders can have
_MIXTURES = {name: {"num_experts": name, "r": 8, "lora_alpha": 16, "top_k": 2} for name in ("5555", "2468", "8642")}
_BALANCE = {"router_aux_loss_coef": 0.001, "router_aux_loss_reduction": "layer"}  # as the research code's `obalance`
# LoRA of rank 43 has as many trained values as the mixtures with their routers.
RECIPES: dict[str, dict[str, Any]] = {"lora": {"num_experts": 1, "r": 43, "lora_alpha": 86}, **_MIXTURES}
RECIPES |= {f"{name}-balance": {**mixture, **_BALANCE} for name, mixture in _MIXTURES.items()}
CONTRASTS: dict[str, Any] = {"2468": ["5555", "8642"], **{f"{name}-balance": name for name in _MIXTURES}}
# The same for all recipes. A rate that sinks to 0 lets every stage end calmly.
# float32, since processors differ in how they compute bfloat16, and many take several times as long.
TRAINING = {"dtype": "float32", "template": "alpaca_short", "cutoff_len": 256, "lora_dropout": 0.0, "adam_beta2": 0.99}
TRAINING |= {"per_device_train_batch_size": 4, "lr_scheduler_type": "linear", "warmup_steps": 0.1}
TRAINING |= {"attn_implementation": "eager"}
QUIET = {"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False, "expert_telemetry": False}
QUIET |= {"disable_tqdm": True, "scoring": "likelihood", "test_batch_size": 40}
_ORDERS = math.factorial(len(KINDS)) - 1  # one is that of the search
_SET_HERE = (
    "base_model",
    "task",
    "data",
    "output_dir",
    "stages",
    "seed",
    "data_seed",
    "test_split",
    "filters",
    "adapter",
)
_SET_HERE += ("num_train_epochs", "overwrite_output_dir", *TRAINING, *QUIET)


@dataclass
class ForgettingOptions:
    """Options of the study."""

    base_model: str = option(".cache/SmolLM2-135M-Instruct", "Folder of the base model.")
    output_dir: str = option("runs/forgetting", "Where data, locks and unfinished sequences are kept.")
    record: str = option("studies/forgetting.json", "File of all results.")
    recipes: dict[str, Any] | str | None = option(None, "Name -> options of `mola train`; a mapping. Default: seven.")
    reference: str = option("lora", "Recipe that the others are compared with.")
    contrasts: dict[str, Any] | str | None = option(
        None, "Also compare recipes with each other: recipe -> another, or a list of them; a mapping. Default: five."
    )
    seeds: list[int] = field(
        default_factory=lambda: [*range(15)],
        metadata={"help": "Seeds of new experts and of samples; each has an order of the kinds of its own."},
    )
    learning_rate: float = option(0.002, "Learning rate of recipes without one of their own, where none is searched.")
    rates: list[float] = field(
        default_factory=list, metadata={"help": "Learning rates to search among, for recipes without one of their own."}
    )
    tuning_seeds: list[int] = field(default_factory=lambda: [100], metadata={"help": "Seeds of that search."})
    num_train_epochs: float = option(3.0, "Passes over the training questions of a stage.")
    train_size: int = option(80, "Training questions of each kind.")
    validation_size: int = option(30, "Validation questions of each kind.")
    test_size: int = option(40, "Test questions of each kind.")
    at_most: int | None = option(None, "Stop after so many sequences; 0 prints the tables only.")
    page: str | None = option(None, "When nothing is left, also write the tables into this page, between its markers.")


def check(options: ForgettingOptions, recipes: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse options that are out of range or contradict each other, before anything is made."""
    for name in ("seeds", "rates", "tuning_seeds"):
        values = getattr(options, name)
        if len(set(values)) != len(values) or not (values or name == "rates"):
            raise MolaError(f"`{name}` must be different numbers, at least one: got {values}.")
    if shared := set(options.seeds) & set(options.tuning_seeds if options.rates else ()):
        raise MolaError(f"`tuning_seeds` must be others than `seeds`: both have {sorted(shared)}.")
    if not 0 <= min(options.seeds) <= max(options.seeds) < _ORDERS:
        raise MolaError(
            f"`seeds` must be 0 to {_ORDERS - 1}, since each has an order of the kinds of its own: got {options.seeds}."
        )
    if options.reference not in recipes:
        raise MolaError(f"`reference` must be one of the recipes {', '.join(recipes)}: got {options.reference!r}.")
    for recipe, values in recipes.items():
        if wrong := sorted(set(values) & set(_SET_HERE)):
            raise MolaError(f"`{wrong[0]}` cannot be set in `recipes.{recipe}`: it is the same for all. Leave it out.")
    if options.page is not None:
        check_page(options.page)


def order_of(seed: int | None) -> list[str]:
    """The order of the kinds that a seed of the study has for itself; None: that of the search.

    Sequences that shared an order would depend on each other where an order suits a recipe.
    """
    every = [list(order) for order in itertools.permutations(KINDS)]
    random.Random(0).shuffle(every)
    return every[0 if seed is None else 1 + seed]
