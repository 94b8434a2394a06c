"""`mola reallocate`: another adapter folder that loads, computes what it should, and trains on."""

import json
import shlex

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration

from mola import MolaConfig, MolaLinear, load_model
from mola.allocation.reallocate import ReallocateOptions, reallocate
from mola.cli import main
from mola.errors import MolaError
from tests.conftest import save_adapter


@pytest.fixture(scope="module")
def adapter(tiny_model_dir, tmp_path_factory):
    config = MolaConfig(
        num_experts=[1, 2, 3, 4], top_k=2, r=2, init_lora_weights=False, modules_to_save=["lm_head"], lora_alpha=8
    )
    return save_adapter(tiny_model_dir, tmp_path_factory.mktemp("adapter"), config)


@pytest.fixture(scope="module")
def uniform(tiny_model_dir, tmp_path_factory):
    config = MolaConfig(num_experts=3, top_k=2, r=2, init_lora_weights=False)
    return save_adapter(tiny_model_dir, tmp_path_factory.mktemp("uniform"), config)


def moved(adapter, num_experts, output, **more):
    return reallocate(ReallocateOptions(str(adapter), num_experts, str(output), **more))


def logits(base, adapter):
    model = load_model(base, adapter, dtype="float32", device="cpu")
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 60).unsqueeze(0)).logits


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_the_same_numbers_are_the_same_adapter(tiny_model_dir, adapter, tmp_path):
    result = moved(adapter, "1,2,3,4", tmp_path / "new")
    assert (result.unchanged, result.modules) == (28, 28)
    before, after = tensors_of(adapter), tensors_of(tmp_path / "new")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, tmp_path / "new")]
    assert configs[0] == configs[1]
    assert torch.equal(logits(tiny_model_dir, adapter), logits(tiny_model_dir, tmp_path / "new"))


def test_stacked_experts_alone_have_no_numbers(tiny_model_dir, tmp_path):
    config = MolaConfig(r=2, num_experts=1, target_modules=[], target_parameters=["mlp.up_proj.weight"])
    source = save_adapter(tiny_model_dir, tmp_path / "stacked", config)
    with pytest.raises(MolaError, match="`adapter` must have experts on linears: .* has only `target_parameters`"):
        moved(source, "2", tmp_path / "new")


def test_layers_that_keep_their_number_keep_their_tensors(tiny_model_dir, adapter, tmp_path):
    result = moved(adapter, "2,2,4,1", tmp_path / "new")
    assert (result.before, result.num_experts, result.top_k) == ([1, 2, 3, 4], [2, 2, 4, 1], [2, 2, 2, 1])
    assert (result.unchanged, result.modules) == (7, 28)
    before, after = tensors_of(adapter), tensors_of(tmp_path / "new")
    kept = [key for key in before if ".layers.1." in key or "lm_head" in key]
    assert len(kept) == 21 + 1
    assert all(torch.equal(before[key], after[key]) for key in kept)
    assert not any(".layers.3." in key and "router" in key for key in after)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert (config["num_experts"], config["top_k"], config["lora_alpha"]) == ([2, 2, 4, 1], 2, 8)
    assert config["modules_to_save"] == ["lm_head"]
    assert logits(tiny_model_dir, tmp_path / "new").isfinite().all()


def test_from_one_expert_to_several_nothing_changes(tiny_model_dir, adapter, tmp_path):
    moved(adapter, "5,2,3,4", tmp_path / "new")
    # One expert and several are computed in different ways, which add up in another order.
    after, before = logits(tiny_model_dir, tmp_path / "new"), logits(tiny_model_dir, adapter)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_more_experts_leave_the_others_as_they_are(uniform, tmp_path):
    moved(uniform, "5,", tmp_path / "new")
    before, after = tensors_of(uniform), tensors_of(tmp_path / "new")
    for key, tensor in before.items():
        assert torch.equal(after[key][:3], tensor)
        if "router" not in key:
            assert torch.equal(after[key][3:], tensor[:2])  # copies, of different experts


def inspection_of(adapter, counts):
    rows = []
    for key in tensors_of(adapter):
        if key.endswith(".mola_router"):
            layer = int(key.split(".layers.")[1].split(".")[0])
            rows.append({"module": key.removesuffix(".mola_router"), "layer_index": layer, "mean_gates": counts[layer]})
    return {"usage": {"all": rows}}


def test_use_decides_which_experts_are_merged(uniform, tmp_path):
    file = tmp_path / "inspect.json"
    file.write_text(json.dumps(inspection_of(uniform, [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0], [1, 1, 0]])))
    moved(uniform, "2,", tmp_path / "new", inspection=str(file))
    before, after = tensors_of(uniform), tensors_of(tmp_path / "new")
    for layer, kept in enumerate(([1, 2], [0, 2], [0, 1], [0, 1])):
        for key in after:
            # The unused one is merged into another, whose place may change, and counts for nothing there.
            if f".layers.{layer}." in key and "router" in key:
                torch.testing.assert_close(after[key].sum(0), before[key][kept].sum(0), rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["num_experts"] == 2


def test_an_allocation_trains_on(tiny_model_dir, uniform, tmp_path, capsys):
    file, run = tmp_path / "allocation.json", tmp_path / "run"
    base = ["--base_model", str(tiny_model_dir)]
    assert main(["allocate", *base, "--method", "2468", "--budget", "12", "--output", str(file)]) == 0
    numbers = json.loads(file.read_text())["num_experts"]
    words = ["--adapter", str(uniform), "--num_experts", str(file), "--output", str(tmp_path / "new")]
    assert main(["reallocate", *words]) == 0
    train = f"mola train --adapter {tmp_path / 'new'} --data DATA "
    assert train in capsys.readouterr().out
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "q", "input": "", "output": "a"}] * 4))
    settings = ["--data", str(tmp_path / "data.json"), "--output", str(run), "--max_steps=2", "--warmup_steps=0"]
    assert main(["train", *base, "--adapter", str(tmp_path / "new"), *settings, "--dtype=float32"]) == 0
    assert json.loads((run / "adapter_config.json").read_text())["num_experts"] == numbers
    assert numbers != [3, 3, 3, 3]
    # The adapter of a run names its data: the command runs as it is printed.
    assert main(["reallocate", "--adapter", str(run), "--num_experts", "2", "--output", str(tmp_path / "two")]) == 0
    printed = capsys.readouterr().out
    command = next(line for line in printed.splitlines() if line.startswith("  mola train"))
    assert main(shlex.split(command)[1:]) == 0
    assert json.loads((tmp_path / "two-trained" / "adapter_config.json").read_text())["num_experts"] == 2


def test_top_k_of_layers(tiny_model_dir, tmp_path):
    config = MolaConfig(num_experts=[1, 2, 3, 4], top_k=[1, 2, 3, 3], r=2)
    folder = save_adapter(tiny_model_dir, tmp_path / "a", config)
    assert moved(folder, "4,2,3,1", tmp_path / "b").top_k == [3, 2, 3, 1]
    with pytest.raises(MolaError, match=r"layer 2 has top_k 3 and num_experts 2.* Or pass `top_k`"):
        moved(folder, "4,2,2,1", tmp_path / "c")
    assert moved(folder, "4,2,2,1", tmp_path / "c", top_k="2").top_k == [2, 2, 2, 1]


# ---------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("num_experts", "more", "message"),
    [
        ("2,3", {}, "got 2 entries, the model has 4 layers"),
        ("circle", {}, "Known shapes"),
        ("2,2,2,2", {"top_k": "3"}, "layer 0 has top_k 3 and num_experts 2"),
        ("2,2,2,2", {"inspection": "nosuch.json"}, "`inspection` cannot be read"),
    ],
)
def test_wrong_options(uniform, tmp_path, num_experts, more, message):
    with pytest.raises(MolaError, match=message):
        moved(uniform, num_experts, tmp_path / "new", **more)
    assert list(tmp_path.iterdir()) == []


def test_more_experts_than_a_plain_number_can_say_load_again(tiny_model_dir, tmp_path):
    """A larger integer would be read as digits of groups."""
    config = MolaConfig(num_experts=2, r=1, target_modules=["k_proj"], init_lora_weights=False)
    moved(save_adapter(tiny_model_dir, tmp_path / "few", config), "300,", tmp_path / "many")
    assert json.loads((tmp_path / "many" / "adapter_config.json").read_text())["num_experts"] == [300] * 4
    assert load_model(tiny_model_dir, tmp_path / "many", dtype="float32", device="cpu")


def test_a_base_model_with_fewer_layers_is_refused(uniform, small_model_dir, tmp_path):
    with pytest.raises(
        MolaError, match="`base_model` must be the adapter's base model: .* has 1 decoder layers, .* in 4"
    ):
        moved(uniform, "2,", tmp_path / "new", base_model=str(small_model_dir))


def test_unusable_folders_are_refused(tiny_model_dir, uniform, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(MolaError, match="`output_dir` must be new or empty"):
        moved(uniform, "2,", tmp_path / "full")
    with pytest.raises(MolaError, match="no such folder"):
        moved(tmp_path / "nosuch", "2,", tmp_path / "new")
    lora = save_adapter(tiny_model_dir, tmp_path / "lora", LoraConfig())
    with pytest.raises(MolaError, match="of type LORA"):
        moved(lora, "2,", tmp_path / "new")
    other = tmp_path / "inspect.json"
    other.write_text(json.dumps(inspection_of(uniform, [[0.5, 0.5]] * 4)))
    with pytest.raises(MolaError, match="`inspection` must be made from `adapter`: .* has 2 experts of .* which has 3"):
        moved(uniform, "2,", tmp_path / "new", inspection=str(other))
    assert not (tmp_path / "new").exists()


def test_depth_of_an_adapter_of_some_layers_only(tiny_model_dir, no_weights_dir, tmp_path):
    some = save_adapter(tiny_model_dir, tmp_path / "some", MolaConfig(num_experts=2, layers_to_transform=[0, 1], r=2))
    path = some / "adapter_config.json"
    settings = json.loads(path.read_text())
    moved(some, "2-4", tmp_path / "new")  # by the base model that it names
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["num_experts"] == [2, 2, 4, 4]
    path.write_text(json.dumps({**settings, "base_model_name_or_path": "someone/model"}))
    with pytest.raises(MolaError, match="`base_model` is needed to know which layers"):
        moved(some, "2-4", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    for number, (numbers, more, experts) in enumerate(
        [
            ("2-4", {"base_model": str(no_weights_dir)}, [2, 2, 4, 4]),
            ("3,1,5,5", {}, [3, 1, 5, 5]),
            ("3,", {}, 3),
        ]
    ):
        moved(some, numbers, tmp_path / str(number), **more)
        assert json.loads((tmp_path / str(number) / "adapter_config.json").read_text())["num_experts"] == experts
        assert logits(tiny_model_dir, tmp_path / str(number)).isfinite().all()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # of PEFT, when it saves
def test_a_linear_outside_the_layers_has_the_number_of_all(tiny_model_dir, tmp_path):
    config = MolaConfig(num_experts=2, r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    folder = save_adapter(tiny_model_dir, tmp_path / "head", config)
    with pytest.raises(MolaError, match="must be one number for all layers: .* adapts 'lm_head'"):
        moved(folder, "2,2,3,3", tmp_path / "new")
    moved(folder, "3,", tmp_path / "new")
    assert logits(tiny_model_dir, tmp_path / "new").isfinite().all()


def test_layers_of_an_encoder_decoder_have_one_number(tmp_path):
    """Those of the decoder come after the encoder's, of which the adapter may say nothing."""
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    BartForConditionalGeneration(BartConfig(vocab_size=64, **sizes, **heads)).save_pretrained(tmp_path / "base")
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    config = MolaConfig(num_experts=2, r=2, target_modules=["encoder_attn.q_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "some")
    for more in ({}, {"base_model": str(tmp_path / "base")}):
        with pytest.raises(MolaError, match="`base_model` is needed to know which layers"):
            moved(tmp_path / "some", "1,1,3,4", tmp_path / "new", **more)
    moved(tmp_path / "some", "3,", tmp_path / "new")
    model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base"), tmp_path / "new")
    assert {each.num_experts["default"] for each in model.modules() if isinstance(each, MolaLinear)} == {3}


def test_layers_without_experts_are_not_counted(tiny_model_dir, tmp_path, capsys):
    config = MolaConfig(num_experts=4, r=2, layers_to_transform=[1, 2])
    some = save_adapter(tiny_model_dir, tmp_path / "some", config)
    words = ["--adapter", some, "--num_experts", "1,2,3,1", "--output", tmp_path / "new"]
    assert main(["reallocate", *map(str, words)]) == 0
    total = next(line for line in capsys.readouterr().out.splitlines() if "total" in line)
    assert [part for part in total.replace("│", " ").split() if part.isdigit()] == ["8", "5"]


def test_more_experts_than_principal_components(tiny_model_dir, tmp_path):
    config = MolaConfig(num_experts=2, r=8, target_modules=["k_proj"], init_lora_weights="principal")
    folder = save_adapter(tiny_model_dir, tmp_path / "principal", config)
    moved(folder, "4,", tmp_path / "new")
    assert logits(tiny_model_dir, tmp_path / "new").isfinite().all()
