"""LLaMA-Factory's command line, started by mola, trains, asks and continues mixtures, and refuses what they cannot."""

import json

import pytest

from tests.integrations.environments import ROOT
from tests.integrations.host_runs import (
    ROWS,
    STEPS,
    TORCH,
    answers_of_mola,
    assert_trained_mixture,
    first_adapter,
    has_moved,
    losses_of_mola_train,
    losses_of_trainer,
)

pytestmark = pytest.mark.slow

PROGRAM = ["-m", "mola.integrations.llama_factory"]
RECIPE = ROOT / "recipes" / "llama_factory" / "sft.yaml"
_STAND_IN = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "torchaudio"
version = "2.11.0"
[tool.setuptools]
py-modules = ["torchaudio"]
"""
_REFUSED = """
import json, sys
from mola.integrations.llama_factory import register
register()
from llamafactory.train.tuner import export_model, run_exp
for function, arguments in json.loads(sys.argv[1]):
    try:
        {"train": run_exp, "export": export_model}[function](arguments)
        print("RESULT", "nothing was refused")
    except ValueError as error:
        print("RESULT", type(error).__name__, " ".join(str(error).split()))
"""
_CHAT = """
import json, sys
from mola.integrations.llama_factory import register
register()
from llamafactory.chat import ChatModel
model = ChatModel(json.loads(sys.argv[1]))
for text in json.loads(sys.argv[2]):
    print("RESULT", json.dumps(model.chat([{"role": "user", "content": text}])[0].response_text))
"""


@pytest.fixture(scope="module")
def python(venv, tmp_path_factory):
    # Its import needs a torchaudio; those for other builds of PyTorch than the installed one do not load.
    sound = tmp_path_factory.getbasetemp() / "torchaudio"
    sound.mkdir(exist_ok=True)
    (sound / "pyproject.toml").write_text(_STAND_IN, encoding="utf-8")
    (sound / "torchaudio.py").write_text('"""Texts need no sound."""\n', encoding="utf-8")
    return venv("llama-factory-0.9.5", ["llamafactory==0.9.5", TORCH], stand_ins=[sound])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of LLaMA-Factory's data; its bare template adds no begin token."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{**row, "instruction": f"<s>{row['instruction']}\n\n"} for row in ROWS]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def options(tiny_model_dir, data):
    """Options of a run on the rows in their order, four at a time."""

    def build(output_dir, **others):
        return {
            "model_name_or_path": str(tiny_model_dir),
            "dataset_dir": str(data),
            "dataset": "rows",
            "template": "empty",
            "output_dir": str(output_dir),
            "disable_shuffling": True,
            "gradient_accumulation_steps": 1,
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            "lora_dropout": 0.0,
            "logging_steps": 1,
            "save_strategy": "steps",
            "use_cpu": True,
            **others,
        }

    return build


@pytest.fixture(scope="module")
def train(python, run_in):
    def run(given, launcher=(), **environment):
        arguments = [f"{name}={json.dumps(value)}" for name, value in given.items()]
        return run_in(python, [*launcher, *PROGRAM, "train", RECIPE, *arguments], **environment)

    return run


@pytest.fixture(scope="module")
def trained(train, options, tmp_path_factory):
    """The recipe's mixture."""
    folder = tmp_path_factory.mktemp("llama-factory") / "run"
    done = train(options(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_recipe_trains_a_mixture_that_mola_loads(trained, tiny_model_dir):
    assert_trained_mixture(tiny_model_dir, trained)


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_losses_are_those_of_mola_train(coefficient, train, options, tiny_model_dir, tmp_path):
    adapter = first_adapter(tiny_model_dir, tmp_path / "first")
    settings = {"router_aux_loss_coef": coefficient}
    expected = losses_of_mola_train(tiny_model_dir, adapter, tmp_path / "mola", add_eos_token="false", **settings)
    given = {f"mola_{name}": value for name, value in settings.items()}
    # Without a word on its kind LLaMA-Factory's checkpointing re-enters, in which router losses would be lost.
    given |= {"adapter_name_or_path": str(adapter), "gradient_checkpointing": True}
    done = train(options(tmp_path / "run", **given))
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses_of_trainer(tmp_path / "run") == pytest.approx(expected, abs=1e-4)
    assert len(expected) == STEPS
    assert has_moved(adapter, tmp_path / "run") == {"mola_A": True, "mola_B": True, "mola_router": True}


@pytest.mark.parametrize("started_by", ["torchrun", "itself"])
def test_two_processes_train(started_by, train, options, trained, tiny_model_dir, tmp_path):
    given = options(tmp_path / "run", per_device_train_batch_size=2)
    if started_by == "torchrun":
        done = train(given, launcher=["-m", "torch.distributed.run", "--nproc_per_node", "2"])
    else:
        done = train(given, FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_trained_mixture(tiny_model_dir, tmp_path / "run")
    # Two halves of the same batches; the router loss of two halves is not that of the whole, but close.
    assert losses_of_trainer(tmp_path / "run") == pytest.approx(losses_of_trainer(trained), abs=1e-2)


def test_run_goes_on_from_its_checkpoint(train, options, tmp_path):
    assert train(options(tmp_path / "run", max_steps=2)).returncode == 0
    done = train(options(tmp_path / "run", max_steps=4))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses_of_trainer(tmp_path / "run")) == 4
    assert has_moved(tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-4")["mola_B"]


def test_chat_answers_as_mola_generate(trained, python, run_in, tiny_model_dir):
    given = {
        "model_name_or_path": str(tiny_model_dir),
        "adapter_name_or_path": str(trained),
        "template": "empty",
        "do_sample": False,
        "max_new_tokens": 8,
    }
    prompts = [row["instruction"] for row in ROWS[:2]]
    done = run_in(python, ["-c", _CHAT, json.dumps(given), json.dumps([f"<s>{text}\n\n" for text in prompts])])
    answers = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if "RESULT" in line]
    assert len(answers) == 2, done.stderr[-3000:]
    assert answers == answers_of_mola(tiny_model_dir, trained, prompts)
    assert answers != answers_of_mola(tiny_model_dir, None, prompts)
    done = run_in(python, ["-c", _CHAT, json.dumps({**given, "finetuning_type": "mola", "mola_top_k": 1}), "[]"])
    assert "`mola_top_k` is 2" in done.stderr


def test_unsupported_uses_of_a_mixture_are_an_error(trained, python, run_in, options, tiny_model_dir, tmp_path):
    base = {"stage": "sft", "do_train": True, "finetuning_type": "mola", "report_to": "none", "overwrite_cache": True}

    def run(**given):
        return ["train", {**options(tmp_path / "run"), **base, **given}]

    export = {"model_name_or_path": str(tiny_model_dir), "template": "empty", "export_dir": str(tmp_path / "export")}
    runs = {
        "`use_dora` (True)": run(use_dora=True),
        "`pissa_init` (True)": run(pissa_init=True),
        "`loraplus_lr_ratio` (16.0)": run(loraplus_lr_ratio=16.0),
        "`use_unsloth_gc` does not work with a mixture": run(use_unsloth_gc=True),
        "`stage` must be one of": run(stage="kto"),
        "mola_num_expert": run(mola_num_expert=2),
        "`num_experts` as one integer": run(mola_num_experts=2468),
        "need `finetuning_type: mola`": run(mola_num_experts="2468", finetuning_type="lora"),
        "`mola_num_experts` is [2, 4, 6, 8]": run(mola_num_experts="8642", adapter_name_or_path=str(trained)),
        "set `finetuning_type: mola` to train it": run(finetuning_type="lora", adapter_name_or_path=str(trained)),
        "computes this loss from logits": run(mola_router_aux_loss_coef=0.1, use_dft_loss=True),
        "`export_dir`: a mixture": ["export", {**export, "adapter_name_or_path": str(trained)}],
        "then `mola merge LORA": ["export", {**export, "finetuning_type": "mola"}],
    }
    done = run_in(python, ["-c", _REFUSED, json.dumps(list(runs.values()))])
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(results) == len(runs), done.stderr[-3000:]
    for expected, result in zip(runs, results, strict=True):
        # A field that does not exist is refused by LLaMA-Factory itself.
        assert result.startswith("RESULT ValueError" if expected == "mola_num_expert" else "RESULT MolaError"), result
        assert expected in result
    assert not (tmp_path / "export").exists()


def test_lora_stays_lora(train, options, tmp_path):
    mixture = {"mola_num_experts": None, "mola_top_k": None, "mola_router_aux_loss_coef": None}
    done = train(options(tmp_path / "run", finetuning_type="lora", max_steps=2, **mixture))
    assert done.returncode == 0, done.stderr[-3000:]
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA"


def test_wrong_start_is_one_line_and_exit_code_2(python, run_in, train, options, tmp_path):
    done = run_in(python, [*PROGRAM, "webui"])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: The command 'webui' does not work with mixtures.")
    done = train(options(tmp_path), USE_V1="1")
    assert done.returncode == 2
    assert "error: The environment variable USE_V1 selects code without mixtures" in done.stderr
