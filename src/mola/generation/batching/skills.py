"""The skills of a model from a skills folder in a running batch; see `mola.tuner.skills`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


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
            names: skill of each row; None for the base model.
            is_lasting: not used.

        Yields:
            No further arguments for the model.
        """
        with self.runtime.use(list(names)):
            yield {}

    def decide(self, prompts: Sequence[Sequence[int]]) -> list[str | None]:
        """The skill that answers each prompt (token ids), in the form of `activate`."""
        if not self.runtime.asked:
            return [None] * len(prompts)
        return list(self.runtime.decide(prompts).names)

    def delete(self, name: str) -> None:
        """Remove a skill, which no row uses."""
        self.runtime.remove(name)

    def restore(self) -> None:
        """Nothing to do: skills change no weight and no layer of the model."""

    def refresh(self) -> None:
        """Nothing to do; see `restore`."""
