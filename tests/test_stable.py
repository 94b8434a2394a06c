"""What version 1.0.0 made stable is still there, as docs/reference/stability.md promises.

`python -m tests.test_stable` adds what is new to the record. Run it for a release. It removes nothing.
"""

import dataclasses
import json
import re
from pathlib import Path

from peft import PeftConfig

import mola

RECORD = Path(__file__).parent / "golden" / "stable.json"
OPTIONS = Path(__file__).resolve().parents[1] / "docs" / "reference" / "options.md"  # a test holds it to the code


def names():
    """Everything stable that has a name -> its default, or an empty text."""
    found = {f"mola.{name}": "" for name in mola.__all__}
    own = {field.name for field in dataclasses.fields(mola.MolaConfig)}
    for name in own - {field.name for field in dataclasses.fields(PeftConfig)}:
        found[f"MolaConfig.{name}"] = json.dumps(getattr(mola.MolaConfig(), name))
    for section in OPTIONS.read_text(encoding="utf-8").split("\n## ")[1:]:
        command = section.partition("\n")[0]
        for option, default in re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|", section, re.M):
            found[f"{command} --{option}"] = default
    return dict(sorted(found.items()))


def test_nothing_stable_is_removed_or_has_another_default():
    stable = json.loads(RECORD.read_text(encoding="utf-8"))
    found = names()
    assert len(stable) > 400
    assert {name: default for name, default in stable.items() if found.get(name) != default} == {}


if __name__ == "__main__":
    kept = json.loads(RECORD.read_text(encoding="utf-8"))
    RECORD.write_text(json.dumps({**names(), **kept}, indent=1) + "\n", encoding="utf-8")
