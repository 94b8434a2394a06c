"""The benchmark suite `compile`: what is compiled, what is counted, and the command from end to end on a tiny model."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from benchmarks.cases import COMPILERS
from benchmarks.command import main
from benchmarks.compiled import Graphs, both, padded_batch
from benchmarks.counting import count_operators
from benchmarks.models import load_base, training_batch
from benchmarks.options import BenchmarkOptions
from benchmarks.providers import build, make_step

from tests.words import replaced


@pytest.fixture(scope="module")
def case(case, small_model_dir):
    return replace(case, model="small", folder=str(small_model_dir), batch_size=3, num_experts="4,")


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


def run(folder, output, *arguments):
    shape = ("--batch_size", "2", "--seq_len", "12", "--repeats", "1", "--warmup", "0", "--num_experts", "4,")
    suite = ("--suite", "compile", "--dtype", "float32", "--dropout", "0")
    return main(replaced(["--model", str(folder), "--output", str(output), *suite, *shape], arguments))


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.slow
def test_compiling_leaves_the_provider_as_it_was(case):
    """The same operators, gradients to the last bit, and the embeddings' output still asks for a gradient."""
    base = load_base(case)
    model = build("mola", base, case).model
    model.disable_input_require_grads()
    batch = training_batch(case, base.config.vocab_size)
    options = BenchmarkOptions(model=[case.folder], suite=["compile"], compile_backend="aot_eager")
    eager, compiled = both(model, options, None)

    def forward():
        return eager(**batch, use_cache=False).loss

    make_step(eager, batch, case)()
    expected, counted = gradients(model), count_operators(forward)
    before = Graphs.now()
    make_step(compiled, batch, case)()
    assert Graphs.now().since(before) == Graphs(1, 0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)
    make_step(eager, batch, case)()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())
    assert count_operators(forward) == counted
    assert Graphs.now().since(before) == Graphs(1, 0)


def test_batches_of_a_length_are_padded_to_it(case):
    batch = padded_batch(case, vocabulary=100, length=16)
    lengths = batch["attention_mask"].sum(1)
    assert lengths.max() == 16
    assert lengths.min() < 16
    assert batch["input_ids"].shape == (3, 16)
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frozen", "mola"])
def test_graphs_are_counted_for_one_length_and_for_several(name, small_model_dir, tmp_path, capsys):
    output = tmp_path / "results.json"
    code = run(
        *(small_model_dir, output, "--compile_backend", "aot_eager", "--providers", name),
        *("--compile_lengths", "16", "8", "24"),
    )
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "compile: model" in printed.out
    (row,) = json.loads(output.read_text())["results"]["compile"]
    assert (row["graphs"], row["graph_breaks"], row["graphs_while_measured"]) == (1, 0, 0)
    # Torch makes one for the first length, and a second one for all others.
    assert (row["lengths_batches"], row["lengths_graphs"]) == (6, 2)
    assert (row["lengths_graphs_in_last_pass"], row["lengths_graph_breaks"]) == (0, 0)
    for name in ("eager_seconds", "compiled_seconds", "compiled_over_eager", "lengths_compiled_over_eager"):
        assert row[name]["median"] > 0
    assert row["first_step_seconds"] > row["compiled_wall_seconds"]["median"]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="torch.compile needs a C++ compiler")
def test_all_providers_with_dynamic_lengths(small_model_dir, tmp_path, capsys):
    output = tmp_path / "results.json"
    lengths = ("--compile_lengths", "16", "8", "--compile_dynamic")
    assert run(small_model_dir, output, *lengths) == 0, capsys.readouterr().err
    rows = {row["provider"]: row for row in json.loads(output.read_text())["results"]["compile"]}
    assert list(rows) == ["frozen", "lora_8", "mola"]
    for row in rows.values():
        assert (row["backend"], row["graphs"], row["lengths_graphs"]) == ("inductor", 1, 1)
    # Ratios compare compiled steps with compiled steps.
    seconds = {name: row["compiled_seconds"]["median"] for name, row in rows.items()}
    assert rows["mola"]["ratio_to_lora_8"]["median"] == pytest.approx(seconds["mola"] / seconds["lora_8"])
    assert rows["mola"]["ratio_to_frozen"]["median"] == pytest.approx(seconds["mola"] / seconds["frozen"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compile_lengths", "1", "8"], "`compile_lengths` must be at least 2: got 1"),
        pytest.param(
            *(["--compile_lengths", "8", "2048"], "`compile_lengths` must fit the model: got 2048"),
            marks=pytest.mark.skipif(
                not any(map(shutil.which, COMPILERS)), reason="torch.compile needs a C++ compiler"
            ),
        ),
        (["--compile_backend", "magic"], "`compile_backend` must be some of inductor, aot_eager: got 'magic'"),
        (["--providers", "loop"], "`providers` must hold one of frozen, lora_8, mola for the suite compile"),
    ],
)
def test_wrong_input_ends_in_one_line_before_the_work(arguments, message, small_model_dir, tmp_path, capsys):
    assert run(small_model_dir, tmp_path / "results.json", *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_without_a_compiler_it_is_refused(small_model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(small_model_dir, tmp_path / "results.json") == 2
    assert "`suite` compile needs a C++ compiler" in capsys.readouterr().err
