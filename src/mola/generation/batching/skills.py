"""The skills of a model from a skills folder in a running batch; see `mola.tuner.skills`."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mola.generation.batching.rows import TOGETHER
from mola.tuner.skills.decision import Name


def lora_folder(skills_folder: str, name: str) -> str:
    """The LoRA of a skill in a skills folder; of skills that answer together, the one that is asked first."""
    return os.path.join(skills_folder, name.split(TOGETHER)[0])


def one_name(name: Name) -> str | None:
    """A decision as one name: "a+b" for skills that answer together, None for the base model."""
    return TOGETHER.join(name) or None if isinstance(name, tuple) else name


class Skills:
    """Gives each row its skill; it has the interface of `Adapters`.

    Args:
        model: a base model with skills.
    """

    can_mix = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self.runtime = model.skills

    @contextmanager
    def activate(self, names: Sequence[str | None], is_lasting: bool) -> Iterator[dict[str, Any]]:
        """Give each row its skill during a `with` block.

        Args:
            names: skill of each row, or several with "+" between them; None for the base model.
            is_lasting: not used.

        Yields:
            No further arguments for the model.
        """
        with self.runtime.use([() if name is None else tuple(name.split(TOGETHER)) for name in names]):
            yield {}

    def decide(self, prompts: Sequence[Sequence[int]]) -> list[str | None]:
        """The skill that answers each prompt (token ids), in the form of `activate`."""
        if not self.runtime.asked:
            return [None] * len(prompts)
        return [one_name(name) for name in self.runtime.decide(prompts).names]

    def delete(self, name: str) -> None:
        """Remove a skill, which no row uses."""
        self.runtime.remove(name)

    def restore(self) -> None:
        """Nothing to do: skills change no weight and no layer of the model."""

    def refresh(self) -> None:
        """Nothing to do; see `restore`."""
