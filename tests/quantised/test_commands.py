"""Quantised bases through the commands: training, evaluation, generation, records, stored models, wrong input."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mola import ContinualOptions, PlanOptions, load_model, plan
from mola.cli import main
from mola.models.quantization import prepare_for_training
from mola.studies.train_and_test import evaluation_of
from tests.distributed.conftest import goes_on_from
from tests.grids import slow
from tests.quantised.models import KINDS, packed_layers, quantised
from tests.training.runs import WEIGHTS, assert_same_weights, losses, same_weights

pytestmark = [pytest.mark.quant, pytest.mark.filterwarnings("ignore::FutureWarning")]
IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
NF4 = {
    "quant_method": "bitsandbytes",
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


def command(name, *flags, **options):
    return main([name, *flags, *(f"--{key}={value}" for key, value in options.items() if value is not None)])


def train(base, data, output, *flags, **options):
    defaults = {
        "base_model": base,
        "data": data / "train.json",
        "eval_data": data / "validation.json",
        "output_dir": output,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "cutoff_len": 1024,
        "num_experts": "2-4",
        "dtype": "float32",
        "logging_steps": 1,
        "report_to": "none",
    }
    return command("train", *flags, **{**defaults, **options})


def record(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def output(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.fixture(scope="module")
def trained(blocks_dir, sample, tmp_path_factory):
    """Run folder of experts trained on NF4, in mixed precision, with evaluations in between."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'mola-peft[quant]'")
    folder, packed = tmp_path_factory.mktemp("run") / "nf4", []

    def prepare(model, *how):
        packed.append(len(packed_layers(model)))
        return prepare_for_training(model, *how)

    flags = ["--load_in_4bit", "--bnb_4bit_use_double_quant"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mola.training.model.prepare_for_training", prepare)
        assert train(blocks_dir, sample, folder, *flags, dtype="bfloat16") == 0
    assert packed == [28]
    return folder


def test_training_on_nf4(trained):
    run = record(trained)
    assert (run["status"], run["quantization"]) == ("finished", NF4)
    assert run["settings"]["load_in_4bit"] is True
    entries = map(json.loads, (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < losses[0]


def test_only_the_adapter_is_saved(trained):
    tensors = load_file(trained / "adapter_model.safetensors")
    assert tensors
    assert all(".mola_" in name for name in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_parameters_in_the_record_are_those_of_the_unpacked_model(trained, blocks_dir):
    plain = AutoModelForCausalLM.from_pretrained(blocks_dir)
    run = record(trained)
    assert run["allocation"]["base_parameters"] == plain.num_parameters()
    tensors = load_file(trained / "adapter_model.safetensors").values()
    assert run["trainable_parameters"] == sum(tensor.numel() for tensor in tensors)


def test_the_adapter_loads_onto_any_form_of_its_base(trained, blocks_dir):
    outputs = {}
    for name, quantization in {"plain": None, "nf4": KINDS["nf4"], "int8": KINDS["int8"]}.items():
        base = output(load_model(blocks_dir, None, "float32", "cpu", quantization=quantization))
        model = load_model(blocks_dir, trained, "float32", "cpu", quantization=quantization)
        outputs[name] = output(model)
        assert (outputs[name] - base).norm() > 0.05 * base.norm(), name
        assert torch.equal(outputs[name], output(model)), name
        half = load_model(blocks_dir, trained, "bfloat16", "cpu", quantization=quantization)
        formats = {parameter.dtype for key, parameter in half.named_parameters() if "mola_A" in key or "mola_B" in key}
        assert formats == {torch.float32 if quantization else torch.bfloat16}
    scale = outputs["plain"].norm()
    assert 0 < (outputs["int8"] - outputs["plain"]).norm() < 0.1 * scale
    assert 0 < (outputs["nf4"] - outputs["plain"]).norm() < 0.6 * scale


@pytest.mark.parametrize("flags", [["--load_in_8bit"], *slow(["--load_in_4bit", "--dtype=bfloat16"])])
def test_evaluating_and_generating(flags, trained, blocks_dir, sample, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    common = {"base_model": blocks_dir, "adapter": trained}
    result = tmp_path / "result.json"
    options = {"task": "scienceqa", "data": sample / "test.json", "output": result, "max_new_tokens": 2}
    assert command("evaluate", *flags, **common, **options) == 0
    settings = json.loads(result.read_text(encoding="utf-8"))["settings"]
    assert settings["load_in_8bit"] is ("--load_in_8bit" in flags)
    assert "The base has" in caplog.text  # which is said of packed ones
    caplog.clear()
    capsys.readouterr()
    assert command("generate", *flags, **common, prompt="The sun", max_new_tokens=4) == 0
    assert capsys.readouterr().out.strip()
    assert "The base has" in caplog.text


@pytest.mark.slow
def test_training_on_8_bits_goes_on_from_an_adapter_and_resumes(trained, blocks_dir, sample, tmp_path, capsys):
    whole, part, resume = tmp_path / "whole", tmp_path / "part", "--resume_from_checkpoint=last"
    options = {"adapter": trained, "num_experts": None, "eval_data": None, "eval_strategy": "no"}
    once = {"max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-30}  # too little to change anything
    assert train(blocks_dir, sample, tmp_path / "once", "--load_in_8bit", **options, **once) == 0
    first = load_file(tmp_path / "once" / WEIGHTS)
    for name, tensor in load_file(trained / WEIGHTS).items():
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-20, msg=name)
    options["num_train_epochs"] = 3
    assert train(blocks_dir, sample, whole, "--load_in_8bit", **options) == 0
    assert losses(whole)[1] == losses(tmp_path / "once")[1]
    assert record(whole)["quantization"] == {"quant_method": "bitsandbytes", "load_in_8bit": True}
    shutil.copytree(whole, part)
    capsys.readouterr()
    assert train(blocks_dir, sample, part, "--load_in_4bit", resume, **options) == 2
    assert "(quantization) differs" in capsys.readouterr().err
    with goes_on_from(part, "checkpoint-6", removed="checkpoint-9"):
        assert train(blocks_dir, sample, part, "--load_in_8bit", resume, **options) == 0
    assert record(part)["steps"] == 9
    assert_same_weights(part, whole)
    assert not same_weights(part, part / "checkpoint-6")


@pytest.mark.parametrize("kind", ["nf4", *slow("fp4-double", "int8")])
def test_a_stored_model_needs_no_flag(kind, bitsandbytes, blocks_dir, sample, tmp_path, capsys):
    stored = tmp_path / "stored"
    model = quantised(blocks_dir, kind)
    expected = output(model)
    model.save_pretrained(stored)
    for file in blocks_dir.glob("tokenizer*"):
        shutil.copy(file, stored)
    again = load_model(stored, dtype="float32", device="cpu")
    assert len(packed_layers(again)) == 4 * 7
    assert torch.equal(output(again), expected)
    assert plan(PlanOptions(str(stored))).base_parameters == plan(PlanOptions(str(blocks_dir))).base_parameters

    assert train(stored, sample, tmp_path / "run", num_train_epochs=1) == 0
    found = record(tmp_path / "run")["quantization"]
    assert found["quant_method"] == "bitsandbytes"
    assert found.get("bnb_4bit_quant_type") == {"nf4": "nf4", "fp4-double": "fp4", "int8": None}[kind]
    capsys.readouterr()
    assert train(stored, sample, tmp_path / "twice", "--load_in_8bit") == 2
    assert "quantised already" in capsys.readouterr().err


# ---------------------------------------------------------------------- wrong input, before weights load

WRONG = [
    (["--load_in_8bit", "--load_in_4bit"], ["`load_in_8bit` and `load_in_4bit`", "both"]),
    (["--bnb_4bit_quant_type=nf4"], ["`bnb_4bit_quant_type` (nf4)", "--load_in_4bit"]),
    (["--load_in_8bit", "--bnb_4bit_use_double_quant"], ["`bnb_4bit_use_double_quant`", "--load_in_4bit"]),
    (["--load_in_4bit", "--bnb_4bit_quant_type=int4"], ["`bnb_4bit_quant_type`", "nf4, fp4", "'int4'"]),
    (["--load_in_4bit", "--bnb_4bit_compute_dtype=int8"], ["`bnb_4bit_compute_dtype`", "bfloat16", "'int8'"]),
    (
        ["--load_in_4bit", "--bnb_4bit_compute_dtype=float16", "--dtype=bfloat16"],
        ["`bnb_4bit_compute_dtype` float16", "bfloat16"],
    ),
    (["--load_in_4bit", "--gguf_file=model.gguf"], ["`gguf_file` ('model.gguf')", "`load_in_4bit`"]),
    (["--gguf_file=model.gguf"], ["`gguf_file`", "'model.gguf' is not in", "none"]),
]
TRAINING_ONLY = [
    (
        ["--load_in_4bit", "--bnb_4bit_compute_dtype=float32", "--dtype=bfloat16"],
        ["`bnb_4bit_compute_dtype` float32", "mixed precision of bfloat16"],
    ),
    (["--load_in_4bit", "--modules_to_save=q_proj"], ["`modules_to_save` 'q_proj'", "quantised"]),
]


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize(("flags", "parts"), [*WRONG, *TRAINING_ONLY])
def test_training_refuses(flags, parts, no_weights, sample, tmp_path, capsys):
    names = {flag.split("=")[0] for flag in flags}
    options = {} if "--dtype" not in names else {"dtype": "bfloat16"}
    assert train(no_weights, sample, tmp_path / "run", *flags, **options) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert [part for part in parts if part not in line] == []
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("name", ["evaluate", "generate"])
def test_other_commands_refuse(name, no_weights, sample, capsys):
    others = {"evaluate": {"task": "scienceqa", "data": sample / "test.json"}, "generate": {"prompt": "a"}}
    flags, parts = WRONG[0]
    assert command(name, *flags, base_model=no_weights, **others[name]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert [part for part in parts if part not in line] == []


def test_a_stored_method_without_its_package_is_refused(no_weights, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(no_weights, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps({**config, **stored}), encoding="utf-8")
    assert command("generate", base_model=folder, prompt="a") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "quantised with gptq" in line
    assert "cannot be loaded here" in line


def test_all_stages_of_continual_learning_and_their_tests_are_quantised(bitsandbytes, blocks_dir, sample):
    data = {"data": str(sample / "train.json"), "test_data": str(sample / "test.json"), "task": "scienceqa"}
    options = ContinualOptions(
        base_model=str(blocks_dir), output_dir="run", stages={"a": data, "b": data}, load_in_8bit=True, use_cpu=True
    )
    assert [stage.load_in_8bit for stage in options.stage_options.values()] == [True, True]
    assert evaluation_of(options.stage_options["a"]).load_in_8bit
