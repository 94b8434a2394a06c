"""What needs no model is answered, and what can be found wrong without a model is found, before torch is imported."""

import json
from pathlib import Path

from mola.cli import COMMANDS, split_command
from tests.reporting.test_without_torch import answers

FOLDERS = Path(__file__).parent / "golden" / "version_1_0_0"


def test_skills_list_needs_no_torch(tmp_path):
    skills = str(FOLDERS / "skills")
    calls = [["skills", "list", skills], ["skills", "list", skills, "--json"], ["skills", "list", str(tmp_path)]]
    table, as_json, refused = answers(*calls)
    assert "birds" in table[1]
    assert json.loads(as_json[1])["skills"]["rivers"]["rank"] == 2
    assert "must be a skills folder" in refused[1]
    assert [code for code, *_ in (table, as_json, refused)] == [0, 0, 2]
    assert not any(imported for *_, imported in (table, as_json, refused))


def test_each_command_finds_a_typical_mistake_without_torch(tmp_path, tiny_model_dir):
    (tmp_path / "full").mkdir()
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    (tmp_path / "full" / "old.json").write_text("{}")
    full, new, old, rows = (str(tmp_path / name) for name in ("full", "new", "full/old.json", "rows.json"))
    base, data = ["--base_model", str(tiny_model_dir)], ["--data", rows]
    run, skills = str(FOLDERS / "run"), str(FOLDERS / "skills")
    stages = ["--stages", json.dumps({"a": {"data": rows}})]
    not_new = "`output` must be new or empty"
    bad_dtype = "`dtype` must be one of auto, float32, bfloat16, float16: got 'x'"
    calls = [
        (["prepare", "sample", "--output", full], "`output` must be empty"),
        (["prepare", "sample", "--output", new, "--kinds", "99"], "`kinds` must be 1 to 12"),
        (["train"], "`output` must name a folder for the adapter"),
        (["train", "--output", new], "`base_model` must name a model"),
        (["train", "--output", new, *base], "`data` must name the training data"),
        (["train", "--output", full, *base, *data], "`output` must be empty"),
        (["train", "--output", new, *base, *data, "--dtype", "x"], bad_dtype),
        (["train", "--output", new, *base, *data, "--task", "x"], "`task` must be one of"),
        (["train", "--output", new, *base, *data, "--batch_size", "0"], "`batch_size` must be at least 1"),
        (["train", "--output", new, *base, *data, "--skill", "a"], "`skill` needs a skills folder"),
        (["train", *base, *data, "--skill", "birds", "--into", skills], "has a skill 'birds' already"),
        (["train", *base, *data, "--skill", "birds", "--into", full], "`into` must be new or empty"),
        (["continual", "--output", new, *stages], "`base_model` must name a model"),
        (["continual", "--output", full, *base, *stages], "`output` must be empty or hold a sequence to resume"),
        (["continual", "--output", new, *base], "`stages` must not be empty"),
        (["evaluate", *base, *data, "--output", old], "`output` must be a new file"),
        (["evaluate", *base, *data, "--output", rows, "--overwrite"], "`output` must not be `data`"),
        (["evaluate", *base, *data, "--dtype", "x"], bad_dtype),
        (["lm-eval", *base, "--tasks", "a", "--output", old], "`output` must be a new file"),
        (["generate", *base, "--prompt", "a", "--instruction", "b"], "`prompt` is used as it is"),
        (["generate", *base, "--prompt", "a", "--dtype", "x"], bad_dtype),
        (["serve", *base, "--dtype", "x"], bad_dtype),
        (["serve", *base, "--engine", "x"], "argument --engine: invalid choice: 'x'"),
        (["skills", "add", skills, f"birds={skills}/birds", *base], "has a skill 'birds' already"),
        (["skills", "add", full, f"birds={skills}/birds", *base], "`folder` must be new or empty"),
        (["skills", "add", new, f"a b={skills}/birds", *base], "a skill's name must be of letters"),
        (["skills", "remove", skills, "brids"], "Did you mean 'birds'?"),
        (["skills", "list", skills, "--json", old], "`json` must be a new file"),
        (["skills", "test", skills, *base, *data, "--output", old], "`output` must be a new file"),
        (["skills", "merge", skills, full], "`folder` must be a skills folder"),
        (["skills", "suggest", str(tiny_model_dir), "--data", f"a={rows}", "--output", old], "must be a new file"),
        (["plan", *base, "--json", old], "`json` must be a new file"),
        (["plan", *base, "--dtype", "x"], bad_dtype),
        (["compare"], "`base_model` must name a model"),
        (["compare", *base], "`data` must name the training data"),
        (["compare", *base, *data, "--dtype", "x"], bad_dtype),
        (["allocate", *base, "--method", "x", "--budget", "4"], "`method` must be one of"),
        (["allocate", *base, "--method", "2468", "--budget", "4", "--output", old], "`output` must be a new file"),
        (["reallocate", run, "--num_experts", "2", "--output", full], not_new),
        (["convert", run, "--to", "published", "--output", full], not_new),
        (["convert", run, "--output", new], "exactly one of --from published"),
        (["merge", f"{skills}/birds", *base, "--output", full], not_new),
        (["merge", f"{skills}/birds", *base, "--output", new, "--dtype", "x"], bad_dtype),
        (["inspect", run, *base, *data, "--json", old], "`json` must be a new file"),
        (["inspect", run, *base, *data, "--leave_one_out", "x"], "`leave_one_out` must be one of"),
        (["report", run, "--output", old], "`output` must be a new file"),
        (["doctor", run, "--json", old], "`json` must be a new file"),
        (["demo", run, *base, "--dtype", "x"], bad_dtype),
        (["quickstart", "--dtype", "x"], bad_dtype),
    ]
    assert {split_command(words)[0] for words, _ in calls} == set(COMMANDS)
    for (words, message), (code, text, imported) in zip(calls, answers(*(words for words, _ in calls)), strict=True):
        assert (words, code, "torch" in imported) == (words, 2, False)
        assert message in text
        assert len(text.splitlines()) == 1
