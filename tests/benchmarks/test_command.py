"""The benchmarks: equal providers, counts that count, and the command line from end to end on a tiny model."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from benchmarks.cases import COMPILERS
from benchmarks.command import main
from benchmarks.counting import OperatorCounter, count_operators, saved_bytes
from benchmarks.loop import copy_experts
from benchmarks.measure import Times, ratio, summarize, time_interleaved
from benchmarks.models import growth_base, load_base, training_batch
from benchmarks.providers import PROVIDERS, build, make_forward, make_step, trainable_parameters
from torch import nn

from benchmarks import models
from tests.grids import slow
from tests.words import replaced


@pytest.fixture(scope="module")
def base(case):
    return load_base(case)


@pytest.fixture(scope="module")
def batch(case, base):
    return training_batch(case, base.config.vocab_size)


# ------------------------------------------------------------------ providers


def test_the_loop_computes_the_same_function_and_gradients_as_mola(case, base, batch):
    mola, loop = (build(name, base, case).model for name in ("mola", "loop"))
    pairs = copy_experts(mola, loop)
    logits = []
    for model in (mola, loop):
        output = model(**batch, use_cache=False)
        output.loss.backward()
        logits.append(output.logits.detach())
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    # 28 linears, 1 + 2 + 4 + 8 experts of two matrices, a router where there are several.
    assert len(pairs) == 7 * (15 * 2 + 3)
    for ours, stacked, place, transposed in pairs:
        expected = stacked.grad[place].t() if transposed else stacked.grad[place]
        gradient = torch.zeros_like(ours) if ours.grad is None else ours.grad  # nobody chose this expert
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        difference = (logits[0] - build("frozen", base, case).model(**batch).logits).abs().max()
    assert difference > 0.1  # the experts are not zero, so equality says something


def test_the_floor_runs_backward_through_all_layers_and_trains_nothing(case, base, batch):
    frozen = build("frozen", base, case).model
    reached = {}

    def watch(index):
        def before(module, arguments):
            arguments[0].register_hook(lambda gradient: reached.update({index: bool(gradient.any())}))

        return before

    for index, layer in enumerate(frozen.model.layers):
        layer.register_forward_pre_hook(watch(index))
    make_step(frozen, batch, case)()
    assert reached == dict.fromkeys(range(4), True)
    assert trainable_parameters(frozen) == []


@pytest.mark.parametrize("name", PROVIDERS)
def test_providers_share_the_weights_and_leave_the_base_alone(name, case, base, batch):
    before = {key: value.clone() for key, value in base.state_dict().items()}
    provider = build(name, base, replace(case, optimizer=True))
    own = {parameter.data_ptr() for parameter in provider.model.parameters() if not parameter.requires_grad}
    assert own == {parameter.data_ptr() for parameter in base.parameters()}
    trained = [parameter.clone() for parameter in trainable_parameters(provider.model)]
    make_step(provider.model, batch, replace(case, optimizer=True))()
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    after = trainable_parameters(provider.model)
    assert any(not torch.equal(a, b) for a, b in zip(trained, after, strict=True)) is (name != "frozen")


def test_equal_lora_has_the_nearest_number_of_parameters(case, base):
    providers = {name: build(name, base, case) for name in ("lora_8", "lora_equal", "mola", "loop")}
    per_rank = providers["lora_8"].trainable_parameters / 8
    difference = providers["lora_equal"].trainable_parameters - providers["mola"].trainable_parameters
    assert abs(difference) <= per_rank / 2
    assert {each.num_linears for each in providers.values()} == {28}


def test_dropout_acts_in_every_provider_but_the_floor(case, base, batch):
    for name in PROVIDERS:
        forward = make_forward(build(name, base, replace(case, dropout=0.5)).model, batch, case)
        assert (forward().item() == forward().item()) is (name == "frozen"), name


@pytest.mark.parametrize("name", ["mola", *slow(*(name for name in PROVIDERS if name != "mola"))])
def test_a_bfloat16_base_keeps_float32_adapters(name, case):
    half = replace(case, dtype="bfloat16")
    base = load_base(half)
    provider = build(name, base, half)
    assert {parameter.dtype for parameter in trainable_parameters(provider.model)} <= {torch.float32}
    make_step(provider.model, training_batch(half, base.config.vocab_size), half)()
    gradients = [parameter.grad for parameter in trainable_parameters(provider.model)]
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def test_the_growth_model_has_the_shapes_but_few_layers(case, base):
    small = growth_base(case, 2)
    assert small.config.num_hidden_layers == 2
    assert small.model.layers[1].mlp.up_proj.weight.shape == base.model.layers[0].mlp.up_proj.weight.shape
    assert small.get_input_embeddings().weight.shape[0] == models.GROWTH_VOCABULARY


# ------------------------------------------------------------------ measuring


def test_only_the_loop_waits_for_the_device(case, base, batch):
    counted = {}
    for name in PROVIDERS:
        forward = make_forward(build(name, base, case).model, batch, case)
        forward().backward()
        counted[name] = count_operators(forward)
    syncs = {name: counts["host_syncs"] - counted["frozen"]["host_syncs"] for name, counts in counted.items()}
    # One look-up per expert: seven linears in layers of 1, 2, 4 and 8 experts.
    assert syncs == {"frozen": 0, "lora_8": 0, "lora_equal": 0, "loop": 7 * 15, "mola": 0}
    for kind in ("forward_operators", "backward_operators"):
        assert counted["frozen"][kind] < counted["lora_8"][kind] == counted["lora_equal"][kind]
        assert counted["frozen"][kind] < counted["mola"][kind] < counted["loop"][kind]


@pytest.mark.parametrize(
    "action",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.index_put((x > 0,), torch.zeros(())),
    ],
)
def test_the_counter_notices_syncs(action):
    with OperatorCounter() as counter:
        action(torch.arange(3.0))
    assert len(counter.syncs) == 1


def test_the_counter_finds_no_sync_where_there_is_none():
    x = torch.arange(6.0)
    with OperatorCounter() as counter:
        (x[torch.tensor([0, 2])] * 2).view(2, 1).to(torch.bfloat16).topk(1)
    assert counter.syncs == []
    assert counter.operators >= 4


def test_saved_bytes_counts_a_storage_once_and_no_weights():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    model, x = nn.ModuleList([first, second]), torch.randn(4, 8)
    # Each linear keeps x; the square keeps its own input.
    saved = saved_bytes(model, lambda: (first(x) + second(x)).square().sum())
    assert saved == {"saved_bytes": 2 * 4 * 8 * 4, "saved_bytes_repeated": 3 * 4 * 8 * 4}


def test_more_experts_keep_more_for_the_backward_pass(case, base, batch):
    kept = {}
    for name in ("frozen", "lora_8", "mola", "loop"):
        model = build(name, base, case).model
        kept[name] = saved_bytes(model, make_forward(model, batch, case))["saved_bytes"]
    assert kept["frozen"] < kept["lora_8"] < kept["mola"] < kept["loop"]


def test_providers_take_turns_and_warm_up_rounds_do_not_count():
    calls = []
    actions = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = time_interleaved(actions, repeats=3, warmup=1, device="cpu")
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"
    assert {len(each.cpu_seconds) for each in times.values()} == {3}
    assert {len(each.wall_seconds) for each in times.values()} == {3}
    assert {len(each.device_seconds) for each in times.values()} == {0}


def test_ratios_are_taken_within_rounds():
    ours, reference = Times(cpu_seconds=[2.0, 30.0, 4.0]), Times(cpu_seconds=[1.0, 10.0, 2.0])
    assert ratio(ours, reference)["median"] == 2.0
    assert ratio(ours, reference)["samples"] == [2.0, 3.0, 2.0]
    assert summarize([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])["p20"] == 2.0
    assert Times([1.0], [2.0], [3.0]).row()["seconds"]["median"] == 3.0


# ------------------------------------------------------------------ the command line


def run(folder, output, *arguments):
    shape = ("--batch_size", "2", "--seq_len", "12", "--repeats", "1", "--warmup", "0", "--r", "4")
    return main(replaced(["--model", str(folder), "--output", str(output), *shape], arguments))


@pytest.mark.slow
def test_from_end_to_end(tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "new" / "results.json"
    small = ("--decode_modes", "eager", "--decode_batch_sizes", "2", "--growth_experts", "1", "4")
    code = run(
        *(tiny_model_dir, output, "--suite", "step", "counts", "decode", "growth", *small),
        *("--growth_tokens", "24", "--dtype", "bfloat16", "--dropout", "0", "0.05"),
    )
    printed = capsys.readouterr()
    assert code == 0, printed.err
    record = json.loads(output.read_text())
    assert {"command", "commit", "date", "device", "machine", "options", "threads", "versions"} <= set(record)
    assert record["command"].startswith("python -m benchmarks --model")
    assert record["machine"]["cpu"]
    assert torch.__version__.startswith(record["versions"]["torch"])  # which may have no "+cu126" at its end
    results = record["results"]
    lengths = {suite: len(rows) for suite, rows in results.items()}
    # step and counts: 5 providers, 2 dropouts.
    assert lengths == {"step": 10, "counts": 10, "decode": 3, "growth": 4 * 3}
    for suite in ("step", "decode", "growth"):
        for row in results[suite]:
            assert row["seconds"]["p20"] <= row["seconds"]["median"] <= row["seconds"]["p80"]
            assert row["seconds"]["median"] > 0
            assert f"{suite}: model" in printed.out
    step = {(row["provider"], row["dtype"], row["dropout"]): row for row in results["step"]}
    mola, lora = step["mola", "bfloat16", 0.05], step["lora_8", "bfloat16", 0.05]
    assert mola["ratio_to_lora_8"]["median"] == mola["seconds"]["median"] / lora["seconds"]["median"]
    assert mola["ratio_to_frozen"]["median"] > 0
    assert [row["num_experts"] for row in results["growth"][::4]] == [1, 4, 8]
    assert results["growth"][0]["top_k"] == 1


def test_an_interruption_keeps_what_was_measured(tiny_model_dir, tmp_path, capsys, monkeypatch):
    measured = []

    def interrupted(*arguments):
        if measured:
            raise KeyboardInterrupt
        measured.append(time_interleaved(*arguments))
        return measured[0]

    monkeypatch.setattr("benchmarks.training.time_interleaved", interrupted)
    output = tmp_path / "results.json"
    both = ("--suite", "step", "--dtype", "float32", "--dropout", "0", "0.05", "--providers", "frozen", "mola")
    assert run(tiny_model_dir, output, *both) == 130
    assert "what was finished is in the JSON file" in capsys.readouterr().err
    rows = json.loads(output.read_text())["results"]["step"]
    assert [(row["provider"], row["dropout"]) for row in rows] == [("frozen", 0.0), ("mola", 0.0)]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="torch.compile needs a C++ compiler")
def test_memory_and_compiled_decoding_from_end_to_end(tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "results.json"
    code = run(
        *(tiny_model_dir, output, "--suite", "memory", "decode", "--dtype", "float32", "--dropout", "0"),
        *("--providers", "frozen", "mola", "--decode_modes", "compiled", "--decode_batch_sizes", "1"),
        *("--batch_size", "64", "--seq_len", "128"),
    )
    assert code == 0, capsys.readouterr().err
    results = json.loads(output.read_text())["results"]
    frozen, mola = results["memory"]
    # What is kept for the backward pass must fit into the peak.
    assert mola["peak_bytes"] > mola["saved_bytes"] > frozen["saved_bytes"] > 2**20
    assert mola["peak_bytes_above_frozen"] > 0
    assert mola["saved_bytes_per_token_and_linear"] > frozen["saved_bytes_per_token_and_linear"] == 0
    assert [(row["graphs"], row["graphs_while_measured"]) for row in results["decode"]] == [(1, 0)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "speed"], r"`suite` must be some of step, .*: got 'speed'"),
        (["--providers", "mola", "mola"], "`providers` names something twice"),
        (["--providers", "lora_equal", "--suite", "step", "decode"], "`providers` must hold one of frozen, lora_8"),
        (["--repeats", "0"], "`repeats` must be at least 1: got 0"),
        (["--warmup", "-1"], "`warmup` must be at least 0: got -1"),
        (["--dropout", "1"], "`dropout` must be at least 0 and below 1: got 1.0"),
        (["--seq_len", "1"], "`seq_len` must be at least 2"),
        (
            ["--suite", "growth", "--growth_tokens", "24", "30"],
            "`growth_tokens` must be multiples of `seq_len`: got 30",
        ),
        (["--seq_len", "2048", "--suite", "step"], "`seq_len` must fit the model: got 2048, .* 1024 positions"),
        (["--num_experts", "2-4", "--top_k", "3", "--suite", "step"], "top_k"),
        (["--device", "mars", "--suite", "step"], "`device` must be a device of this machine"),
        (["--model", "no-such-model", "--suite", "step"], "`model` must be smollm2, random12 or a folder"),
        (["--sweet", "step"], "there is no flag --sweet"),
    ],
)
def test_wrong_input_ends_in_one_line_before_the_work(arguments, message, tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "results.json"
    assert run(tiny_model_dir, output, *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not output.exists()


def test_compiled_decoding_without_a_compiler_is_refused(tiny_model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(tiny_model_dir, tmp_path / "results.json", "--suite", "decode") == 2
    assert "`decode_modes` compiled needs a C++ compiler" in capsys.readouterr().err


def test_an_existing_result_is_kept(tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "results.json"
    output.write_text("{}")
    assert run(tiny_model_dir, output, "--suite", "counts") == 2
    assert "exists. Choose another name or pass --overwrite" in capsys.readouterr().err
    assert output.read_text() == "{}"


def test_a_missing_smollm2_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "PROJECT", tmp_path)
    assert main(["--model", "smollm2", "--suite", "step", "--output", str(tmp_path / "results.json")]) == 2
    assert "Run `make bench`" in capsys.readouterr().err
