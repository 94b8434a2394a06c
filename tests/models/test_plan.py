"""`mola plan` from configurations only: figures, table, JSON, and one clear line for wrong input."""

import io
import json

import pytest
from rich.console import Console
from transformers import GPT2Config, LlamaConfig, T5Config

from mola.architecture.allocation import LinearShape, plan_allocation
from mola.errors import MolaError
from mola.models.plan import PlanOptions, main, plan, render

LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama_7b")
    LlamaConfig(**LLAMA_7B).save_pretrained(folder)
    return str(folder)


def test_no_digit_is_cut_in_a_narrow_terminal(llama_7b):
    assert "…" not in text_of(render(plan(PlanOptions(llama_7b))), width=60)


def text_of(table, width=120):
    out = io.StringIO()
    Console(width=width, file=out).print(table)
    return out.getvalue()


@pytest.mark.parametrize(
    ("options", "trainable"),
    [
        ({}, 105_635_840),
        ({"num_experts": "1", "rank_pattern": {".*": 64}}, 159_907_840),
        ({"num_experts": ",".join(["2"] * 8 + ["4"] * 8 + ["6"] * 8 + ["8"] * 8)}, 105_635_840),
        ({"num_experts": "8,", "num_experts_pattern": '{"self_attn.*": 2, "mlp.*": 3}'}, 54_468_608),
        ({"target_modules": "q_proj, v_proj"}, 160 * 2 * (8 * 2 * 4096 + 4096)),
    ],
)
def test_llama_7b_figures(llama_7b, options, trainable):
    result = plan(PlanOptions(llama_7b, **options))
    assert result.trainable_parameters == trainable
    assert result.base_parameters == 6_738_415_616
    assert result.trainable_share == trainable / 6_738_415_616


@pytest.mark.parametrize(("depth", "experts"), [(1, [5]), (2, [3, 7]), (3, [2, 4, 7]), (5, [2, 4, 6, 8, 8])])
def test_the_default_allocation_fits_any_depth(tmp_path, depth, experts):
    LlamaConfig(**{**LLAMA_7B, "num_hidden_layers": depth}).save_pretrained(tmp_path)
    assert [layer.num_experts for layer in plan(PlanOptions(str(tmp_path))).layers] == experts


def test_config_file_and_folder_agree(llama_7b):
    assert plan(PlanOptions(llama_7b + "/config.json")) == plan(PlanOptions(llama_7b))


def test_tied_embeddings_count_once(tmp_path):
    config = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    LlamaConfig(**config, num_attention_heads=2, tie_word_embeddings=True).save_pretrained(tmp_path)
    per_layer = 4 * 16 * 16 + 3 * 16 * 8 + 2 * 16
    assert plan(PlanOptions(str(tmp_path), num_experts="2")).base_parameters == 100 * 16 + 2 * per_layer + 16


def test_other_architectures(tmp_path):
    GPT2Config(vocab_size=64, n_embd=16, n_layer=5, n_head=2).save_pretrained(tmp_path)
    result = plan(PlanOptions(str(tmp_path), num_experts="2-4", r="4"))
    assert [layer.num_experts for layer in result.layers] == [2, 2, 4, 4, 4]
    assert result.expert_parameters == 16 * 4 * (16 + 48)


def test_table_collapses_equal_layers(llama_7b):
    text = text_of(render(plan(PlanOptions(llama_7b))))
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == ["0-7", "8-15", "16-23", "24-31", "total"]
    for figure in ("99,942,400", "5,693,440", "1.568%", "6,738,415,616", "403.0 MiB"):
        assert figure in text


def test_table_without_a_base_model():
    linears = [LinearShape(f"layers.{index}.fc", index, 3, 5) for index in range(3)]
    text = text_of(render(plan_allocation(linears, [2, 4, 2], [1, 1, 1], [2, 2, 2])))
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == ["0", "1", "2", "total"]
    assert "?" in rows[-1]


def test_json_is_a_file_or_standard_output(llama_7b, tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main(PlanOptions(llama_7b, json=str(file))) == 0
    assert "expert parameters" in capsys.readouterr().out
    with pytest.raises(MolaError, match="`json`"):
        main(PlanOptions(llama_7b, json=str(file)))
    assert main(PlanOptions(llama_7b, json="-")) == 0
    data = json.loads(capsys.readouterr().out)
    assert json.loads(file.read_text()) == data
    assert data["totals"]["trainable_parameters"] == 105_635_840
    assert [layer["num_experts"] for layer in data["layers"]][::8] == [2, 4, 6, 8]


def test_main_prints_whole_cells_into_files(llama_7b, capsys):
    assert main(PlanOptions(llama_7b)) == 0
    out = capsys.readouterr().out
    assert "expert parameters" in out
    assert "105,635,840 of 6,738,415,616" in out
    assert "Memory for 8 x 512 tokens, base in " in out
    assert "activations" in out


# --- wrong input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": ",".join(["2"] * 31)}, "got 31 entries, the model has 32 layers"),
        ({"num_experts": "0,"}, "entry 0 is 0"),
        ({"num_experts": "circle"}, "Known shapes"),
        ({"top_k": "4"}, "layer 0 has top_k 4 and num_experts 2"),
        ({"r": "-8"}, "`r` must be at least 1, got -8"),
        ({"target_modules": "q_prj"}, "did you mean 'q_proj'"),
        ({"target_modules": "lm_head"}, "'lm_head' is not"),
        ({"target_modules": "q_proj,"}, "names between commas"),
        ({"target_modules": ""}, "names between commas"),
    ],
)
def test_wrong_options(llama_7b, options, message):
    with pytest.raises(MolaError, match=message):
        plan(PlanOptions(llama_7b, **options))


def test_a_folder_of_gguf_files_gives_advice(tmp_path):
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    with pytest.raises(MolaError, match="--gguf_file small.gguf"):
        main(PlanOptions(str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ("{", "not a valid JSON file"),
        ("{}", "model_type"),
        ("[]", "no readable configuration"),
        ('{"model_type": "unheard_of"}', "does not recognize"),
        ('{"model_type": "llama", "hidden_size": "a"}', "hidden_size|unsupported operand"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "must have decoder layers: found none"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "a.B"}}', "code of its own"),
    ],
)
def test_unreadable_models(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(MolaError, match=message) as caught:
        main(PlanOptions(str(tmp_path)))
    assert "`base_model`" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/nowhere/model", "nowhere/config.json", "a/b/c"])
def test_missing_paths_need_no_network(name):
    with pytest.raises(MolaError, match=f"`base_model` names a folder that does not exist: '{name}'"):
        plan(PlanOptions(name))


def test_models_without_a_causal_head(tmp_path):
    T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(MolaError, match=r"must be a causal language model.*'t5'"):
        plan(PlanOptions(str(tmp_path)))
