"""GGUF files as base models: a tiny one, written here in two of its formats."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from mola import MolaError, PlanOptions, load_model, load_tokenizer, plan
from mola.cli import main
from mola.models.quantization import Quantization

NAME = "tiny.gguf"
IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf", reason="needs gguf: pip install 'mola-peft[gguf]'")


def gguf_name(name):
    """`model.layers.0.mlp.up_proj.weight` -> `blk.0.ffn_up.weight`."""
    module = name.removesuffix(".weight")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.weight"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def in_pairs(weight, num_heads):
    """Rows of query and key in the order of the format: both halves of a head interleaved."""
    return weight.view(num_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(gguf, model, tokenizer, path, quantise):
    """The model as a GGUF file, its matrices in 8 bits if asked for."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_scores([0.0] * len(tokenizer))  # instead of merges: there are none
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, weight in model.state_dict().items():
        if "q_proj" in name:
            weight = in_pairs(weight, config.num_attention_heads)
        if "k_proj" in name:
            weight = in_pairs(weight, config.num_key_value_heads)
        values = weight.numpy()
        if quantise and weight.dim() == 2:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def alone(gguf, blocks_dir, folder, quantise):
    """A folder with nothing but a GGUF file."""
    folder.mkdir()
    model, tokenizer = LlamaForCausalLM.from_pretrained(blocks_dir), AutoTokenizer.from_pretrained(blocks_dir)
    write(gguf, model, tokenizer, folder / NAME, quantise=quantise)
    return folder


@pytest.fixture
def folder(gguf, blocks_dir, tmp_path):
    """Weights in 8 bits."""
    return alone(gguf, blocks_dir, tmp_path / "base", quantise=True)


@pytest.fixture
def exact(gguf, blocks_dir, tmp_path):
    """Weights as they are."""
    return alone(gguf, blocks_dir, tmp_path / "exact", quantise=False)


def output(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_weights_are_unpacked(folder, exact, blocks_dir):
    expected = output(LlamaForCausalLM.from_pretrained(blocks_dir).eval())
    model = load_model(folder, dtype="float32", device="cpu", quantization=Quantization(gguf_file=NAME))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 0 < (output(model) - expected).norm() < 0.05 * expected.norm()
    same = load_model(exact, dtype="float32", device="cpu", quantization=Quantization(gguf_file=NAME))
    torch.testing.assert_close(output(same), expected)


def test_the_plan_needs_the_file_only(folder, blocks_dir):
    expected = plan(PlanOptions(str(blocks_dir)))
    assert plan(PlanOptions(str(folder), gguf_file=NAME)) == expected


def test_a_tokenizer_beside_the_file_is_used_else_that_in_it_with_a_warning(folder, blocks_dir, caplog):
    text = "The sun is 12."
    expected = AutoTokenizer.from_pretrained(blocks_dir)(text)["input_ids"]
    load_tokenizer(folder, gguf_file=NAME)
    assert "without its rules for splitting text" in caplog.text
    caplog.clear()
    for file in blocks_dir.glob("tokenizer*"):
        shutil.copy(file, folder)
    assert load_tokenizer(folder, gguf_file=NAME)(text)["input_ids"] == expected
    assert "rebuilt" not in caplog.text


# PEFT looks for config.json in the base's folder each time it saves.
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_training_evaluating_and_generating(folder, blocks_dir, sample, tmp_path, capsys):
    for file in blocks_dir.glob("tokenizer*"):
        shutil.copy(file, folder)
    base = [f"--base_model={folder}", f"--gguf_file={NAME}", "--dtype=float32"]
    run = tmp_path / "run"
    arguments = [f"--data={sample / 'train.json'}", f"--output={run}", "--eval_strategy=no", "--report_to=none"]
    assert main(["train", *base, *arguments, "--cutoff_len=1024", "--max_steps=2", "--warmup_steps=0"]) == 0
    assert '"quant_method": "gguf"' in (run / "run.json").read_text(encoding="utf-8")
    task = ["--task=scienceqa", f"--data={sample / 'test.json'}", "--max_new_tokens=2"]
    assert main(["evaluate", *base, f"--adapter={run}", *task]) == 0
    capsys.readouterr()
    assert main(["generate", *base, f"--adapter={run}", "--prompt=The sun", "--max_new_tokens=4"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_folder_with_only_a_file_names_the_option(folder):
    with pytest.raises(MolaError, match=rf"--gguf_file {NAME}"):
        load_model(folder)


def test_an_allocation_by_weights_is_that_of_the_folder_with_the_same_weights(exact, folder, blocks_dir, tmp_path):
    """Other weights beside the file are not looked at."""
    shutil.copy(blocks_dir / "model.safetensors", folder)
    of_file, found = [f"--gguf_file={NAME}"], {}
    for name, base, more in (("plain", blocks_dir, []), ("exact", exact, of_file), ("rounded", folder, of_file)):
        path = tmp_path / f"{name}.json"
        words = ["--method=alphalora", "--budget=14", "--beta=20", f"--base_model={base}", f"--output={path}"]
        assert main(["allocate", *words, *more]) == 0
        found[name] = json.loads(path.read_text(encoding="utf-8"))
    scores = {name: [row["score"] for row in each["layers"]] for name, each in found.items()}
    assert scores["exact"] == pytest.approx(scores["plain"], rel=1e-9)
    assert scores["rounded"] != pytest.approx(scores["plain"], rel=1e-6)
    assert found["exact"]["num_experts"] == found["plain"]["num_experts"]
    assert len(set(found["exact"]["num_experts"])) > 1


def test_an_allocation_by_data_is_refused(folder, sample, capsys):
    data = ["--task=scienceqa", f"--data={sample / 'train.json'}"]
    words = ["--method=gradient", "--budget=14", f"--base_model={folder}", f"--gguf_file={NAME}"]
    assert main(["allocate", *words, *data]) == 2
    assert "`gguf_file` cannot be used with `method`" in capsys.readouterr().err
