"""`mola generate` with a skills folder in place of an adapter."""

import io
import json
import re
import sys

import pytest

from mola.cli import main
from tests.serving.skills_folders import KINDS, NO_KIND, PROMPTS, make_skills_folder, prompt_of

NUMBERS, SHOUTS = prompt_of("numbers", 45), prompt_of("shouts", 45)


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory):
    """Skills that were trained with different templates."""
    path = tmp_path_factory.mktemp("skills")
    kinds = {kind: PROMPTS[kind] for kind in ("numbers", "shouts")}
    made = make_skills_folder(str(tiny_model_dir), path / "skills", kinds, path / "loras")
    (made / "numbers" / "prompts.json").write_text(json.dumps({"template": "alpaca_short"}))
    (made / "shouts" / "chat_template.jinja").write_text("{% for each in messages %}<{{ each.content }}>{% endfor %}")
    return made


@pytest.fixture
def say(tiny_model_dir, capsys):
    """What `mola generate` prints on standard output, and its lines on standard error."""

    def call(*words, base=tiny_model_dir):
        flags = ["--base_model", base, "--max_new_tokens", 8, "--dtype", "float32", "--device", "cpu"]
        assert main(["generate", *map(str, [*words, *flags])]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err.splitlines()

    return call


@pytest.mark.parametrize(("skill", "prompt"), KINDS)
def test_a_prompt_asks_the_skill_that_knows_it(folder, say, skill, prompt, caplog):
    caplog.set_level("INFO")
    answer, _ = say(folder, "--prompt", prompt)
    who = "No skill knows this prompt: the base model answers." if skill is None else f"{skill} answers."
    assert [record.message for record in caplog.records if "answers." in record.message] == [who]
    assert answer == say(*([] if skill is None else [folder / skill]), "--prompt", prompt)[0]


def test_each_line_is_written_in_the_template_of_the_skill_that_answers(folder, say, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{SHOUTS}\n{NUMBERS}\n{NO_KIND}"))
    answers, _ = say(folder, "--stream", "false")
    alone = [say(folder / name, "--instruction", line)[0] for name, line in (("shouts", SHOUTS), ("numbers", NUMBERS))]
    assert answers == "".join([*alone, say("--instruction", NO_KIND)[0]])


def test_the_caller_names_who_answers(folder, say):
    asked = ["--instruction", NUMBERS]
    assert say(folder, "--skill", "shouts", *asked)[0] == say(folder / "shouts", *asked)[0]
    assert say(folder, "--skill", "base", *asked)[0] == say(*asked)[0]


def test_what_is_wrong_is_one_line(folder, tiny_model_dir, small_model_dir, capsys):
    for words, message in [
        (
            [folder, "--skill", "number"],
            "no skill 'number' .* Did you mean 'numbers'. Its skills are numbers, shouts",
        ),
        ([folder / "numbers", "--skill", "numbers"], "`skill` names a skill of a skills folder: got 'numbers' and the"),
        (["--base_model", tiny_model_dir, "--skill", "base"], "got 'base' and no adapter. Leave `skill` out"),
        ([folder, "--skill", "numbers", "--base_model", small_model_dir], "must have the weights that .* was made on"),
    ]:
        assert main(["generate", *map(str, words), "--prompt", "Hi"]) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert re.search(message, line), line
