"""What a run can be: trained on from an adapter, checkpointed, accumulated, with options of the trainer and of PEFT."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mola import MolaError, TrainOptions, train
from mola.cli import main
from mola.data.templates import template_names
from mola.training.distributed import check_distributed
from mola.training.model import adapter_config
from tests.grids import slow
from tests.training.runs import NO_EVALUATION, WEIGHTS, built, evaluation_loss, losses, read_record
from tests.versions import needs


def test_adapter_is_trained_on_with_its_own_configuration(flags, tmp_path, tiny_model_dir, rows_file):
    first = {"num_experts": "1224", "r": 3, "lora_dropout": 0, "router_aux_loss_coef": 0}
    assert main(flags(tmp_path / "first", **first, **NO_EVALUATION)) == 0
    whole_batch = {"per_device_train_batch_size": 10, "num_train_epochs": 3, "warmup_steps": 0, **NO_EVALUATION}
    assert main(flags(tmp_path / "second", base_model=None, adapter=tmp_path / "first", **whole_batch)) == 0
    assert read_record(tmp_path / "second")["settings"]["base_model"] == str(tiny_model_dir)
    expected = evaluation_loss(tmp_path / "first", tiny_model_dir, rows_file, slice(None))
    assert losses(tmp_path / "second")[1] == pytest.approx(expected, rel=1e-4)
    configs = [
        json.loads((tmp_path / name / "adapter_config.json").read_text(encoding="utf-8"))
        for name in ("first", "second")
    ]
    digests = [config.pop("weights_sha256") for config in configs]
    assert configs[0] == configs[1]
    assert digests[0] != digests[1]
    one, two = load_file(tmp_path / "first" / WEIGHTS), load_file(tmp_path / "second" / WEIGHTS)
    assert one.keys() == two.keys()
    assert any(not torch.equal(one[name], two[name]) for name in one)


@needs("transformers", "5.10", "its accumulated loss counts a label more that is not trained")
def test_no_padding_position_is_trained(flags, tmp_path, tiny_model_dir, rows_file):
    """Padding in front would have to predict the begin token, which counts when prompts are trained."""
    options = {"per_device_train_batch_size": 10, "max_steps": 1, "warmup_steps": 0, "lora_dropout": 0}
    assert main(flags(train_on_inputs="true", learning_rate=1e-30, **options, **NO_EVALUATION)) == 0
    expected = evaluation_loss(tmp_path / "run", tiny_model_dir, rows_file, slice(None), train_on_inputs=True)
    assert losses(tmp_path / "run")[1] == pytest.approx(expected, rel=1e-5)
    encoded = read_record(tmp_path / "run")["data"]["train"]
    assert encoded["trained_tokens"] == encoded["tokens"]


@pytest.mark.slow
def test_training_settings_of_a_continued_adapter_may_change(flags, tmp_path, rows_file, caplog):
    assert main(flags(num_experts="1224", num_train_epochs=1, **NO_EVALUATION)) == 0
    caplog.clear()
    changes = {"lora_dropout": 0.5, "router_aux_loss_coef": 0.25, "router_aux_loss_reduction": "layer"}
    again = {"adapter": tmp_path / "run", "num_train_epochs": 1, **NO_EVALUATION}
    assert main(flags(tmp_path / "next", **again, **changes)) == 0
    assert "was trained with the prompt template" not in caplog.text
    config = json.loads((tmp_path / "next" / "adapter_config.json").read_text(encoding="utf-8"))
    before = json.loads((tmp_path / "run" / "adapter_config.json").read_text(encoding="utf-8"))
    assert {name for name in config if config[name] != before[name]} == {*changes, "weights_sha256"}
    assert {name: config[name] for name in changes} == changes
    assert read_record(tmp_path / "next")["adapter_settings"] == changes
    trained = read_record(tmp_path / "run")["template"]
    other = next(name for name in template_names() if name != trained)
    arguments = flags(tmp_path / "other", **again, template=other)
    assert main(arguments) == 0
    assert f"was trained with the prompt template {trained} and is used with {other}" in caplog.text


def test_checkpoints_hold_the_adapter_alone_and_load_as_one(flags, tmp_path, tiny_model_dir):
    assert main(flags(num_train_epochs=1)) == 0
    checkpoint = next((tmp_path / "run").glob("checkpoint-*"))
    weights = load_file(checkpoint / WEIGHTS)
    assert [name for name in weights if "mola_" not in name] == []
    assert not (checkpoint / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    loaded = dict(PeftModel.from_pretrained(base, checkpoint).named_parameters())
    assert all(torch.equal(loaded[f"{name}.default"], tensor) for name, tensor in weights.items())


def test_adapter_of_another_model_is_refused(flags, tmp_path, error_line):
    assert main(flags(tmp_path / "first", max_steps=1, warmup_steps=0, **NO_EVALUATION)) == 0
    path = tmp_path / "first" / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "r": 5}), encoding="utf-8")
    assert "adapter" in error_line(flags(tmp_path / "second", adapter=tmp_path / "first"))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["module", "layer"])
def test_balance_loss_is_the_same_with_gradient_checkpointing_and_accumulation(flags, tmp_path, reduction):
    """10 samples in batches of 2 and 2 batches per step: the fifth batch is a step of its own."""
    settings = {
        "router_aux_loss_coef": 0.5,
        "router_aux_loss_reduction": reduction,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lora_dropout": 0,
        **NO_EVALUATION,
    }
    assert main(flags(tmp_path / "plain", **settings)) == 0
    assert main(flags(tmp_path / "checkpointed", gradient_checkpointing="true", **settings)) == 0
    assert main(flags(tmp_path / "off", **{**settings, "router_aux_loss_coef": 0})) == 0
    assert read_record(tmp_path / "plain")["steps"] == 6
    first, second, off = (losses(tmp_path / name) for name in ("plain", "checkpointed", "off"))
    assert list(second.values()) == pytest.approx(list(first.values()), rel=1e-4)
    # One router per module is at least 1 when balanced exactly; so is one per layer, summed over four.
    assert first[1] - off[1] > 0.5 * (1 if reduction == "module" else 4) * 0.9
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "checkpointed"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


def test_reentrant_checkpointing_with_a_balance_loss_is_refused(flags, error_line):
    line = error_line(
        flags(
            router_aux_loss_coef=0.1,
            gradient_checkpointing="true",
            gradient_checkpointing_kwargs='{"use_reentrant": true}',
        )
    )
    assert "use_reentrant" in line


ADAMW = {"weight_decay": 0.1, "optim": "adamw_torch", "lr_scheduler_type": "cosine_with_min_lr"}
SGD = {"train_sampling_strategy": "group_by_length", "report_to": "none", "optim": "sgd", "max_steps": 2}
BY_STEPS = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "validation_size": 2}


@pytest.mark.parametrize(
    "options",
    [
        {**ADAMW, "lr_scheduler_kwargs": '{"min_lr": 1e-5}', "max_grad_norm": 0, "max_steps": 2},
        {**SGD, "target_modules": r".*self_attn\.(q|v)_proj", "modules_to_save": "lm_head"},
        *slow(BY_STEPS),
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_trainer_and_of_peft_work(flags, tmp_path, options):
    assert main(flags(**{**NO_EVALUATION, **options})) == 0
    record = read_record(tmp_path / "run")
    assert record["status"] == "finished"
    trained_with = record["adapter_settings"] | record["settings"]
    wanted = {name: json.loads(value) if str(value).startswith("{") else value for name, value in options.items()}
    found = {name: trained_with[name] for name in wanted}
    assert found == wanted | ({"report_to": []} if "report_to" in wanted else {})


def test_modules_to_save_of_a_base_in_half_precision_are_trained_in_float32(flags, tmp_path):
    """In bfloat16 steps this small would be rounded away."""
    options = {
        "modules_to_save": "lm_head",
        "dtype": "bfloat16",
        "learning_rate": 1e-6,
        "warmup_steps": 0,
        "max_steps": 1,
    }
    assert main(flags(**options, **NO_EVALUATION)) == 0
    (head,) = (tensor for name, tensor in load_file(tmp_path / "run" / WEIGHTS).items() if "lm_head" in name)
    assert head.dtype is torch.float32
    assert not torch.equal(head, head.bfloat16().float())


@pytest.mark.parametrize("name", [None, "eager"])
def test_attention_is_the_one_asked_for_else_the_models(name, tiny_model_dir, tmp_path):
    more = {"dtype": "float32", "attn_implementation": name}
    options = TrainOptions(base_model=str(tiny_model_dir), output_dir=str(tmp_path), **more)
    assert built(options).config._attn_implementation == (name or "sdpa")


def test_base_model_for_fsdp_is_loaded_into_cpu_memory(tiny_model_dir, rows_file, monkeypatch):
    """Whatever the device of the process is: it may not have room for the whole model."""
    monkeypatch.setattr(TrainOptions, "device", torch.device("meta"))
    options = TrainOptions(base_model=str(tiny_model_dir), data=str(rows_file), output_dir="unused", dtype="float32")
    monkeypatch.setattr("mola.training.model.uses_fsdp", lambda options: True)
    assert {parameter.device.type for parameter in built(options).parameters()} == {"cpu"}


def test_what_fsdp_cannot_shard_is_refused(monkeypatch):
    def check(is_quantized=False, **changes):
        settings = {"fsdp": True, "world_size": 2, "device": torch.device("cuda"), "optim": "adamw_torch", **changes}
        check_distributed(SimpleNamespace(**settings), None, is_quantized=is_quantized, has_stacked_experts=False)

    with pytest.raises(MolaError, match="`fsdp` cannot be combined with a quantised base"):
        check(is_quantized=True)
    with pytest.raises(MolaError, match="`optim` adafactor needs the rows and columns"):
        check(optim="adafactor")
    monkeypatch.setattr("mola.training.distributed.accelerate_version", "1.14.0")
    with pytest.raises(MolaError, match="needs accelerate 1.15 or newer, .*: found 1.14.0"):
        check()


def test_train_on_inputs_given_as_false_is_false(flags, tmp_path):
    assert main(flags(train_on_inputs="false", max_steps=2, **NO_EVALUATION)) == 0
    encoded = read_record(tmp_path / "run")["data"]["train"]
    assert encoded["trained_tokens"] < encoded["tokens"]


@pytest.mark.parametrize(
    ("given", "start"), [(None, True), (True, True), (False, False), ("false", False), ("gaussian", "gaussian")]
)
def test_options_in_python(given, start, tiny_model_dir, tmp_path):
    """Starts as `MolaConfig` has them; paths become texts, which the record of a run needs."""
    options = TrainOptions(base_model=Path(tiny_model_dir), output_dir=tmp_path / "run", init_lora_weights=given)
    assert adapter_config(options).init_lora_weights == start
    assert options.base_model == str(tiny_model_dir)


def test_patterns_initialisation_and_loraplus(flags, tmp_path, tiny_model_dir):
    patterns = {"num_experts_pattern": {"self_attn.*": 1, "up_proj": 3}, "rank_pattern": {"down_proj": 2}}
    settings = {**patterns, "alpha_pattern": {"q_proj": 4.0}, "init_lora_weights": "orthogonal", "use_rslora": True}
    given = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in settings.items()}
    options = {"num_experts": "1224", "r": 4, "loraplus_lr_ratio": 4, "num_train_epochs": 1, "eval_strategy": "no"}
    run = tmp_path / "run"
    assert main(flags(**options, save_strategy="steps", save_steps=1, **given)) == 0
    config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    assert {name: config[name] for name in settings} == settings
    record = read_record(run)
    weights = load_file(run / WEIGHTS)
    assert record["trainable_parameters"] == sum(each.numel() for each in weights.values())
    assert record["allocation"]["trainable_parameters"] == record["trainable_parameters"]
    shapes = {
        name.split("layers.")[1].rpartition(".")[0]: each.shape[:2] for name, each in weights.items() if "A" in name
    }
    assert shapes["3.self_attn.q_proj"] == (1, 4)
    assert shapes["0.mlp.up_proj"] == (3, 4)
    assert shapes["3.mlp.down_proj"] == (4, 2)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), run)
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 2.0
    rates = {}
    states = torch.load(next(run.glob("checkpoint-*")) / "optimizer.pt", weights_only=True)
    for group in states["param_groups"]:
        rates[group["initial_lr"]] = rates.get(group["initial_lr"], 0) + len(group["params"])
    rate = min(rates)
    count = sum(".mola_B" in name for name in weights)
    assert rates == {rate: len(weights) - count, 4 * rate: count}


def test_wrong_pattern_stops_before_weights_are_loaded(flags, no_weights_dir, capsys):
    assert main(flags(base_model=no_weights_dir, num_experts_pattern='{"k": 2}')) == 2
    assert "`num_experts_pattern`" in capsys.readouterr().err
    assert main(flags(base_model=no_weights_dir, modules_to_save="lm_head,")) == 2
    assert "`modules_to_save` must be names between commas, got 'lm_head,'" in capsys.readouterr().err
    assert main(flags(base_model=no_weights_dir, loraplus_lr_ratio=0)) == 2
    assert "`loraplus_lr_ratio` must be above 0: got 0" in capsys.readouterr().err


def test_one_process_uses_one_gpu(flags, tmp_path, monkeypatch, caplog):
    """The trainer would take all that it sees, with a batch for each."""
    seen = property(lambda options: options.__dict__.get("_n_gpu") or 3)
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", seen)
    assert main(flags(num_train_epochs=1, per_device_train_batch_size=2, **NO_EVALUATION)) == 0
    assert "One of 3 GPUs is used" in caplog.text
    assert read_record(tmp_path / "run")["effective_batch_size"] == 2


@pytest.mark.slow
def test_options_made_before_another_run_are_trained_with(tiny_model_dir, rows_file, tmp_path):
    """In another precision; of evaluations that choose what is saved, and not what the run ends with."""
    common = {"base_model": str(tiny_model_dir), "data": str(rows_file), "validation_size": 2, "max_steps": 1}
    common |= {"warmup_steps": 0, "disable_tqdm": True, "use_cpu": True}
    common |= {"eval_strategy": "epoch", "save_strategy": "best", "load_best_model_at_end": False}
    options = [
        TrainOptions(**common, dtype=dtype, output_dir=str(tmp_path / dtype)) for dtype in ("float32", "bfloat16")
    ]
    assert [train(each).status for each in options] == ["finished"] * 2
    assert all(list((tmp_path / dtype).glob("checkpoint-*")) for dtype in ("float32", "bfloat16"))
