"""ms-swift's own command line trains, asks and continues mixtures, and refuses what a mixture cannot do."""

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

PLUGIN = ROOT / "src" / "mola" / "integrations" / "ms_swift.py"
_REFUSED = """
import json, sys
from swift.pipelines import export_main, rlhf_main, sft_main
for function, arguments in json.loads(sys.argv[1]):
    try:
        {"sft": sft_main, "rlhf": rlhf_main, "export": export_main}[function](arguments)
        print("RESULT", "nothing was refused")
    except ValueError as error:
        print("RESULT", type(error).__name__, " ".join(str(error).split()))
"""


@pytest.fixture(scope="module")
def python(venv):
    return venv("ms-swift-4.6.0", ["ms-swift==4.6.0", TORCH])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    turns = [[("user", f"{row['instruction']}\n\n"), ("assistant", row["output"])] for row in ROWS]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def flags(tiny_model_dir, data):
    """Flags for a run on the rows in their order, four at a time."""

    def build(output_dir, **options):
        settings = {
            "model": tiny_model_dir,
            "model_type": "llama",
            "template": "dummy",
            "dataset": data,
            "output_dir": output_dir,
            "external_plugins": PLUGIN,
            "tuner_type": "mola",
            "torch_dtype": "float32",
            "add_version": "false",
            "check_model": "false",
            "dataset_shuffle": "false",
            "train_dataloader_shuffle": "false",
            "gradient_accumulation_steps": 1,
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0,
            "weight_decay": 0,
            "adam_beta2": 0.999,
            "lora_dropout": 0,
            "logging_steps": 1,
            "save_strategy": "steps",
            "use_cpu": "true",
            "report_to": "none",
            **options,
        }
        return [text for name, value in settings.items() for text in (f"--{name}", str(value))]

    return build


@pytest.fixture(scope="module")
def swift(python, run_in):
    def run(*arguments):
        return run_in(python, ["-m", "swift.cli.main", *arguments])

    return run


@pytest.fixture(scope="module")
def trained(swift, flags, tmp_path_factory):
    """The recipe's mixture."""
    folder = tmp_path_factory.mktemp("swift") / "run"
    done = swift("sft", ROOT / "recipes" / "ms_swift" / "sft.yaml", *flags(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / f"checkpoint-{STEPS}"


def test_recipe_trains_a_mixture_that_mola_loads(trained, tiny_model_dir):
    assert_trained_mixture(tiny_model_dir, trained)


@pytest.mark.parametrize("coefficient", [0, 0.1])
def test_losses_are_those_of_mola_train(coefficient, swift, flags, tiny_model_dir, tmp_path):
    adapter = first_adapter(tiny_model_dir, tmp_path / "first")
    options = {"router_aux_loss_coef": coefficient}
    expected = losses_of_mola_train(tiny_model_dir, adapter, tmp_path / "mola", **options)
    kwargs = json.dumps({f"mola_{name}": value for name, value in options.items()})
    done = swift("sft", *flags(tmp_path / "swift", adapters=adapter, load_args="false", model_kwargs=kwargs))
    assert done.returncode == 0, done.stderr[-3000:]
    found = tmp_path / "swift" / f"checkpoint-{STEPS}"
    assert losses_of_trainer(found) == pytest.approx(expected, abs=1e-4)
    assert len(expected) == STEPS
    assert has_moved(adapter, found) == {"mola_A": True, "mola_B": True, "mola_router": True}


def test_infer_answers_as_mola_generate(trained, swift, data, tiny_model_dir, tmp_path):
    result = tmp_path / "result.jsonl"
    options = {
        "adapters": trained,
        "val_dataset": data,
        "use_chat_template": "false",
        "temperature": 0,
        "max_new_tokens": 8,
        "result_path": result,
    }
    done = swift("infer", *(text for name, value in options.items() for text in (f"--{name}", value)))
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line)["response"] for line in result.read_text(encoding="utf-8").splitlines()]
    prompts = [row["instruction"] for row in ROWS]
    assert answers == answers_of_mola(tiny_model_dir, trained, prompts)
    assert answers != answers_of_mola(tiny_model_dir, None, prompts)


def test_run_goes_on_from_its_checkpoint(trained, swift, flags, tmp_path):
    recipe = ROOT / "recipes" / "ms_swift" / "sft.yaml"
    done = swift("sft", recipe, *flags(tmp_path, resume_from_checkpoint=trained, max_steps=STEPS + 2))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses_of_trainer(tmp_path / f"checkpoint-{STEPS + 2}")) == STEPS + 2
    assert has_moved(trained, tmp_path / f"checkpoint-{STEPS + 2}")["mola_B"]


def test_unsupported_uses_of_a_mixture_are_an_error(trained, python, run_in, flags, tmp_path):
    def sft(**options):
        return ["sft", flags(tmp_path / "sft", **options)]

    def settings(**given):
        return json.dumps({f"mola_{name}": value for name, value in given.items()})

    def export(*arguments):
        return ["export", ["--adapters", str(trained), "--output_dir", str(tmp_path / "export"), *arguments]]

    loss = settings(router_aux_loss_coef=0.1)
    runs = {
        "`use_dora` (True)": sft(use_dora="true"),
        "`init_weights` must be true or false": sft(init_weights="pissa"),
        "`lorap_lr_ratio` (16.0)": sft(lorap_lr_ratio=16),
        "`tuner_backend` must be peft": sft(tuner_backend="unsloth"),
        "`optimizer` must be default": sft(optimizer="muon"),
        "`rlhf_type` must be left out": ["rlhf", flags(tmp_path / "rlhf", rlhf_type="dpo")],
        "There is no ['num_experts']": sft(model_kwargs='{"num_experts": "2468"}'),
        "There is no ['mola_num_expert']": sft(model_kwargs=settings(num_expert=2)),
        "`num_experts` as one integer": sft(model_kwargs=settings(num_experts=2468)),
        "`router` must be one of": sft(model_kwargs=settings(router="soft")),
        "`use_reentrant` false": sft(model_kwargs=loss, gradient_checkpointing_kwargs='{"use_reentrant": true}'),
        "computes this loss from logits": sft(model_kwargs=loss, label_smoothing_factor=0.1),
        "need `tuner_type: mola`, got 'lora'": sft(tuner_type="lora", model_kwargs=settings(num_experts="2468")),
        "['mola_num_expert'] in `model_kwargs`": sft(tuner_type="full", model_kwargs=settings(num_expert=2)),
        "is a mixture: set `tuner_type: mola` to train it": sft(tuner_type="lora", adapters=trained),
        "`mola_num_experts` is [2, 4, 6, 8]": sft(adapters=trained, model_kwargs=settings(num_experts="8642")),
        "`merge_lora`: a mixture cannot be merged": export("--merge_lora", "true"),
        "`to_ollama`: a mixture cannot be merged": export("--to_ollama", "true"),
    }
    done = run_in(python, ["-c", _REFUSED, json.dumps(list(runs.values()))])
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(results) == len(runs), done.stderr[-3000:]
    for expected, result in zip(runs, results, strict=True):
        assert result.startswith("RESULT MolaError"), (expected, result)
        assert expected in result
    assert not (tmp_path / "export").exists()


def test_merge_lora_command_writes_nothing(trained, swift, tmp_path):
    done = swift("merge-lora", "--adapters", trained, "--output_dir", tmp_path / "merged")
    assert done.returncode != 0
    assert "cannot be merged" in done.stderr
    assert not list((tmp_path / "merged").glob("*"))
