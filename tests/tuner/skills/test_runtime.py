"""Each prompt asks one skill, and has the logits of this skill's own LoRA in PEFT."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, LlamaForCausalLM

from mola._compat import cache_argument
from mola.errors import MolaError

from .parts import LORAS, PROMPTS, encode, save_lora, with_skills

CACHE = cache_argument(LlamaForCausalLM)
NEW = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
MIXED = ["0123 4567", "+-*/ ?!", "the old house", "3141592653"]
NAMES = ["digits", "signs", "words", "digits"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def own_logits(lora_models, names, inputs, **more):
    """The logits of each row alone with its own LoRA."""
    rows = [{key: value[row : row + 1] for key, value in inputs.items()} for row in range(len(names))]
    return torch.cat([lora_models[name](**row, **more).logits for name, row in zip(names, rows, strict=True)])


@pytest.mark.parametrize("name", LORAS)
def test_one_skill_has_the_bits_of_its_own_lora(name, skilled_model, lora_models, tokenizer):
    inputs = encode(tokenizer, PROMPTS[name])
    found = skilled_model(**inputs).logits
    assert skilled_model.skills.last_names == [name] * 4
    assert torch.equal(found, lora_models[name](**inputs).logits)
    assert not torch.equal(found, lora_models[None](**inputs).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mixed_batch_is_as_one_by_one(side, skilled_model, lora_models, tokenizer):
    inputs = encode(tokenizer, MIXED, side)
    found = skilled_model(**inputs).logits
    assert skilled_model.skills.last_names == NAMES
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[kept], own_logits(lora_models, NAMES, inputs)[kept], rtol=1e-4, atol=1e-4)


def test_rows_without_a_skill_have_the_bits_of_the_base(loaded_tiny_model, skilled_model, tokenizer):
    inputs = encode(tokenizer, MIXED)
    expected = loaded_tiny_model(**inputs).logits
    with skilled_model.skills.use([None, "signs", None, "words"]):
        found = skilled_model(**inputs).logits
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert not torch.equal(found[[1, 3]], expected[[1, 3]])
    with skilled_model.skills.use(None):
        assert torch.equal(skilled_model(**inputs).logits, expected)
    assert skilled_model.skills.last_names == [None] * 4


def test_unknown_prompts_go_to_the_base(loaded_tiny_model, tokenizer, folders):
    model = with_skills(copy.deepcopy(loaded_tiny_model), tokenizer, folders, threshold=100.0)
    inputs = encode(tokenizer, MIXED)
    assert torch.equal(model(**inputs).logits, loaded_tiny_model(**inputs).logits)
    assert model.skills.last_names == [None] * 4
    assert model.skills.loaded() == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 3},
    ],
)
def test_every_way_to_generate_is_as_one_by_one(options, skilled_model, lora_models, tokenizer):
    inputs = encode(tokenizer, MIXED)
    found = skilled_model.generate(**inputs, **NEW, **options)
    assert skilled_model.skills.last_names == NAMES
    copies = options.get("num_return_sequences", 1)
    for row, name in enumerate(NAMES):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        expected = lora_models[name].generate(**own, **NEW, **options)
        assert found[row * copies : (row + 1) * copies].tolist() == expected.tolist()


@pytest.mark.parametrize("way", ["prompt_lookup", "assistant"])
def test_assisted_generation(way, skilled_model, lora_models, tokenizer):
    for text, name in zip(MIXED, NAMES, strict=True):
        inputs = encode(tokenizer, [text])
        options = {"prompt_lookup_num_tokens": 3} if way == "prompt_lookup" else {}
        if way == "assistant":
            options["assistant_model"] = lora_models[None]
        found = skilled_model.generate(**inputs, **NEW, **options)
        assert skilled_model.skills.last_names == [name]
        assert found.tolist() == lora_models[name].generate(**inputs, **NEW).tolist()


def test_the_first_prompt_lookup_does_not_read_drafted_tokens(skilled_model, tokenizer):
    """The first pass of an assisted generation holds drafted tokens, too, which do not belong to the prompt."""
    ids = encode(tokenizer, ["ab ab ab 0"])["input_ids"]
    alone = skilled_model.skills.decide(ids.tolist())
    skilled_model.generate(input_ids=ids, **NEW, prompt_lookup_num_tokens=4)
    torch.testing.assert_close(skilled_model.skills.last_decisions.scores, alone.scores, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("prefix_by", ["digits", "words", None])
def test_a_prefix_that_was_computed_before(prefix_by, skilled_model, lora_models, tokenizer):
    prefix, whole = (encode(tokenizer, [text])["input_ids"] for text in ("the old", "the old house"))
    cache = DynamicCache(config=skilled_model.config)
    with skilled_model.skills.use(prefix_by):
        skilled_model(prefix, **{CACHE: cache})
    found = skilled_model.generate(whole, **{CACHE: copy.deepcopy(cache)}, **NEW)
    assert skilled_model.skills.last_names == ["words"]
    assert found.tolist() == lora_models["words"].generate(whole, **NEW).tolist()
    rest = encode(tokenizer, [" house"])["input_ids"][:, 1:]
    mask = torch.ones_like(whole)
    with pytest.raises(MolaError, match="needs the whole prompt"):
        skilled_model.generate(rest, attention_mask=mask, **{CACHE: cache}, **NEW)


def test_a_prefix_of_several_skills_is_read_again(skilled_model, lora_models, tokenizer):
    whole = encode(tokenizer, ["the old house"])["input_ids"]
    cache = DynamicCache(config=skilled_model.config)
    for name, ids in (("digits", whole[:, :4]), ("words", whole[:, 4:8])):
        with skilled_model.skills.use(name):
            skilled_model(ids, **{CACHE: cache})
    found = skilled_model.generate(whole, **{CACHE: cache}, **NEW)
    assert skilled_model.skills.last_names == ["words"]
    assert found.tolist() == lora_models["words"].generate(whole, **NEW).tolist()


def test_a_loop_of_passes_keeps_its_skills(skilled_model, lora_models, tokenizer):
    inputs = encode(tokenizer, ["+-*/ ?!"])
    cache, ids = None, inputs["input_ids"]
    for _ in range(4):
        output = skilled_model(ids if cache is None else ids[:, -1:], **{CACHE: cache}, use_cache=True)
        cache = getattr(output, CACHE)
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
    expected = lora_models["signs"].generate(**inputs, **{**NEW, "max_new_tokens": 4})
    assert ids.tolist() == expected.tolist()
    with pytest.raises(MolaError, match="does not say which skills"):
        skilled_model(ids[:, -1:].repeat(2, 1), **{CACHE: copy.deepcopy(cache)})


def test_names_given_by_the_caller(skilled_model, lora_models, tokenizer):
    inputs = encode(tokenizer, MIXED)
    with skilled_model.skills.use(["words", None, "digits", "signs"]):
        found = skilled_model.generate(**inputs, **NEW, num_beams=2)
    assert skilled_model.skills.last_names == ["words", None, "digits", "signs"]
    assert skilled_model.skills.last_decisions is None
    for row, name in enumerate(skilled_model.skills.last_names):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        assert found[row : row + 1].tolist() == lora_models[name].generate(**own, **NEW, num_beams=2).tolist()
    with pytest.raises(MolaError, match="there is no skill 'colours'"), skilled_model.skills.use("colours"):
        pass
    with pytest.raises(MolaError, match="got 2 names, and the batch has 4 rows"):  # noqa: SIM117
        with skilled_model.skills.use([None, "words"]):
            skilled_model(**inputs)


def test_labels_say_where_a_prompt_ends(skilled_model, tokenizer):
    """The same rows: with labels, the answer after the prompt does not take part in the decision."""
    inputs = encode(tokenizer, ["0123 4567the old house", "the old house0123 4567"], "right")
    labels = inputs["input_ids"].clone()
    labels[0, :10] = labels[1, :14] = -100
    skilled_model(**inputs, labels=labels)
    found = skilled_model.skills.last_decisions
    assert found.names == ["digits", "words"]
    prompts = [inputs["input_ids"][0, :10].tolist(), inputs["input_ids"][1, :14].tolist()]
    torch.testing.assert_close(found.scores, skilled_model.skills.decide(prompts).scores, rtol=1e-4, atol=1e-3)


def test_decisions_of_text_are_those_of_a_call(skilled_model, tokenizer):
    inputs = encode(tokenizer, MIXED)
    skilled_model(**inputs)
    in_call = skilled_model.skills.last_decisions
    of_text = skilled_model.skills.decide([tokenizer(text)["input_ids"] for text in MIXED])
    assert of_text.names == in_call.names == NAMES
    assert torch.equal(of_text.scores, in_call.scores)


@pytest.mark.parametrize(
    "extra",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},
        {"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2]])},
        {"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool)},
    ],
)
def test_packed_rows_are_refused(extra, skilled_model):
    with pytest.raises(MolaError, match="a row must be one text"):
        skilled_model(torch.tensor([[5, 6, 7, 8, 9, 10]]), **extra)


def test_calls_without_a_prompt_are_refused(skilled_model):
    embeddings = skilled_model.get_input_embeddings()(torch.tensor([[5, 6]]))
    with pytest.raises(MolaError, match="`inputs_embeds` has none"):
        skilled_model(inputs_embeds=embeddings)
    with pytest.raises(MolaError, match="called as a whole"):
        skilled_model.model(torch.tensor([[5, 6]]))
    with skilled_model.skills.use("words"):
        skilled_model(inputs_embeds=embeddings)


def test_a_copy_of_a_model_is_a_model_of_its_own(skilled_model, lora_models, tokenizer):
    copied = copy.deepcopy(skilled_model)
    copied.skills.remove("digits")
    inputs = encode(tokenizer, ["0123 4567"])
    copied(**inputs)
    assert copied.skills.last_names != ["digits"]
    assert torch.equal(skilled_model(**inputs).logits, lora_models["digits"](**inputs).logits)


# ---------------------------------------------------------------------- skills come and go


def test_skills_are_added_and_removed(loaded_tiny_model, lora_models, tokenizer, folders):
    model = with_skills(copy.deepcopy(loaded_tiny_model), tokenizer, folders)
    runtime, inputs = model.skills, encode(tokenizer, ["the old house", "0123 4567"])
    statistics = runtime._statistics["words"]
    model(**inputs)
    assert runtime.last_names == ["words", "digits"]
    runtime.remove("words")
    assert runtime.names == ["digits", "signs"]
    assert "words" not in runtime.loaded()
    model(**inputs)
    assert runtime.last_names[0] != "words"
    with pytest.raises(MolaError, match="there is no skill 'words'"):
        runtime.remove("words")
    with pytest.raises(MolaError, match="exists already"):
        runtime.add("signs", folders["signs"], statistics)
    runtime.add("words", folders["words"], statistics)
    first = {key: value[:1] for key, value in inputs.items()}
    assert torch.equal(model(**first).logits, lora_models["words"](**first).logits)
    for name in ("digits", "signs", "words"):
        runtime.retire(name)
    with runtime.use("words"):  # who named it before keeps it
        assert torch.equal(model(**first).logits, lora_models["words"](**first).logits)
    assert torch.equal(model(**inputs).logits, loaded_tiny_model(**inputs).logits)
    assert runtime.last_names == [None, None]
    for name in ("digits", "signs", "words"):
        runtime.remove(name)
    assert torch.equal(model(**inputs).logits, loaded_tiny_model(**inputs).logits)


def test_at_most_max_loaded_skills_stay_in_memory(loaded_tiny_model, lora_models, tokenizer, folders):
    model = with_skills(copy.deepcopy(loaded_tiny_model), tokenizer, folders, max_loaded=2)
    inputs = encode(tokenizer, ["ab"])
    for name, loaded in [
        ("digits", ["digits"]),
        ("signs", ["digits", "signs"]),
        ("digits", ["signs", "digits"]),
        ("words", ["digits", "words"]),
        ("signs", ["words", "signs"]),
    ]:
        with model.skills.use(name):
            assert torch.equal(model(**inputs).logits, lora_models[name](**inputs).logits)
        assert model.skills.loaded() == loaded, name
    inputs = encode(tokenizer, MIXED)
    found = model(**inputs).logits  # three at once
    torch.testing.assert_close(found, own_logits(lora_models, NAMES, inputs), rtol=1e-4, atol=1e-4)


def test_skills_may_have_layers_below_the_decision(loaded_tiny_model, tokenizer, tmp_path):
    folder = save_lora(copy.deepcopy(loaded_tiny_model), tmp_path, layers=[0, 3], r=2, target_modules=["q_proj"])
    from peft import PeftModel

    expected = PeftModel.from_pretrained(copy.deepcopy(loaded_tiny_model), folder).eval()
    model = with_skills(copy.deepcopy(loaded_tiny_model), tokenizer, {"words": folder})
    inputs = encode(tokenizer, PROMPTS["words"])
    assert torch.equal(model(**inputs).logits, expected(**inputs).logits)
    assert model.skills.last_names == ["words"] * 4
    assert model.generate(**inputs, **NEW).tolist() == expected.generate(**inputs, **NEW).tolist()


# ---------------------------------------------------------------------- training on top


def test_a_new_lora_is_trained_on_top_of_skills(skilled_model, tokenizer):
    model = copy.deepcopy(skilled_model)
    trained = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    inputs = encode(tokenizer, MIXED, "right")
    with torch.no_grad():
        assert torch.equal(trained.eval()(**inputs).logits, skilled_model(**inputs).logits)
    with torch.enable_grad():
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, :5] = -100
        loss = trained.train()(**inputs, labels=labels).loss
        loss.backward()
    gradients = {name: each.grad for name, each in trained.named_parameters() if each.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    assert any(each.abs().sum() > 0 for name, each in gradients.items() if "layers.0." in name)
    trained.gradient_checkpointing_enable()
    with torch.enable_grad(), pytest.raises(MolaError, match="gradient checkpointing"):
        trained(**inputs, labels=labels)


def test_gradients_pass_through_the_skills(skilled_model, lora_models, tokenizer):
    """As through each skill's own LoRA."""
    inputs = encode(tokenizer, MIXED)
    embeddings = skilled_model.get_input_embeddings()(inputs["input_ids"])
    found, expected = (embeddings.clone().requires_grad_() for _ in range(2))
    with torch.enable_grad():
        with skilled_model.skills.use(NAMES):
            logits = skilled_model(inputs_embeds=found, attention_mask=inputs["attention_mask"]).logits
        logits[:, -1].square().sum().backward()
        for row, name in enumerate(NAMES):
            mask = inputs["attention_mask"][row : row + 1]
            own = lora_models[name](inputs_embeds=expected[row : row + 1], attention_mask=mask).logits
            own[:, -1].square().sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-3)


def test_in_bfloat16(loaded_tiny_model, folders, tokenizer):
    from peft import PeftModel

    base = copy.deepcopy(loaded_tiny_model).to(torch.bfloat16)
    expected = PeftModel.from_pretrained(copy.deepcopy(base), folders["words"], autocast_adapter_dtype=False).eval()
    model = with_skills(base, tokenizer, folders)
    inputs = encode(tokenizer, PROMPTS["words"])
    assert torch.equal(model(**inputs).logits, expected(**inputs).logits)
    model.to(torch.float32)  # what was read before in bfloat16 is read again
    assert model(**inputs).logits.dtype == torch.float32
