"""`mola convert`, through the command."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mola import MolaConfig, MolaError
from mola.checkpoints.adapter_folder import read_tensors
from mola.cli import main
from mola.exporting.convert import ConvertOptions, convert

GOLDEN = Path(__file__).parents[1] / "golden"
CASE, BASE = str(GOLDEN / "case_a"), str(GOLDEN / "base_tiny")
FROM = ["--from", "published", "--base_model", BASE, "--top_k", "2"]


def base_model():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture
def mixture(tmp_path):
    """A saved random adapter of `base_tiny` whose first layer has one expert."""
    torch.manual_seed(0)
    config = MolaConfig(
        num_experts=[1, 2, 3, 2], r=[2, 4, 2, 3], top_k=2, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(base_model(), config).save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_converted_golden_adapter_gives_the_recorded_logits(tmp_path, capsys):
    assert main(["convert", CASE, *FROM, "--output", str(tmp_path / "out")]) == 0
    report = capsys.readouterr().out
    for line in ("layers            4", "experts per layer 2,3,4,5", "lora_alpha        16"):
        assert line in report
    assert files(tmp_path) == ["out"]
    assert files(tmp_path / "out") == ["adapter_config.json", "adapter_model.safetensors"]
    numbers = load_file(GOLDEN / "case_a" / "fixture.safetensors")
    model = PeftModel.from_pretrained(base_model(), tmp_path / "out").eval()
    with torch.no_grad():
        output = model(input_ids=numbers["input_ids"], attention_mask=numbers["attention_mask"])
    torch.testing.assert_close(output.logits, numbers["logits"], atol=2e-5, rtol=0)


def test_golden_adapter_there_and_back(tmp_path, capsys):
    assert main(["convert", CASE, *FROM, "--output", str(tmp_path / "ours")]) == 0
    assert main(["convert", str(tmp_path / "ours"), "--to", "published", "--output", str(tmp_path / "back")]) == 0
    assert "write them down: top_k = 2 everywhere" in capsys.readouterr().out
    found, expected = read_tensors(tmp_path / "back"), read_tensors(GOLDEN / "case_a")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert files(tmp_path / "back") == ["adapter_config.json", "adapter_model.bin"]


def test_own_adapter_with_a_one_expert_layer_there_and_back(tmp_path, mixture):
    there = convert(ConvertOptions(str(mixture), str(tmp_path / "there"), target_format="published"))
    assert "added: 7 routers of zeros for linears with one expert" in there.notes
    assert there.not_saved["top_k"] == [1, 2, 2, 2]
    options = ConvertOptions(
        str(tmp_path / "there"), str(tmp_path / "back"), source_format="published", base_model=BASE, top_k="2"
    )
    back = convert(options)
    assert "left out: 7 routers of linears with one expert" in back.notes
    assert (back.num_experts, back.r, back.top_k) == ([1, 2, 3, 2], [2, 4, 2, 3], [1, 2, 2, 2])
    found, expected = read_tensors(tmp_path / "back"), read_tensors(mixture)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_top_k_per_layer_is_saved(tmp_path):
    options = ConvertOptions(CASE, str(tmp_path / "out"), source_format="published", base_model=BASE, top_k="1,2,3,4")
    assert convert(options).top_k == [1, 2, 3, 4]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["top_k"] == [1, 2, 3, 4]


def test_flags_and_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"source: {CASE}\nfrom: published\nbase_model: {BASE}\ntop_k: 2\noutput: {tmp_path / 'a'}\n")
    assert main(["convert", "--config", str(recipe)]) == 0
    flags = ["--from", "published", *FROM[2:], "--output", str(tmp_path / "b")]
    assert main(["convert", "--source", CASE, *flags]) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exactly one of --from published, --from lora, --to published, --to lora must be given"),
        ([*FROM, "--to", "published"], "must be given, got --from published --to published"),
        (["--to", "other"], "must be given, got --to other"),
        (FROM[:4], "`top_k` must be given"),
        ([*FROM[:2], *FROM[4:]], "`base_model` has no readable configuration: 'base_tiny'"),  # as the source records it
        ([*FROM[:5], "3"], "layer 0 has top_k 3 and num_experts 2"),
        ([*FROM[:5], "2,2"], "`top_k` needs one entry per decoder layer"),
        (["--to", "published", "--top_k", "2"], "`top_k` is only for --from"),
        (["--to", "published"], "must be an adapter of mola for --to published, got peft_type 'LORA'"),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_written(tmp_path, capsys, arguments, message):
    assert main(["convert", CASE, *arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert files(tmp_path) == []


def test_a_base_model_other_than_the_recorded_one_is_reported(tmp_path):
    settings = json.loads((GOLDEN / "case_a" / "adapter_config.json").read_text())
    for recorded, noted in (("base_tiny", False), ("elsewhere/base_tiny/", False), ("elsewhere/other", True)):
        source = tmp_path / f"source-{noted}"
        source.mkdir(exist_ok=True)
        text = json.dumps({**settings, "base_model_name_or_path": recorded})
        (source / "adapter_config.json").write_text(text, encoding="utf-8")
        torch.save(read_tensors(GOLDEN / "case_a"), source / "adapter_model.bin")
        options = ConvertOptions(
            str(source), str(tmp_path / recorded), source_format="published", base_model=BASE, top_k="2"
        )
        assert ("base model: elsewhere/other in the source" in str(convert(options))) == noted


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "`rope_theta` 1e+06"),
        ({"attention_bias": True}, "`attention_bias`"),
    ],
)
def test_what_the_research_code_ignores_in_a_base_model_is_reported(tmp_path, changes, said):
    base = changed_base(tmp_path / "base_tiny", **changes)
    options = ConvertOptions(CASE, str(tmp_path / "out"), source_format="published", base_model=base, top_k="2")
    report = str(convert(options))
    assert ("the research code runs it without" in report) == (said is not None)
    assert said is None or said in report


def test_output_with_files_in_it_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for output in (tmp_path, tmp_path / "notes.txt"):
        assert main(["convert", CASE, *FROM, "--output", str(output)]) == 2
        assert "`output` must" in capsys.readouterr().err
    assert files(tmp_path) == ["notes.txt"]


def test_missing_source_is_refused(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "no"), *FROM, "--output", str(tmp_path / "out")]) == 2
    assert "`source` must be the folder of an adapter" in capsys.readouterr().err


def changed_base(folder, **changes):
    folder.mkdir()
    config = json.loads((GOLDEN / "base_tiny" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 96}, r"does not fit the model: .*mlp.* has shape"),
        ({"num_hidden_layers": 5}, "`num_experts` needs one entry per decoder layer"),
        ({"num_hidden_layers": 3}, "`num_experts` needs one entry per decoder layer"),
    ],
)
def test_adapter_of_another_base_model_is_refused_before_writing(tmp_path, changes, message):
    base = changed_base(tmp_path / "base", **changes)
    options = ConvertOptions(CASE, str(tmp_path / "out"), source_format="published", base_model=base, top_k="2")
    with pytest.raises(MolaError, match=message):
        convert(options)
    assert files(tmp_path) == ["base"]


def test_adapter_the_format_can_not_express_is_refused_before_writing(tmp_path, mixture):
    path = mixture / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bias": "all"}))
    with pytest.raises(MolaError, match="`bias` cannot be expressed"):
        convert(ConvertOptions(str(mixture), str(tmp_path / "out"), target_format="published"))
    assert files(tmp_path) == ["mixture"]


def test_a_failed_write_leaves_nothing_behind(tmp_path, mixture, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        convert(ConvertOptions(str(mixture), str(tmp_path / "out"), target_format="published"))
    assert files(tmp_path) == ["mixture"]
