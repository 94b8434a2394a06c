"""`mola skills add`, `remove`, `list`, `test`, `merge` and `suggest`, and `mola.Skills`."""

import copy
import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mola
from mola import MolaConfig, Skills
from mola.checkpoints.skills_folder import read_skills
from mola.cli import main
from mola.files.digests import file_sha256
from mola.skills.suggesting import choose_layer
from tests.checkpoints.test_skills_folder import content
from tests.conftest import save_adapter
from tests.damage import change_settings
from tests.grids import slow
from tests.skills.conftest import WORDS, make_lora, write_rows


def test_any_order_gives_the_same_bytes_and_removing_those_of_never_having_added(add, run, folder, tmp_path):
    for name in ("tools", "rivers", "birds"):
        add(tmp_path / "one by one", name)
    add(tmp_path / "at once", "birds", "rivers", "tools")
    assert content(tmp_path / "one by one") == content(tmp_path / "at once")
    run("skills", "remove", tmp_path / "one by one", "tools")
    assert content(tmp_path / "one by one") == content(folder)
    # Merged without data or base model.
    other = shutil.copytree(tmp_path / "at once", tmp_path / "other")
    run("skills", "remove", other, "birds")
    run("skills", "merge", folder, other)
    assert content(folder) == content(tmp_path / "at once")


def test_what_is_printed(add, run, folder, data, tmp_path):
    printed = add(folder, "tools")
    assert "Base model: " in printed
    assert "The decision reads the input of layer 1; threshold" in printed
    assert "(reject rate 0.02: the lowest margin of 12 held-out prompts)" in printed
    assert "mola skills test" in printed
    printed = run("skills", "list", folder)
    assert re.search(r"birds +│ +2 +│ +1-3 +│ +20 +│ +\d+ kB +│", printed)
    listed = json.loads(run("skills", "list", folder, "--json"))
    assert (listed["layer"], listed["reject_rate"]) == (1, 0.02)
    assert listed["skills"]["tools"]["rows"] == 20


def test_who_is_asked(run, folder, data, tmp_path):
    write_rows(tmp_path / "other.json", ("ééé", "ôô", "ùùù"))
    words = [f"{name}={data[name]}" for name in ("birds", "rivers")]
    words.append(f"base={tmp_path / 'other.json'}")
    printed = run("skills", "test", folder, "--data", *words, "--output", tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["asked"]) == {"birds", "rivers", "base"}
    assert result["asked"]["birds"]["birds"] + result["asked"]["birds"].get("base", 0) == 20
    assert len(result["prompts"]["rivers"]) == 20
    assert result["prompts"]["birds"][1] == {
        "prompt": "beak beak 1", "asked": "birds", "margin": result["prompts"]["birds"][1]["margin"]
    }  # fmt: skip
    assert f"{result['right']:.1%} right" in printed
    assert "warning" not in printed
    in_order = run("skills", "test", folder, "--data", data["birds"], data["rivers"])
    assert re.search(r"rivers +│ +0 +│", in_order)


def test_prompts_that_ask_somebody_else_are_shown_and_written(run, refused, folder, data, tmp_path):
    """The prompts of `rivers` are given as those of `birds`, so that all are misses."""
    words = ["skills", "test", folder, "--data", f"birds={data['rivers']}", f"rivers={data['rivers']}"]
    printed = run(*words, "--misses", tmp_path / "misses.jsonl", "--output", tmp_path / "result.json")
    rows = [json.loads(line) for line in (tmp_path / "misses.jsonl").read_text(encoding="utf-8").splitlines()]
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    threshold = read_skills(folder).threshold
    expected = [
        {"expected": name, **each, "threshold": threshold}
        for name, prompts in result["prompts"].items()
        for each in prompts
        if each["asked"] != name
    ]
    assert rows == expected
    assert len(rows) >= 20
    assert rows[1]["prompt"] == "BANK BANK 1"  # as in the data, without the template
    assert rows[1]["margin"] > threshold
    assert f"{len(rows)} prompts do not ask whom they should (threshold {threshold:.3f}):" in printed
    assert f"  birds asks rivers, margin {rows[1]['margin']:.3f}: BANK BANK 1" in printed
    assert len(re.findall("birds asks", printed)) == 3
    assert "`misses`" in refused(*words, "--misses", tmp_path / "misses.jsonl")
    assert "--misses FILE" in run(*words)


def test_skills_with_the_same_prompts_are_reported(add, run, folder, loras, data):
    """Equal scores: the first name is asked, so the prompts of `rivers` move."""
    printed = run("skills", "add", folder, f"again={loras['tools']}", "--data", data["rivers"])
    assert "Decisions that have moved:" in printed
    assert "4 of 4 held-out prompts of rivers: from rivers to again" in printed
    printed = run("skills", "test", folder, "--data", f"rivers={data['rivers']}")
    assert re.search(r"warning: \d+\.\d% of the prompts of rivers ask again", printed)


def test_the_threshold_follows_the_reject_rate_unless_it_is_given(add, run, folder):
    low = read_skills(folder).threshold
    assert "(reject rate 0.5)" in add(folder, "tools", reject_rate=0.5)
    assert read_skills(folder).threshold > low
    run("skills", "remove", folder, "tools")
    assert "threshold 0.250." in add(folder, "tools", threshold=0.25)
    run("skills", "remove", folder, "tools")
    given = read_skills(folder)
    assert (given.threshold, given.reject_rate) == (0.25, None)


def test_a_skill_is_a_lora_that_peft_loads(folder, loras, tiny_model):
    ids = torch.arange(3, 23).view(1, 20)
    paths = folder / "birds", loras["birds"]
    logits = [PeftModel.from_pretrained(copy.deepcopy(tiny_model), path)(ids).logits for path in paths]
    assert torch.equal(*logits)


def test_weights_in_a_pickle_become_safetensors(run, loras, data, tmp_path):
    lora = shutil.copytree(loras["birds"], tmp_path / "lora")
    tensors = load_file(lora / "adapter_model.safetensors")
    torch.save(tensors, lora / "adapter_model.bin")
    (lora / "adapter_model.safetensors").unlink()
    run("skills", "add", tmp_path / "skills", f"birds={lora}", "--data", data["birds"])
    weights = tmp_path / "skills" / "birds" / "adapter_model.safetensors"
    found = load_file(weights)
    assert read_skills(tmp_path / "skills").skills["birds"].adapter_sha256 == file_sha256(weights)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_the_base_model_is_built_once_to_check_loras(add, tmp_path, monkeypatch):
    built, build = [], AutoModelForCausalLM.from_config
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_config", lambda *args, **options: built.append(args) or build(*args, **options)
    )
    add(tmp_path / "skills", "birds", "rivers", "tools")
    assert len(built) == 1


def test_layers_below_the_decision_may_be_adapted(run, tiny_model_dir, folder, data, tmp_path):
    """The base model alone reads what is decided from."""
    lora = make_lora(tiny_model_dir, tmp_path / "low", 0, layers=range(4))
    run("skills", "add", folder, f"low={lora}", "--data", data["tools"])
    assert read_skills(folder).skills["low"].first_layer == 0
    assert "0-3" in run("skills", "list", folder)


def test_training_data_of_the_adapters_run(run, refused, loras, data, tmp_path):
    lora = shutil.copytree(loras["birds"], tmp_path / "birds")
    words = ["skills", "add", tmp_path / "skills", f"birds={lora}"]
    assert "the skill 'birds' needs data" in refused(*words)
    settings = {"data": str(data["birds"]), "train_split": "train", "limit": 7}
    (lora / "run.json").write_text(json.dumps({"template": "alpaca_short", "settings": settings}))
    run(*words)
    assert read_skills(tmp_path / "skills").skills["birds"].rows == 7
    assert json.loads((tmp_path / "skills" / "birds" / "prompts.json").read_text()) == {"template": "alpaca_short"}
    settings["data"] = str(tmp_path / "nowhere.json")
    (lora / "run.json").write_text(json.dumps({"settings": settings}))
    assert "nowhere.json', which" in refused(*words[:2], tmp_path / "new", words[3])


@pytest.mark.parametrize("kind", ["skills folder", *slow("base model")])
def test_the_layer_is_suggested(kind, run, tiny_model_dir, folder, data, tmp_path):
    words = [f"{name}={data[name]}" for name in WORDS]
    place = folder if kind == "skills folder" else tiny_model_dir
    printed = run("skills", "suggest", place, "--data", *words, "--output", tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert [each["layer"] for each in result["layers"]] == [0, 1, 2, 3]
    assert max(each["right"] for each in result["layers"]) > 0.8
    assert result["default_layer"] == 1
    assert f"Suggested: --layer {result['layer']};" in printed


def test_a_prompt_that_goes_to_the_base_model_is_not_right_for_a_layer(run, tiny_model_dir, data, tmp_path):
    words = [f"{name}={data[name]}" for name in WORDS]
    words += ["--reject_rate", 0.9, "--output", tmp_path / "result.json"]
    run("skills", "suggest", tiny_model_dir, "--data", *words)
    layers = json.loads((tmp_path / "result.json").read_text())["layers"]
    assert min(each["to_base"] for each in layers) > 0.3
    assert all(each["right"] + each["to_base"] <= 1 + 1e-9 for each in layers)


def test_the_default_layer_is_suggested_unless_another_is_better_by_more_than_chance():
    def right(*numbers):  # of 40 prompts; the first ones are right
        return torch.tensor([[index < number for index in range(40)] for number in numbers]).double()

    assert choose_layer(right(38, 30, 30), 1) == 0
    assert choose_layer(right(30, 30, 33), 1) == 1  # three more of 40 may be chance
    assert choose_layer(right(38, 30, 39, 39), 1) == 2  # of equal ones the lowest
    assert choose_layer(right(0, 30, 20), 1) == 1
    assert choose_layer(right(40, 40, 40), 1) == 1


def test_the_layer_can_be_set_and_is_then_the_folders(run, refused, loras, data, tmp_path):
    words = ["skills", "add", tmp_path / "skills"]
    run(*words, f"birds={loras['birds']}", "--data", data["birds"], "--layer", 0)
    assert read_skills(tmp_path / "skills").layer == 0
    line = refused(*words, f"tools={loras['tools']}", "--data", data["tools"], "--layer", 1)
    assert "reads the input of layer 0, `layer` has 1" in line
    assert "between 0 and 3" in refused(
        "skills", "add", tmp_path / "new", f"a={loras['birds']}", "--data", data["birds"], "--layer", 4
    )


def test_python(folder, loras, data, tmp_path):
    assert Skills(tmp_path / "new").names == []
    skills = Skills(folder)
    other = shutil.copytree(folder, tmp_path / "other")
    assert skills.add({"tools": loras["tools"]}, data).added == ["tools"]
    assert [each.layers for each in skills.summary()] == [[1, 2, 3]] * 3
    result = skills.test({"tools": data["tools"]})
    assert result.right == result.asked["tools"]["tools"] / 20 >= 0.9
    skills.remove("birds", "rivers")
    assert skills.names == ["tools"]
    skills.merge(other)
    assert skills.names == ["birds", "rivers", "tools"]


# ---------------------------------------------------------------------- wrong input


def test_other_base_models(refused, folder, loras, data, small_model_dir, tiny_model_dir, tmp_path):
    words = ["skills", "add", folder, f"tools={loras['tools']}", "--data", data["tools"]]
    line = refused(*words, "--base_model", small_model_dir)
    assert "`base_model` must have the weights that" in line
    changed = shutil.copytree(tiny_model_dir, tmp_path / "model")
    record = json.loads((folder / "skills.json").read_text()) | {"base_model": str(changed)}
    (folder / "skills.json").write_text(json.dumps(record))
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    assert "have changed since" in refused(*words)
    assert "have changed since" in refused("skills", "test", folder, "--data", f"birds={data['birds']}")
    assert read_skills(folder).names == ["birds", "rivers"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["add", "{folder}", "birds={loras}/birds", "--data", "{data}/birds.json"], "has a skill 'birds' already"),
        (["add", "{folder}", "base={loras}/birds", "--data", "{data}/birds.json"], "a skill's name must be of"),
        (["add", "{folder}", "{loras}/birds", "--data", "{data}/birds.json"], "must have the form NAME=ADAPTER"),
        (["add", "{folder}", "a={loras}", "b={loras}", "--data", "{data}/birds.json"], "one source per skill"),
        (["add", "{folder}", "a={loras}", "a={loras}"], "'a' is given twice"),
        (["add", "{folder}", "a={loras}/nowhere"], "no such folder"),
        (["add", "{folder}"], "skills"),
        (["add", "{folder}", "a={loras}/birds", "--reject_rate=1"], "`reject_rate` must be"),
        (["add", "{folder}", "a={loras}/birds", "--top_k=1"], "--top_k"),
        (["add", "{folder}", "a={loras}/birds", "--threshold=0", "--reject_rate=0.1"], "both set the threshold"),
        (["add", "{data}", "a={loras}/birds", "--data", "{data}/birds.json"], "`folder` must be new or empty"),
        (["remove", "{folder}", "river"], "no skill 'river' in .* Did you mean 'rivers'?"),
        (["remove", "{folder}", "birds", "rivers"], "'rivers' is the only skill"),
        (["remove", "{loras}", "birds"], "must be a skills folder: .*no skills.json in it"),
        (["list", "{folder}/nowhere"], "no such folder"),
        (["test", "{folder}", "--data", "brids={data}/birds.json"], "must name skills of .*birds, rivers.*'brids'"),
        (["test", "{folder}", "--data", "{data}/birds.json"], "one source per skill, in the order of their names"),
        (["suggest", "{folder}", "--data", "a={data}/birds.json"], "at least two skills"),
        (["tset", "{folder}"], "there is no command 'tset'. Did you mean `test`?"),
        (["add", "{folder}", "a={loras}/birds", "--layr", "1"], "Did you mean --layer"),
    ],
)
def test_wrong_input(words, message, folder, loras, data, refused):
    places = {"folder": folder, "loras": loras["birds"].parent, "data": data["birds"].parent}
    before = content(folder)
    line = refused("skills", *(word.format(**places) for word in words))
    assert re.search(message.replace("?", r"\?"), line), line
    assert line.startswith("mola skills")
    assert content(folder) == before


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_adapters_that_cannot_be_skills(refused, folder, tiny_model_dir, data, tmp_path):
    mixture = save_adapter(tiny_model_dir, tmp_path / "mixture", MolaConfig(num_experts=2, top_k=1))
    targets = ["q_proj", "embed_tokens"]
    one = save_adapter(tiny_model_dir, tmp_path / "one", MolaConfig(num_experts=1, top_k=1))
    embedding = make_lora(tiny_model_dir, tmp_path / "embedding", 0, layers=None, target_modules=targets)
    wide = make_lora(tiny_model_dir, tmp_path / "wide", 0)
    change_settings(wide, r=3)
    dora = make_lora(tiny_model_dir, tmp_path / "dora", 0, use_dora=True)
    messages = {
        mixture: "has `peft_type` 'MOLA'. `mola convert --to lora`",
        one: f"so this command writes it as a LoRA: mola convert {one} --to lora --output NEW_FOLDER",
        embedding: "LoRA of linears",
        wide: "the adapter does not fit",
        dora: "DoRA scales the base weight",
    }
    for adapter, message in messages.items():
        assert message in refused("skills", "add", folder, f"new={adapter}", "--data", data["birds"])


def test_help(capsys):
    assert main(["skills"]) == 2
    usage = capsys.readouterr().out
    assert main(["skills", "--help"]) == 0
    assert capsys.readouterr().out == usage
    assert [line.split()[0] for line in usage.splitlines() if line.startswith("  ")] == [
        "add", "remove", "list", "test", "merge", "suggest",
    ]  # fmt: skip
    assert main(["--help"]) == 0
    assert "  skills " in capsys.readouterr().out


def test_skills_is_a_public_name():
    assert "Skills" in mola.__all__


def test_inspect_shows_what_a_folder_holds_and_whom_data_ask(run, refused, folder, data, tmp_path):
    printed = run("inspect", folder, "--data", data["rivers"], "--json", tmp_path / "inspect.json")
    assert re.search(r"birds +│ +2 +│ +1-3 +│", printed)
    assert f"{data['rivers']} asks: rivers 20." in printed
    written = json.loads((tmp_path / "inspect.json").read_text())
    assert written["asked"] == {"rivers": 20}
    assert [*written["skills"]] == ["birds", "rivers"]
    line = refused("inspect", folder, "--data", data["rivers"], "--leave_one_out", "layers")
    assert "`leave_one_out` is for the experts of a mixture" in line


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("merge", []),
        ("reallocate", ["--num_experts", "4"]),
        ("convert", ["--to", "lora", "--r", "4"]),
        ("convert", ["--from", "lora", "--num_experts", "4"]),
    ],
)
def test_commands_for_a_single_adapter_say_so(refused, folder, command, options, tmp_path):
    line = refused(command, folder, *options, "--output", tmp_path / "new")
    assert re.search(r"must be a single adapter: .* is a skills folder. Pass one of its skills, such as .*birds'", line)
