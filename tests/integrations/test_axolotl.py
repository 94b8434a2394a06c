"""axolotl's own commands train mixtures, in an environment of its own: 7 GB, for it wants PyTorch with CUDA."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mola
from mola import MolaConfig
from mola.cli import main
from mola.data.encode import encode_examples
from mola.data.examples import load_examples
from mola.data.templates import get_template
from mola.models.tokenizer import load_tokenizer
from tests.conftest import save_adapter
from tests.integrations.environments import ROOT, run, venv
from tests.training.runs import losses

pytestmark = pytest.mark.slow
RECIPE = ROOT / "recipes" / "axolotl" / "mixture.yaml"
STEPS, COEFFICIENT = 20, 0.1
RATE = 1e-3  # at 1e-2 rounding soon makes a router choose otherwise
# `overrides`: the release that axolotl 0.21.0 asks for cannot be built for Python 3.13.
REQUIREMENTS, OVERRIDES = ["axolotl==0.21.0"], ["zstandard>=0.23"]
# Prints what axolotl says to each of many YAML files: a start takes long.
JUDGE = """
import json, sys
from axolotl.cli import merge_lora
from axolotl.cli.config import load_cfg
said = {}
for command, file in json.load(open(sys.argv[1])):
    try:
        merge_lora.do_cli(file) if command == "merge" else load_cfg(file)
    except Exception as error:
        said[file] = f"{type(error).__name__}: {error}"
json.dump(said, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def python():
    found = next((path for name in ("python3.13", "python3.12") if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("axolotl needs Python 3.12 or newer")
    return venv("axolotl", REQUIREMENTS, python=found, overrides=OVERRIDES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sums, as text for mola and alpaca."""
    path = tmp_path_factory.mktemp("data") / "sums.json"
    rows = [{"instruction": f"{i} + {i}?", "input": "", "output": str(2 * i)} for i in range(2 * STEPS)]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def encoded(data, tiny_model_dir):
    """The same as token ids."""
    examples, tokenizer = load_examples(data, None, None), load_tokenizer(tiny_model_dir, "right")
    return encode_examples(examples, tokenizer, get_template("alpaca"), cutoff_len=512)[0]


def batch(encoded, rows):
    """Some rows, padded."""
    rows = [encoded[row] for row in rows]
    longest = max(row["length"] for row in rows)
    filled = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [fill] * (longest - row["length"]) for row in rows])
        for name, fill in filled.items()
    }


@pytest.fixture(scope="module")
def write(tiny_model_dir, data, tmp_path_factory):
    """Writes the recipe with the tiny model, on a CPU, and other settings; gives file and output folder."""

    def build(**changes):
        folder = tmp_path_factory.mktemp("axolotl")
        settings = {
            **yaml.safe_load(RECIPE.read_text()),
            "base_model": str(tiny_model_dir),
            "datasets": [{"path": str(data), "ds_type": "json", "type": "alpaca"}],
            "output_dir": str(folder / "out"),
            "dataset_prepared_path": str(folder / "prepared"),
            "dataset_num_proc": 1,
            "special_tokens": {"pad_token": "</s>"},
            "attn_implementation": "eager",
            "bf16": False,
            "micro_batch_size": 2,
            "max_steps": STEPS,
            "save_steps": STEPS // 2,
            "saves_per_epoch": None,
            "lr_scheduler": "constant",
            "warmup_steps": 0,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            **changes,
        }
        file = folder / "axolotl.yaml"
        file.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
        return file, folder / "out"

    return build


@pytest.fixture(scope="module")
def trained(python, write):
    """A new mixture after 20 steps of `axolotl train`, as a user starts it."""
    file, out = write()
    run(python.parent / "axolotl", "train", file, cwd=file.parent)
    return file, out


def logged(out):
    state = json.loads((out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_mixture_has_its_experts_moved_and_works_with_mola(trained, tiny_model_dir, encoded):
    _, out = trained
    model = mola.load_model(tiny_model_dir, out, device="cpu", dtype="float32")
    layers = [model.base_model.model.model.layers[i].mlp.up_proj for i in range(4)]
    assert [layer.num_experts["default"] for layer in layers] == [2, 4, 6, 8]
    early, late = tensors(out / f"checkpoint-{STEPS // 2}"), tensors(out)
    for part, number in (("mola_A", 28), ("mola_B", 28), ("mola_router", 28)):
        names = [name for name in late if part in name]
        assert len(names) == number
        assert all(not torch.equal(early[name], late[name]) for name in names), part
    with torch.no_grad(), model.disable_adapter():
        before = model(**batch(encoded, range(8))).loss
    with torch.no_grad():
        assert model(**batch(encoded, range(8))).loss < before - 0.5


def test_resuming_gives_the_same_adapter(trained, python, write):
    file, out = trained
    again, folder = write(resume_from_checkpoint=str(out / f"checkpoint-{STEPS // 2}"))
    run(python.parent / "axolotl", "train", again, "--launcher", "python", cwd=file.parent)
    one, two = tensors(out), tensors(folder)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_losses_are_those_of_mola_train(python, write, tiny_model_dir, data, encoded, tmp_path):
    """From one adapter, on the same batches; the router losses are switched on for it."""
    config = MolaConfig(num_experts="2468", r=4, task_type="CAUSAL_LM")
    start = save_adapter(tiny_model_dir, tmp_path / "start", config)
    tokens = tmp_path / "tokens.jsonl"
    encoded.remove_columns("length").to_json(tokens)
    file, out = write(
        lora_model_dir=str(start),
        datasets=[{"path": str(tokens), "ds_type": "json", "type": None}],
        lora_r=4,
        lora_dropout=None,
        mola={"num_experts": "2468", "router_aux_loss_coef": str(COEFFICIENT)},
        learning_rate=RATE,
        curriculum_sampling=True,
        shuffle_merged_datasets=False,
    )
    run(python.parent / "axolotl", "train", file, "--launcher", "python", cwd=file.parent)
    flags = {
        "base_model": tiny_model_dir,
        "adapter": start,
        "data": data,
        "output_dir": tmp_path / "mola",
        "dtype": "float32",
        "template": "alpaca",
        "cutoff_len": 512,
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "train_sampling_strategy": "sequential",
        "router_aux_loss_coef": COEFFICIENT,
        "logging_steps": 1,
        "eval_strategy": "no",
    }
    assert main(["train", *(f"--{name}={value}" for name, value in flags.items())]) == 0
    ours, theirs = list(losses(tmp_path / "mola").values()), logged(out)
    assert len(theirs) == STEPS
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4
    assert not any(torch.equal(tensors(start)[name], tensor) for name, tensor in tensors(out).items())
    task, balance = first_losses(tiny_model_dir, start, batch(encoded, range(2)))
    assert theirs[0] == pytest.approx(task + COEFFICIENT * balance, abs=1e-4)
    saved = json.loads((out / "adapter_config.json").read_text())
    assert saved["router_aux_loss_coef"] == COEFFICIENT


def first_losses(base, adapter, batch):
    """Task loss and balance loss of a batch, without any trainer."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter, is_trainable=True
    ).train()
    task = model(**batch).loss.item()
    model.peft_config["default"].router_aux_loss_coef = COEFFICIENT
    model(**batch)
    return task, model.get_balance_loss().item()


REFUSED = {
    "a name": ({"mola": {"num_expert": "2468"}}, "mola"),
    "a value": ({"mola": {"num_experts": 2468}}, "num_experts"),
    "too many of one": ({"mola": {"num_experts": "2468", "top_k": 0}}, "top_k"),
    "dora": ({"peft_use_dora": True}, "peft_use_dora"),
    "loraplus": ({"loraplus_lr_ratio": 16}, "loraplus_lr_ratio"),
    "kernels": ({"lora_mlp_kernel": True}, "lora_mlp_kernel"),
    "relora": ({"relora": True}, "relora"),
    "loftq": ({"peft": {"loftq_config": {"loftq_bits": 4}}}, "peft"),
    "4 bit": ({"load_in_4bit": True}, "load_in_4bit"),
    "a block without its adapter": ({"adapter": "lora"}, "mola"),
}


def test_unsupported_settings_are_an_error(python, write, trained, tmp_path):
    _, out = trained
    files = {name: write(**changes)[0] for name, (changes, _) in REFUSED.items()}
    files["nothing"] = write(adapter="lora", mola=None)[0]
    calls = [("load", str(file)) for file in files.values()]
    merged = [write(lora_model_dir=str(out))[0], write(adapter="lora", mola=None, lora_model_dir=str(out))[0]]
    calls += [("merge", str(file)) for file in merged]
    (tmp_path / "calls.json").write_text(json.dumps(calls))
    run(python, "-c", JUDGE, tmp_path / "calls.json", tmp_path / "said.json", cwd=tmp_path)
    said = json.loads((tmp_path / "said.json").read_text())
    assert str(files["nothing"]) not in said  # the plug-in leaves other trainings alone
    for name, (_, field) in REFUSED.items():
        assert said[str(files[name])].startswith("MolaError: ")
        assert f"`{field}`" in said[str(files[name])]
    for file in merged:
        assert said[str(file)].startswith("MolaError: `merge-lora`")
        assert not Path(file.parent, "out", "merged").exists()


def test_merge_lora_ends_with_an_error(python, trained):
    file, out = trained
    printed = run(python.parent / "axolotl", "merge-lora", file, cwd=file.parent, succeeds=False)
    assert "MolaError: `merge-lora`: a mixture cannot be merged" in printed
    assert not (out / "merged").exists()


def test_another_mixture_than_the_saved_one_is_refused(python, write, trained):
    _, out = trained
    file, folder = write(lora_model_dir=str(out), mola={"num_experts": "8642"})
    printed = run(python.parent / "axolotl", "train", file, "--launcher", "python", cwd=file.parent, succeeds=False)
    assert "MolaError: `num_experts` is [2, 4, 6, 8] in " in printed
    assert "not '8642': leave it out, or start with new experts" in " ".join(printed.split())
    assert not (folder / "adapter_model.safetensors").exists()
