"""Telemetry of a training: every token once, whatever the trainer does around it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.training_args import ParallelMode

from mola import MolaConfig, MolaLinear
from mola.insight import ROUTING_FILE
from mola.insight.recorder import RouterRecorder, recorded_gates
from mola.insight.telemetry import ExpertTelemetry
from mola.insight.usage import UsageCounter, usage_of_sums
from mola.tuner.routing import ROUTERS
from tests.grids import slow
from tests.tuner.test_routing import sigmoid_router

# One layer has top_k 1, whose router learns nothing without router losses; it is not to learn here.
pytestmark = pytest.mark.filterwarnings("ignore:.*top_k=1:UserWarning")

OF_TOKENS = ("entropy", "margin", "effective_experts", "first_gate_above")  # means over tokens
SUMMARY = {f"experts/{name}" for name in ("balance", "entropy", "margin", "dead", "drift")}


@pytest.fixture(scope="module")
def data():
    """Sixteen samples of different length; half of each is a prompt that is not trained."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(16):
        ids = torch.randint(2, 250, (6 + 5 * index % 17,), generator=generator).tolist()
        labels = [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]
        samples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return Dataset.from_list(samples)


@pytest.fixture
def model(tiny_model_dir):
    """Layers with 1, 2, 3 and 8 experts that matter from the start."""
    torch.manual_seed(1)
    config = MolaConfig(
        num_experts=[1, 2, 3, 8], top_k=[1, 2, 1, 3], r=2, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32), config)


@pytest.fixture
def make(model, data, tmp_path, tiny_model_dir):
    """A trainer with telemetry into `tmp_path/routing.jsonl`. Weights stay as they are unless a rate is given."""

    def build(telemetry=None, folder=tmp_path, **options):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model_dir, pad_token="</s>")
        settings = {
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "learning_rate": 0.0,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**{**settings, **options}),
            train_dataset=data,
            eval_dataset=data,
            data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
        )
        (telemetry or ExpertTelemetry(folder / ROUTING_FILE)).add_to(trainer)
        return trainer

    return build


def lines(folder):
    return [json.loads(line) for line in (folder / ROUTING_FILE).read_text(encoding="utf-8").splitlines()]


def expected(model, data, samples=None):
    """Use of experts, sample by sample and without padding."""
    counter = UsageCounter()
    model.eval()
    for sample in data if samples is None else data.select(samples):
        with recorded_gates(model) as recorded, torch.no_grad():
            model(torch.tensor([sample["input_ids"]]))
        counter.add(recorded)
    return counter.usage()


def pooled(found):
    """Means over the tokens of several lines, by module."""
    total = {}
    for line in found:
        for record in line["modules"]:
            mine = total.setdefault(record["module"], {"num_tokens": 0, "sums": 0})
            mine["num_tokens"] += record["num_tokens"]
            values = [*record["shares"], *record["mean_gates"], *(record[name] for name in OF_TOKENS)]
            mine["sums"] = mine["sums"] + torch.tensor(values, dtype=torch.float64) * record["num_tokens"]
    return {module: (mine["num_tokens"], mine["sums"] / mine["num_tokens"]) for module, mine in total.items()}


def assert_same_use(found, usages):
    means = pooled(found)
    assert list(means) == [usage.module for usage in usages]
    for usage in usages:
        num_tokens, values = means[usage.module]
        assert num_tokens == usage.num_tokens
        of_tokens = [getattr(usage, name) for name in OF_TOKENS]
        wanted = torch.tensor([*usage.shares, *usage.mean_gates, *of_tokens], dtype=torch.float64)
        torch.testing.assert_close(values, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logging_steps": 3},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        *slow({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        {"eval_strategy": "steps", "eval_steps": 1},
        *slow({"bf16": True}),
    ],
    ids=["plain", "rest of the run", "accumulation", "checkpointing", "re-entrant", "evaluation", "autocast"],
)
def test_every_token_counts_once(make, model, data, tmp_path, options):
    make(**options).train()
    found = lines(tmp_path)
    assert [line["step"] for line in found] == ([3, 4] if options.get("logging_steps") else [1, 2, 3, 4])
    usages = expected(model, data)
    if options.get("bf16"):  # other roundings before the routers: a few tokens choose others
        assert [num for num, _ in pooled(found).values()] == [usage.num_tokens for usage in usages]
        return
    assert_same_use(found, usages)
    assert sum(line["tokens"] for line in found) == sum(len(sample["input_ids"]) for sample in data)


def test_telemetry_beside_router_losses(make, model, data, tmp_path):
    model.peft_config["default"].router_aux_loss_coef = 0.1
    make().train()
    assert_same_use(lines(tmp_path), expected(model, data))


def test_gates_come_from_the_adapters_router_function(make, model, data, tmp_path, monkeypatch):
    monkeypatch.setitem(ROUTERS, "sigmoid", sigmoid_router)
    for layer in model.modules():
        if isinstance(layer, MolaLinear):
            layer.settings["default"] = replace(layer.settings["default"], router="sigmoid")
    make().train()
    assert_same_use(lines(tmp_path), expected(model, data))


def test_a_line_counts_the_tokens_of_its_steps(make, model, data, tmp_path):
    trainer = make(max_steps=2)
    seen = []
    collate = trainer.data_collator
    trainer.data_collator = lambda samples: seen.append([s["input_ids"] for s in samples]) or collate(samples)
    trainer.train()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    for line, batch in zip(lines(tmp_path), seen[:2], strict=True):  # one more may have been collated ahead
        usages = expected(model, [{"input_ids": ids} for ids in batch])
        assert_same_use([line], usages)
        for record, usage in zip(line["modules"], usages, strict=True):
            assert record["dead_experts"] == list(usage.dead_experts)
            assert record["balance"] == pytest.approx(usage.balance, abs=1e-5)
            assert record["layer_index"] == usage.layer_index


def test_drift_and_the_entries_of_the_log(make, model, tmp_path):
    trainer = make(learning_rate=0.05, max_steps=3)
    trainer.train()
    found = lines(tmp_path)
    assert {record["drift"] for record in found[0]["modules"]} == {None}
    for line, before in zip(found[1:], found, strict=False):
        for record, earlier in zip(line["modules"], before["modules"], strict=True):
            pairs = zip(record["mean_gates"], earlier["mean_gates"], strict=True)
            assert record["drift"] == pytest.approx(sum(abs(a - b) for a, b in pairs) / 2, abs=2e-6)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [set(entry) & SUMMARY for entry in entries] == [SUMMARY - {"experts/drift"}, SUMMARY, SUMMARY]
    for entry, line in zip(entries, found, strict=True):
        records = line["modules"]
        for name in ("balance", "entropy", "margin"):
            mean = sum(record[name] for record in records) / len(records)
            assert entry[f"experts/{name}"] == pytest.approx(mean, abs=1e-5)
        assert entry["experts/dead"] == sum(len(record["dead_experts"]) for record in records)


def test_a_run_that_diverges_is_recorded_to_its_end(make, model, tmp_path):
    trainer = make(max_steps=2)
    trainer.train()
    for module in model.modules():
        if isinstance(module, MolaLinear) and "default" in module.mola_router:
            torch.nn.init.constant_(module.mola_router["default"], float("nan"))
    trainer.args.max_steps = 4
    trainer.train()
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for line in found[2:]:
        assert None in line["modules"][0]["mean_gates"]
        assert line["modules"][0]["drift"] is None


def test_experts_that_are_never_chosen_are_dead(make, model, tmp_path):
    """In a run that trains everything but the routers of one layer."""
    for module in model.modules():
        if isinstance(module, MolaLinear) and module.layer_index == 2:
            # Of equal logits the first are chosen: with top_k 1 experts 1 and 2 never are.
            torch.nn.init.zeros_(module.mola_router["default"])
            module.mola_router["default"].requires_grad_(False)
    trainer = make(learning_rate=1e-2)
    trainer.train()
    for line in lines(tmp_path):
        dead = {tuple(record["dead_experts"]) for record in line["modules"] if record["layer_index"] == 2}
        assert dead == {(1, 2)}
    assert all(entry["experts/dead"] >= 14 for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("step", [*slow(1, 2), 3])
def test_a_resumed_run_records_the_same_as_an_uninterrupted_run(step, make, tmp_path, model):
    """Stopped in the middle of an interval, and at its end."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"learning_rate": 1e-2, "logging_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make(folder=whole, **options).train()
    model.load_state_dict(start)
    make(folder=part, **options).train()
    with (part / ROUTING_FILE).open("a", encoding="utf-8") as file:
        file.write('{"step": 9, "mod')  # killed while it wrote
    make(folder=part, **options).train(resume_from_checkpoint=str(part / f"checkpoint-{step}"))
    assert lines(part) == lines(whole)


def remove_sums(path):
    path.unlink()


def write_sums_of_an_earlier_version(path):
    """Up to version 0.9.0 each router had two sums less."""
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "sums": [row[:-2] for row in saved["sums"]]}))


@pytest.mark.parametrize("change", [remove_sums, write_sums_of_an_earlier_version])
def test_a_checkpoint_without_sums_is_warned_about(make, tmp_path, caplog, change):
    options = {"logging_steps": 2, "save_strategy": "steps", "save_steps": 3}
    make(**options).train()
    change(tmp_path / "checkpoint-3" / "routing_sums.json")
    make(**options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "no sums of the experts' use since step 2" in caplog.text


def test_closing_removes_all_hooks(make, model, tmp_path):
    def hooks():
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    before = hooks()
    recorder = RouterRecorder(model)
    assert hooks() == before + 2
    recorder.close()
    trainer = make()
    trainer.train()
    assert hooks() == before
    assert all(module.observer is None for module in model.modules() if isinstance(module, MolaLinear))
    model.train()(torch.tensor([[5, 6, 7]]))
    assert not any(recorder.sums().flatten())


def test_a_warning_says_why_nothing_is_recorded(model, tmp_path, caplog):
    telemetry = ExpertTelemetry(tmp_path / ROUTING_FILE)
    telemetry.on_train_begin(SimpleNamespace(parallel_mode=ParallelMode.NOT_DISTRIBUTED), None, None)
    assert "not recorded under nn.DataParallel" in caplog.text
    caplog.clear()
    args, state = SimpleNamespace(parallel_mode=None, world_size=1), TrainerState(is_world_process_zero=True)
    telemetry.on_train_begin(args, state, TrainerControl(), model=model)
    for _ in range(2):  # and no forward pass before, as of a model whose compiled code knows no recorder
        telemetry.on_log(args, state, TrainerControl(), logs={"loss": 1.0})
    telemetry.close()
    assert caplog.text.count("no training forward pass of the model was seen") == 1


def test_log_only_and_models_without_routers(make, model, data, tmp_path, tiny_model_dir):
    trainer = make(ExpertTelemetry(), max_steps=1)
    trainer.train()
    assert "experts/balance" in trainer.state.log_history[0]
    assert not (tmp_path / ROUTING_FILE).exists()
    base = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    trainer = make(max_steps=1)
    trainer.model = trainer.model_wrapped = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    trainer.train()
    assert not (tmp_path / ROUTING_FILE).exists()
    assert not any("experts/balance" in entry for entry in trainer.state.log_history)


def test_both_calls_of_a_layer_count(model):
    """Once with a shared input and once with another: both count."""
    recorder = RouterRecorder(model)
    layer = model.base_model.model.model.layers[3].self_attn.q_proj
    original = layer.forward
    layer.forward = lambda x: original(x) + original(2 * x)
    model.train()(torch.tensor([[5, 6, 7]]))
    counts = {usage.module: usage.num_tokens for usage in usage_of_sums(recorder.routers, recorder.sums())}
    assert counts.pop("base_model.model.model.layers.3.self_attn.q_proj") == 6
    assert set(counts.values()) == {3}
    recorder.close()


def test_padding_of_encoder_and_decoder_does_not_count():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    config = MolaConfig(num_experts=2, r=2, target_modules=["q", "k", "wi"], task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(base, config).train()
    recorder = RouterRecorder(model)
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "labels": torch.tensor([[9, 9, 1], [9, 1, -100]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    model(**batch)
    counts = {
        usage.module.split("model.", 2)[2]: usage.num_tokens
        for usage in usage_of_sums(recorder.routers, recorder.sums())
    }
    recorder.close()
    for name, count in counts.items():
        reads_encoder = name.startswith("encoder") or name.endswith("EncDecAttention.k")
        assert count == (6 if reads_encoder else 5), name
