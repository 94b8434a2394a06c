import io
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import GenerationConfig

from mola import MolaConfig
from mola.data.templates import get_template
from mola.errors import MolaError
from mola.generation.decoding import decoding_settings, generate_text
from mola.generation.generate import GenerateOptions, main
from tests.grids import slow


@pytest.fixture
def options(tiny_model_dir):
    return GenerateOptions(base_model=str(tiny_model_dir), dtype="float32", device="cpu", max_new_tokens=12)


def sample(model, tokenizer, **arguments):
    return generate_text(model, tokenizer, "Once upon", max_new_tokens=16, **arguments)


def test_same_seed_gives_the_same_text(tiny_model, tiny_tokenizer):
    texts = [sample(tiny_model, tiny_tokenizer, temperature=1.0, seed=seed) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_end_tokens_of_the_model_end_an_answer_too(tiny_model, tiny_tokenizer):
    text = sample(tiny_model, tiny_tokenizer)
    end = next(character for character in text if character.isascii() and character.isalpha())
    turn = tiny_tokenizer.convert_tokens_to_ids(end)
    tiny_model.generation_config.eos_token_id = [tiny_tokenizer.eos_token_id, turn]  # such as the end of a turn
    assert sample(tiny_model, tiny_tokenizer) == text[: text.index(end) + 1] != text


def test_seed_leaves_the_random_state_of_torch_alone(tiny_model, tiny_tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sample(tiny_model, tiny_tokenizer, temperature=1.0, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_without_seed_the_text_follows_the_random_state_of_torch(tiny_model, tiny_tokenizer):
    torch.manual_seed(5)
    first, second = (sample(tiny_model, tiny_tokenizer, temperature=1.0) for _ in range(2))
    torch.manual_seed(5)
    assert sample(tiny_model, tiny_tokenizer, temperature=1.0) == first != second


def test_greedy_is_the_default_whatever_the_model_ships(tiny_model, tiny_tokenizer):
    expected = sample(tiny_model, tiny_tokenizer)
    shipped = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=7.0, max_length=11)
    tiny_model.generation_config = shipped
    tiny_model.train()
    assert sample(tiny_model, tiny_tokenizer) == expected
    assert tiny_model.generation_config is shipped
    assert tiny_model.training


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}, {"temperature": 0}])
def test_narrowest_sampling_is_greedy(narrow, tiny_model, tiny_tokenizer):
    assert sample(tiny_model, tiny_tokenizer, seed=1, **narrow) == sample(tiny_model, tiny_tokenizer)


def test_temperature_alone_keeps_the_whole_vocabulary(tiny_model, tiny_tokenizer):
    """At a huge temperature all 258 tokens are equally likely; with a hidden top-k only 50 could come."""
    seen = set()
    streamer = SimpleNamespace(put=lambda value: seen.update(value.flatten().tolist()), end=lambda: None)
    prompt_ids = set(tiny_tokenizer("x")["input_ids"])
    for seed in range(100):
        generate_text(tiny_model, tiny_tokenizer, "x", max_new_tokens=1, temperature=1e6, seed=seed, streamer=streamer)
    assert len(seen - prompt_ids) > 60


def test_streamed_text_equals_the_returned_text(tiny_model, tiny_tokenizer):
    pieces = []
    streamer = SimpleNamespace(put=pieces.append, end=lambda: pieces.append(None))
    text = sample(tiny_model, tiny_tokenizer, streamer=streamer)
    tokens = torch.cat([piece.flatten() for piece in pieces[1:-1]])
    assert tiny_tokenizer.decode(tokens, skip_special_tokens=True) == text
    assert pieces[-1] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "`temperature`.*-0.1"),
        ({"temperature": 1e-40}, "`temperature`.*1e-40"),
        ({"temperature": float("nan")}, "`temperature`.*nan"),
        ({"top_p": 0.0}, "`top_p`.*0.0"),
        ({"top_k": 0}, "`top_k`.*0"),
        ({"max_new_tokens": 0}, "`max_new_tokens`.*0"),
        ({"do_sample": True, "temperature": 0.0}, "greedy"),
        ({"do_sample": False, "top_p": 0.9}, "`top_p` 0.9"),
    ],
)
def test_values_out_of_range_are_refused_before_loading(arguments, message, tmp_path):
    with pytest.raises(MolaError, match=message):
        decoding_settings(**arguments)
    with pytest.raises(MolaError, match=message):
        main(GenerateOptions(base_model=str(tmp_path / "missing"), prompt="x", **arguments))


@given(
    st.sampled_from([None, 0.0]) | st.floats(1e-6, 100),
    st.none() | st.floats(0, 1, exclude_min=True),
    st.none() | st.integers(1, 10_000),
)
def test_sampling_happens_only_if_asked_for_and_always_takes_effect(temperature, top_p, top_k):
    settings = decoding_settings(8, temperature, top_p, top_k)
    given_values = {
        name: value
        for name, value in (("temperature", temperature), ("top_p", top_p), ("top_k", top_k))
        if value is not None
    }
    assert settings["do_sample"] == (bool(given_values) and temperature != 0)
    if settings["do_sample"]:
        assert {name: settings[name] for name in given_values} == given_values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a", "instruction": "b"}, "`prompt`"),
        ({"input": "b"}, "`input` needs"),
        ({"instruction": "a", "template": "nope"}, "nope"),
        ({"prompt": "a", "template": "meta"}, "`prompt`.*`template`"),
        ({"prompt": "a", "seed": -1}, "`seed`.*-1"),
    ],
)
def test_contradicting_options_are_refused(arguments, message, tmp_path):
    with pytest.raises(MolaError, match=message):
        main(GenerateOptions(base_model=str(tmp_path / "missing"), **arguments))


def test_a_template_must_be_a_template(tiny_model, tiny_tokenizer):
    with pytest.raises(MolaError, match="`template` must be a Template, .*template_for.*: got 'chat'"):
        generate_text(tiny_model, tiny_tokenizer, "a", template="chat")
    with pytest.raises(MolaError, match="`seed` must be a whole number"):
        generate_text(tiny_model, tiny_tokenizer, "a", temperature=1.0, seed=-1)


def test_prompt_without_room_is_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(MolaError, match="1024 positions: sample 'prompt' has 1001 prompt tokens, and 128"):
        generate_text(tiny_model, tiny_tokenizer, "x" * 1000)


def test_command_refuses_a_long_prompt_before_the_weights_are_read(no_weights_dir):
    options = {"base_model": str(no_weights_dir), "dtype": "float32", "device": "cpu"}
    for asked in ({"prompt": "x" * 1000}, {"instruction": "x" * 1000, "template": "meta"}):
        with pytest.raises(MolaError, match="1024 positions: sample 'prompt'"):
            main(GenerateOptions(**options, **asked))


def test_prompt_without_tokens_is_refused(tiny_model, tiny_tokenizer):
    tiny_tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(MolaError, match="at least one token"):
        generate_text(tiny_model, tiny_tokenizer, "")


@pytest.mark.parametrize("stream", [True, False])
def test_command_prints_the_text_alone(stream, options, tiny_model, tiny_tokenizer, capsys):
    options.stream, options.instruction, options.input, options.template = stream, "Add.", "2 and 3", "meta"
    assert main(options) == 0
    prompt = get_template("meta").prompt("Add.", "2 and 3")
    expected = generate_text(tiny_model, tiny_tokenizer, prompt, max_new_tokens=12)
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    ("place", "asked", "used"),
    [
        ("checkpoint-4", None, "alpaca_short"),
        (None, None, "alpaca"),
        *slow((".", None, "alpaca_short"), (".", "meta", "meta")),
    ],
)
def test_the_template_of_the_training_is_used(place, asked, used, options, tiny_model, tmp_path, capsys, caplog):
    """As `run.json` has it, in the adapter's folder or above a checkpoint."""
    torch.manual_seed(0)
    config = MolaConfig(num_experts=2, r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    adapter = tmp_path / (place or ".")
    get_peft_model(tiny_model, config).save_pretrained(adapter)
    if place is not None:
        (tmp_path / "run.json").write_text('{"template": "alpaca_short"}', encoding="utf-8")
    options.adapter, options.template, options.instruction = str(adapter), asked, "Add."
    assert main(options) == 0
    assert ("does not record the prompt template of its training" in caplog.text) == (place is None)
    said = capsys.readouterr().out
    options.instruction, options.template, options.prompt = None, None, get_template(used).prompt("Add.")
    assert main(options) == 0
    assert capsys.readouterr().out == said


def test_command_seed_takes_effect(options, capsys):
    texts = []
    for seed in (1, 1, 2):
        options.prompt, options.temperature, options.seed = "Once", 1.0, seed
        main(options)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_command_without_seed_draws_one_and_names_it(options, capsys, caplog):
    caplog.set_level("INFO")
    options.prompt, options.do_sample = "Once", True
    texts = []
    for _ in range(2):
        main(options)
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]
    options.seed = int(caplog.text.split("Random seed ")[-1].split(".")[0])
    main(options)
    assert capsys.readouterr().out == texts[1]


def test_loop_reads_instructions_until_exit(options, tiny_model, tiny_tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\n\n  second \n/exit\nthird\n"))
    options.stream, options.template = False, "meta"
    assert main(options) == 0
    expected = [
        generate_text(tiny_model, tiny_tokenizer, get_template("meta").prompt(line), max_new_tokens=12)
        for line in ("first", "second")
    ]
    assert capsys.readouterr().out == "".join(text + "\n" for text in expected)


def test_loop_goes_on_after_a_line_that_is_too_long(options, capsys, monkeypatch):
    options.template = "meta"
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 2000 + "\nshort"))
    assert main(options) == 0
    captured = capsys.readouterr()
    assert "1024 positions" in captured.err
    assert captured.out.strip()
