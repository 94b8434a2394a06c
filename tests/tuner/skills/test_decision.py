"""Which skill is asked, on prompts whose features are drawn around a place of each skill."""

from dataclasses import replace

import pytest
import torch

from mola.errors import MolaError
from mola.tuner.skills.decision import Decider, confusion, moved_decisions, suggest_threshold
from mola.tuner.skills.general_text import general_texts
from mola.tuner.skills.statistics import GeneralStatistics, PromptBatch, SkillStatistics, prompt_features

WIDTH = 24


def prompts(place, rows=30, seed=0, tokens=7):
    """A batch of prompts around a place, padded on the left; None is general text."""
    generator = torch.Generator().manual_seed(1000 * seed + (place or 0))
    hidden = torch.randn(rows, tokens, WIDTH, generator=generator)
    if place is not None:
        hidden[..., place] += 4
    content = torch.ones(rows, tokens, dtype=torch.bool)
    content[::2, :2] = False
    hidden[::2, :2] = 1e4  # padding must not count
    return PromptBatch(hidden, content, torch.zeros(rows, tokens, dtype=torch.long))


@pytest.fixture(scope="module")
def general():
    return GeneralStatistics.measure([prompts(None, rows=80)])


@pytest.fixture(scope="module")
def skills():
    return {name: SkillStatistics.measure([prompts(place)]) for place, name in enumerate(["sums", "dates", "names"])}


def test_prompts_go_to_their_skill_and_others_to_the_base(general, skills):
    decider = Decider(general, skills, suggest_threshold(general, skills, 0.0))
    assert decider.names == ["dates", "names", "sums"]
    tests = {name: [prompts(place, seed=9)] for place, name in enumerate(skills)}
    table = confusion(decider, {**tests, "general": [prompts(None, seed=9)], "unknown": [prompts(7, seed=9)]})
    assert all(table[name].get(name, 0) >= 28 and set(table[name]) <= {name, None} for name in skills)
    assert table["general"] == table["unknown"] == {None: 30}


def test_margin_is_1_at_the_mean_of_a_skill_and_minus_1_at_that_of_general_text(general, skills):
    decider = Decider(general, skills, 0.0)
    places = [skills["sums"].means[:1], general.mean[None], (skills["sums"].means[:1] + general.mean) / 2]
    found = decider.decide_features(places)
    assert found.margins.tolist() == pytest.approx([1, -1, 0], abs=0.1)
    assert found.names[0] == "sums"


def test_order_of_the_skills_changes_no_bit(general, skills):
    batch = prompts(1, seed=3)
    forwards = Decider(general, skills, 0.0).decide(batch)
    backwards = Decider(general, dict(reversed(skills.items())), 0.0).decide(batch)
    assert torch.equal(forwards.scores, backwards.scores)
    assert forwards.names == backwards.names


def test_batches_change_no_bit_of_the_statistics():
    batch = prompts(0)
    whole = SkillStatistics.measure([batch]).tensors()
    longer = PromptBatch(*(torch.cat([each, each[:, :3]], 1) for each in batch))
    longer.content[:, 7:] = False
    parts = SkillStatistics.measure(
        [PromptBatch(*(each[:11] for each in batch)), PromptBatch(*(each[11:] for each in longer))]
    )
    assert all(torch.equal(value, parts.tensors()[name]) for name, value in whole.items())


def test_statistics_come_back_from_their_tensors(general, skills):
    for statistics in (general, skills["sums"]):
        again = type(statistics).from_tensors(statistics.tensors())
        assert all(torch.equal(value, again.tensors()[name]) for name, value in statistics.tensors().items())
    with pytest.raises(MolaError, match="statistics must hold"):
        SkillStatistics.from_tensors({"mean": torch.zeros(3)})


def test_threshold_rejects_at_most_the_share(general, skills):
    held_out = [each[None].float() for skill in skills.values() for each in skill.held_out]
    for rate in (0.0, 0.1, 0.5):
        decider = Decider(general, skills, suggest_threshold(general, skills, rate))
        rejected = decider.decide_features(held_out).names.count(None)
        assert rejected == int(rate * len(held_out))


def test_threshold_is_between_the_margins_that_the_share_falls_between(general):
    """Of 79 margins the lowest has one of 80 further prompts below it, so 2 % are below a place of 1.6."""
    skills = {name: SkillStatistics.measure([prompts(place, rows=80)]) for place, name in enumerate("abcde")}
    skills["a"] = replace(skills["a"], held_out=skills["a"].held_out[1:])
    held_out = [each[None].float() for name in "abcde" for each in skills[name].held_out]
    lowest, second, *_ = Decider(general, skills, 0.0).decide_features(held_out).margins.sort().values.tolist()
    threshold = suggest_threshold(general, skills, 0.02)
    assert threshold == pytest.approx(lowest + 0.6 * (second - lowest) - 1e-4, abs=1e-6)
    assert suggest_threshold(general, skills, 0.01) == pytest.approx(lowest - 1e-4, abs=1e-6)


def test_windows_only_raise_the_margin_of_a_skill(general, skills):
    """Held-out prompts are kept without them, so fewer of longer prompts are below the threshold."""
    decider = Decider(general, {"sums": skills["sums"]}, 0.0)
    found = prompt_features(prompts(0, seed=8, tokens=60))
    with_windows, without = (decider.decide_features(each).margins for each in (found, [each[:3] for each in found]))
    assert (with_windows >= without).all()
    assert (with_windows > without).any()


def test_a_question_is_found_in_long_other_text(general, skills):
    """Its windows are near the skill; the windows of the other text are near no skill."""
    batch = prompts(None, rows=10, seed=6, tokens=200)
    batch.hidden[:, 120:155, 2] += 4
    assert Decider(general, skills, 0.0).decide(batch).names == ["names"] * 10


def test_moved_decisions_name_the_prompts(general, skills):
    few = {name: skills[name] for name in ("sums", "dates")}
    near = SkillStatistics.measure([prompts(0, seed=5)])  # a skill with the prompts of `sums`
    before = Decider(general, few, 0.0)
    assert moved_decisions(before, Decider(general, few, 0.0)) == []
    moved = moved_decisions(before, Decider(general, {**few, "twin": near}, 0.0))
    assert moved
    assert {(each.skill, each.before, each.after) for each in moved} == {("sums", "sums", "twin")}


def test_wrong_input_is_named(general, skills):
    with pytest.raises(MolaError, match="at least one skill"):
        Decider(general, {}, 0.0)
    with pytest.raises(MolaError, match="at least one prompt"):
        SkillStatistics.measure([])
    empty = prompts(0, rows=1)
    empty.content[:] = False
    with pytest.raises(MolaError, match="at least one token"):
        SkillStatistics.measure([empty])


def test_general_texts_are_many_and_differ():
    texts = general_texts()
    assert len(set(texts)) == len(texts) >= 64
    assert all(text.strip() == text for text in texts)
