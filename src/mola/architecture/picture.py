"""Numbers of experts as a short text, lowest layer first."""

from collections.abc import Mapping, Sequence
from itertools import groupby


def picture(numbers: Sequence[int | None]) -> str:
    """One digit per layer, such as "2244"; "." for None, a layer without experts.

    If a number is above 9: the layers of each number, such as "layers 0-1: 8, 2-3: 16".
    """
    if all(number is None or number < 10 for number in numbers):
        return "".join("." if number is None else str(number) for number in numbers)
    runs, first = [], 0
    for number, members in groupby(numbers):
        last = first + len(list(members)) - 1
        layers = str(first) if first == last else f"{first}-{last}"
        runs.append(f"{layers}: {'none' if number is None else number}")
        first = last + 1
    return f"layers {', '.join(runs)}"


def picture_of_modules(num_experts: Mapping[tuple[str, int], int], num_layers: int) -> list[str]:
    """The pictures of all modules, one line for modules with equal numbers.

    Args:
        num_experts: (name within the layer, layer) -> number of experts.
        num_layers: decoder layers of the model.

    Returns:
        One picture if all modules of every layer have equal numbers, else one line "names: picture" per picture.
    """
    names: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for name, _ in num_experts):
        numbers = [num_experts.get((name, layer)) for layer in range(num_layers)]
        names.setdefault(picture(numbers), []).append(name)
    if len(names) == 1:
        return list(names)
    return [f"{', '.join(modules)}: {line}" for line, modules in names.items()]
