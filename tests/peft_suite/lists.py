"""The two lists beside this file: what does not apply to mola and why, and which of LoRA's tests apply."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from mola.errors import MolaError
from tests.peft_suite.cases import KINDS

REASONS = {
    "mixture": "a mixture cannot do this",
    "design": "mola behaves differently on purpose",
    "test": "the test makes an assumption that does not hold",
    "hub": "the test downloads",
    "rounding": "the result depends on rounding, so the test passes on some CPUs",
}
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class NotApplicable:
    """Tests that fail, and must fail; those of the kind `rounding` may also pass.

    Attributes:
        tests: regular expression over all of `test_file.py::TestClass::test_name[case]`.
        kind: one of `REASONS`.
        error: part of the error's type and message; another error is a failure.
        reason: one or two sentences.
    """

    tests: str
    kind: str
    error: str
    reason: str


@dataclass(frozen=True)
class WrittenForLora:
    """Tests that name `LoraConfig` themselves and hold for any method: ours takes its place.

    Attributes:
        tests: regular expression as in `NotApplicable`.
        config: name of the class in `cases.py` that takes the place.
    """

    tests: str
    config: str


@dataclass(frozen=True)
class Lists:
    """Both lists."""

    not_applicable: tuple[NotApplicable, ...]
    written_for_lora: tuple[WrittenForLora, ...]

    @classmethod
    def load(cls) -> Lists:
        """Read the files.

        Raises:
            MolaError: an entry has other fields, an unknown kind, or no valid regular expression.
        """
        return cls(
            tuple(_read("not_applicable.yaml", NotApplicable, "kind", REASONS)),
            tuple(_read("written_for_lora.yaml", WrittenForLora, "config", [kind.__name__ for kind in KINDS])),
        )

    def exception(self, test: str) -> NotApplicable | None:
        """The entry a test is listed under, if any."""
        return next((entry for entry in self.not_applicable if re.fullmatch(entry.tests, test)), None)

    def lora_test(self, test: str) -> WrittenForLora | None:
        """The entry of a test that was written for LoRA, if any."""
        return next((entry for entry in self.written_for_lora if re.fullmatch(entry.tests, test)), None)


def _read(name: str, entry_class, field: str, allowed) -> list:
    entries = []
    for number, values in enumerate(yaml.safe_load((_FOLDER / name).read_text(encoding="utf-8")), start=1):
        try:
            entry = entry_class(**{key: " ".join(value.split()) for key, value in values.items()})
            re.compile(entry.tests)
        except (TypeError, AttributeError, re.error) as error:
            raise MolaError(f"Entry {number} of {name} is not valid: {error}.") from error
        if getattr(entry, field) not in allowed:
            raise MolaError(
                f"Entry {number} of {name}: `{field}` must be one of {list(allowed)}, got {getattr(entry, field)!r}."
            )
        entries.append(entry)
    return entries
