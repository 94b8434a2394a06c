"""`mola skills test`: who is asked for which data. Nobody answers: one pass through the lower layers decides.

mola skills test skills --data birds=birds_test.json rivers=rivers_test.json base=other_questions.json
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mola.checkpoints.skills_folder import BASE, SkillsFolder, read_skills
from mola.data.read import check_split
from mola.files.atomic import atomic_write_json, atomic_write_text
from mola.files.environment import software_versions
from mola.models.base_model import max_positions, weights_identity
from mola.models.from_options import check_model, model_for, tokenizer_for
from mola.models.skills import content_finder
from mola.options.fields import check_results
from mola.skills.deciding import decider_of
from mola.skills.measuring import features_at
from mola.skills.options import TestOptions
from mola.skills.prompts import DataSource, named_sources, read_prompts

MIXED_UP = 0.05  # share of a skill's prompts for which another one is asked, above which a warning is due


@dataclass(frozen=True)
class TestedPrompt:
    """Who is asked for one prompt.

    Attributes:
        prompt: the user's content, which the decision reads.
        asked: name of a skill, or "base" for the base model.
        margin: of the skill with the highest score: 1 at the mean of the skill's prompts, -1 at that of general text.
    """

    prompt: str
    asked: str
    margin: float


@dataclass(frozen=True)
class TestResult:
    """Who is asked for which prompts.

    Attributes:
        prompts: name of the data, "base" for data that no skill is for -> their prompts.
        threshold: a prompt goes to the base model if its margin is not above it.
        too_long: name of the data -> number of prompts left out, because the model cannot read them.
        settings: the options.
    """

    __test__ = False  # pytest would look for tests in it

    prompts: dict[str, list[TestedPrompt]]
    threshold: float
    too_long: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> dict[str, dict[str, int]]:
        """Name of the data -> name of a skill, or "base" for the base model -> number of prompts."""
        return {name: dict(Counter(each.asked for each in prompts)) for name, prompts in self.prompts.items()}

    @property
    def misses(self) -> list[tuple[str, TestedPrompt]]:
        """Prompts with the name of their data, for which neither it nor, of "base", the base model is asked."""
        return [(name, each) for name, prompts in self.prompts.items() for each in prompts if each.asked != name]

    @property
    def right(self) -> float:
        """Share of the prompts for which the skill of their data is asked; of data called "base" the base model."""
        total = sum(map(len, self.prompts.values()))
        return (total - len(self.misses)) / total

    @property
    def to_base(self) -> float:
        """Share of the skills' own prompts that the base model answers."""
        own = {name: counts for name, counts in self.asked.items() if name != BASE}
        return sum(counts.get(BASE, 0) for counts in own.values()) / max(
            sum(sum(each.values()) for each in own.values()), 1
        )

    @property
    def mixed_up(self) -> dict[tuple[str, str], float]:
        """Pairs of a skill's data and another skill, which is asked for more than 5 % of them -> the share."""
        return {
            (name, asked): count / sum(counts.values())
            for name, counts in self.asked.items()
            for asked, count in counts.items()
            if BASE not in (name, asked) and asked != name and count > MIXED_UP * sum(counts.values())
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "asked": self.asked,
            **asdict(self),
            "right": self.right,
            "to_base": self.to_base,
            "versions": software_versions(),
        }


def test(options: TestOptions) -> TestResult:
    """Decide for each prompt who is asked.

    Args:
        options: see `TestOptions`.

    Returns:
        The result; also written to `options.output`, and its misses to `options.misses`, if these are given.

    Raises:
        MolaError: the folder is damaged, its base model is another one, or data are unreadable or have unknown names.
    """
    check_results(options)
    folder = read_skills(options.folder)
    sources = named_sources(options.data, folder.path, folder.names, [BASE])
    folder.check_base(options.base_model, weights_identity(options.base_model))
    config, tokenizer = check_model(options), tokenizer_for(options)
    read = {
        name: read_prompts(_source(options, folder, name, path), tokenizer, options.limit, max_positions(config))
        for name, path in sources.items()
    }
    model, decider = model_for(options, None), decider_of(folder)
    finder = content_finder(tokenizer, [folder.adapter(name) for name in folder.names])
    prompts = {}
    for name, each in read.items():
        found = decider.decide_features(features_at(model, folder.layer, finder, each.ids))
        rows = zip(map(finder.text, each.ids), found.names, found.margins.tolist(), strict=True)
        prompts[name] = [TestedPrompt(text, asked or BASE, round(margin, 4)) for text, asked, margin in rows]
    too_long = {name: each.too_long for name, each in read.items() if each.too_long}
    result = TestResult(prompts, folder.threshold, too_long, asdict(options))
    if options.output is not None:
        atomic_write_json(options.output, result.to_dict())
    if options.misses is not None:
        misses = [{"expected": name, **asdict(each), "threshold": folder.threshold} for name, each in result.misses]
        atomic_write_text(options.misses, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in misses))
    return result


def _source(options: TestOptions, folder: SkillsFolder, name: str, path: str) -> DataSource:
    check_split("split", options.split, TestOptions.split, path)
    adapter: Path | None = None if name == BASE else folder.adapter(name)
    return DataSource(path, options.task, options.split, options.template, adapter=adapter)
