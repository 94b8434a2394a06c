"""`mola evaluate` with a skills folder in place of an adapter."""

import json
from dataclasses import replace

import pytest

from mola import load_model
from mola.errors import MolaError
from mola.evaluation.evaluate import EvaluateOptions, evaluate, main
from mola.evaluation.free_text import evaluate_loss
from tests.serving.skills_folders import NO_KIND, PROMPTS, make_skills_folder, prompt_of

KINDS = ("numbers", "shouts", "base")
ASKED = {"base": 3, "numbers": 3, "shouts": 3}


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory):
    """Two skills, of which one was trained with a template of its own and without an end token."""
    path = tmp_path_factory.mktemp("skills")
    kinds = {kind: PROMPTS[kind] for kind in ("numbers", "shouts")}
    made = make_skills_folder(str(tiny_model_dir), path / "skills", kinds, path / "loras")
    record = {"template": "alpaca_short", "settings": {"add_eos_token": False}}
    (made / "shouts" / "run.json").write_text(json.dumps(record))
    return made


def question(number):
    """A question of each kind in turn."""
    kind = KINDS[number % 3]
    return NO_KIND + " Meow." * (number // 3) if kind == "base" else prompt_of(kind, 41 + number)


@pytest.fixture
def options(folder, tiny_model_dir, tmp_path):
    """Nine rows of free text, whose answers are of one kind."""
    rows = [{"instruction": question(n), "input": "", "output": prompt_of("numbers", n + 5)} for n in range(9)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return EvaluateOptions(
        base_model=str(tiny_model_dir),
        data=str(tmp_path / "rows.json"),
        adapter=str(folder),
        batch_size=2,
        dtype="float32",
        device="cpu",
    )


def by_name(options):
    """The results with the skill that answers named by the caller."""
    return {name: evaluate(replace(options, skill=name, output=None)) for name in KINDS}


def test_each_row_of_free_text_asks_a_skill_by_its_prompt(options, tmp_path, capsys):
    options.output = str(tmp_path / "result.json")
    assert main(options) == 0
    assert "asked: base 3, numbers 3, shouts 3" in " ".join(capsys.readouterr().out.split())
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["asked"] == ASKED
    assert [sample["asked"] for sample in written["samples"]] == [*KINDS * 3]
    assert written["settings"]["template"] == "alpaca, alpaca_short"
    alone = by_name(options)
    for index, sample in enumerate(written["samples"]):
        expected = alone[sample["asked"]].samples[index]
        assert (sample["tokens"], sample["loss"]) == (expected["tokens"], pytest.approx(expected["loss"], rel=1e-5))
    assert alone["shouts"].asked == {"shouts": 9}


def test_a_named_skill_is_its_lora_in_peft_and_base_the_base_model(options, folder):
    found = by_name(options)
    assert found["shouts"].samples == evaluate(replace(options, adapter=str(folder / "shouts"))).samples
    plain = evaluate(replace(options, adapter=None))
    assert found["base"].samples == plain.samples
    assert "asked" not in plain.to_dict()


@pytest.mark.parametrize("scoring", ["generate", "likelihood"])
def test_each_question_asks_a_skill(options, scoring, tmp_path):
    rows = [{"question": " ".join([question(n)] * 6), "choices": ["7", "H"], "answer": n % 2} for n in range(9)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options.scoring, options.max_new_tokens = scoring, 6 if scoring == "generate" else options.max_new_tokens
    found = evaluate(options)
    assert sum(found.asked.values()) == 9
    assert len(found.asked) > 1
    alone = by_name(options)
    for index, sample in enumerate(found.samples):
        assert sample == alone[sample["asked"]].samples[index] | {"asked": sample["asked"]}


def test_an_unfinished_evaluation_goes_on_with_the_same_skills_alone(options, folder, interrupt_after, tmp_path):
    whole = evaluate(options)
    options.output = str(tmp_path / "result.json")
    interrupt_after(options)
    with pytest.raises(MolaError, match="skill None there, 'shouts' now"):
        evaluate(replace(options, skill="shouts"))
    record = (folder / "skills.json").read_text()
    try:
        (folder / "skills.json").write_text(record.replace('"threshold": 0.2', '"threshold": 0.3'))
        with pytest.raises(MolaError, match="other settings: weights"):
            evaluate(options)
    finally:
        (folder / "skills.json").write_text(record)
    result = evaluate(options)
    assert (result.asked, result.loss) == (whole.asked, pytest.approx(whole.loss, rel=1e-6))


def test_texts_and_a_skill_that_the_program_names(folder, tiny_tokenizer):
    model = load_model(folder, dtype="float32", device="cpu")
    texts = [{"id": n, "instruction": None, "input": "", "output": question(n)} for n in range(3)]
    decided = evaluate_loss(model, tiny_tokenizer, texts, template="meta", show_progress=False)
    assert [sample["asked"] for sample in decided.samples] == [*KINDS]
    with model.skills.use("shouts"):
        named = evaluate_loss(model, tiny_tokenizer, texts, template="meta", show_progress=False)
    assert named.asked is None
    assert [sample["loss"] == pytest.approx(named.samples[n]["loss"]) for n, sample in enumerate(decided.samples)] == [
        *(False, True, False)
    ]
