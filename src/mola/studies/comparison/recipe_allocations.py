"""What recipes of a comparison ask of `mola allocate`: read, and checked before it is known for which data."""

from collections.abc import Mapping
from typing import Any

from mola.errors import MolaError
from mola.options.fields import mapping

ALLOCATE = "allocate"  # key of a recipe whose `num_experts` comes from `mola allocate`


def allocations_of(recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each recipe asks that has `allocate`, by its name.

    Raises:
        MolaError: it lacks something, stands beside numbers of experts, or has a `probe` that is no recipe before it.
    """
    found = {name: _allocation(name, values) for name, values in recipes.items() if ALLOCATE in values}
    _check_probes(found, recipes)
    return found


def check_search_of_allocations(allocations: Mapping[str, Mapping[str, Any]], tuned: Mapping[str, Any]) -> None:
    """Refuse a search for what an allocation depends on: without a probe it is made once, for all candidates.

    Raises:
        MolaError: `tuned` has such an option.
    """
    for name, asked in allocations.items():
        of_all = {"target_modules", *(["template"] if "data" in asked else [])} if "probe" not in asked else set()
        if wrong := sorted((of_all - asked.keys()) & tuned.keys()):
            raise MolaError(
                f"`{wrong[0]}` cannot be in `tune`: `recipes.{name}.{ALLOCATE}` is made once, for all candidates, "
                "and depends on it. Leave one out."
            )


def _allocation(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    if values.get("num_experts") is not None:
        raise MolaError(f"`recipes.{name}` has `num_experts` and `{ALLOCATE}`, which gives another. Leave one out.")
    if name == "base":
        raise MolaError(f"`recipes.{name}` has `{ALLOCATE}`, whose file would be that of the base model. Rename it.")
    asked = mapping(f"recipes.{name}.{ALLOCATE}", values[ALLOCATE])
    if "method" not in asked or "budget" not in asked:
        raise MolaError(f"`recipes.{name}.{ALLOCATE}` must have `method` and `budget`: got {asked!r}.")
    return asked


def _check_probes(allocations: Mapping[str, Mapping[str, Any]], recipes: Mapping[str, Any]) -> None:
    """A probe is another recipe, trained before."""
    order = list(recipes)
    for name, asked in allocations.items():
        probe = asked.get("probe")
        if probe is not None and (probe not in recipes or order.index(probe) >= order.index(name)):
            raise MolaError(
                f"`recipes.{name}.{ALLOCATE}.probe` must be a recipe that stands before {name!r}: got {probe!r}."
            )
