import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from mola.data.encode import data_fingerprint, encode_examples
from mola.data.templates import Template, get_template
from mola.data.tokenized import IGNORED
from mola.errors import MolaError

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
ALPACA, META = get_template("alpaca"), get_template("meta")
SENTENCES = ["Answer: The answer is A.\n\n### Response:\n", "Below is an instruction.\n\n\nHello  world"] * 9


def byte_level(single=f"{BOS} $A", trim_offsets=False, use_regex=True):
    """Byte-level BPE with merges; `single` is what the post-processor adds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[BOS, EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if single is not None:
        steps.append(processors.TemplateProcessing(single=single, special_tokens=[(BOS, 0), (EOS, 1)]))
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


class CodePointTokenizer(PreTrainedTokenizer):
    """A slow tokenizer: one token per character, BOS before and EOS after the text."""

    def __init__(self, **kwargs):
        super().__init__(bos_token=BOS, eos_token=EOS, pad_token=PAD, **kwargs)

    @property
    def vocab_size(self):
        return 0x110000 + 3

    def get_vocab(self):
        return dict(self.added_tokens_encoder)

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token) + 3  # 0 to 2 are the special tokens

    def _convert_id_to_token(self, index):
        return chr(index - 3)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.bos_token_id, *token_ids_0, self.eos_token_id]


TOKENIZERS = {
    "bos": byte_level(),
    "nothing": byte_level(single=None),
    "bos-eos": byte_level(single=f"{BOS} $A {EOS}"),
    "trimmed-offsets": byte_level(trim_offsets=True),
    "slow": CodePointTokenizer(),
}
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)
# The special tokens' own texts become special tokens inside data too; everything else is fair.
texts = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="<"))


def example(instruction="Which?", output="Answer: The answer is A.", number=0, **more):
    return {"id": f"r{number}", "instruction": instruction, "input": "", "output": output, **more}


def encode(examples, tokenizer, template=ALPACA, cutoff_len=4096, **options):
    return encode_examples(examples, tokenizer, template, cutoff_len=cutoff_len, **options)


def trained(row):
    return [label for label in row["labels"] if label != IGNORED]


def masked(row):
    return [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORED]


@every_tokenizer
@given(instruction=texts, context=texts, output=texts.filter(bool))
def test_exactly_the_output_and_eos_are_trained(name, instruction, context, output):
    tokenizer = TOKENIZERS[name]
    dataset, report = encode([example(instruction, output, input=context)], tokenizer)
    row = dataset[0]
    assert len(masked(row)) + len(trained(row)) == len(row["input_ids"]) == row["length"]
    assert row["labels"] == [IGNORED] * len(masked(row)) + trained(row)
    assert row["input_ids"] == masked(row) + trained(row)
    assert row["attention_mask"] == [1] * row["length"]
    assert trained(row)[-1] == tokenizer.eos_token_id
    # The prompt's last line break and the output may share a token; then both are trained.
    prompt = ALPACA.prompt(instruction, context)
    learned = tokenizer.decode(trained(row)[:-1], clean_up_tokenization_spaces=False)
    assert learned in (output, *(prompt[-blanks:] + output for blanks in (1, 2)))
    assert learned == output or output[0].isspace()
    special = [] if name == "nothing" else [tokenizer.bos_token_id]
    assert masked(row)[: len(special)] == special
    assert row["input_ids"].count(0 if name != "slow" else tokenizer.bos_token_id) == len(special)
    whole = tokenizer.decode(row["input_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert whole == prompt + output
    assert (report.tokens, report.trained_tokens) == (row["length"], len(trained(row)))


@every_tokenizer
def test_eos_is_added_once_or_never(name):
    tokenizer = TOKENIZERS[name]
    ids = encode([example()], tokenizer)[0][0]["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1
    row = encode([example()], tokenizer, add_eos_token=False)[0][0]
    assert row["input_ids"] == ids[:-1]
    assert tokenizer.decode(trained(row)) == "Answer: The answer is A."


def test_output_that_spells_eos_gets_no_second_one():
    row = encode([example(output=f"yes{EOS}")], TOKENIZERS["bos"])[0][0]
    assert trained(row).count(1) == 1


def test_train_on_inputs_copies_the_ids():
    dataset, report = encode([example()], TOKENIZERS["bos"], train_on_inputs=True)
    assert dataset[0]["labels"] == dataset[0]["input_ids"]
    assert report.trained_tokens == report.tokens


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_token_across_the_border_is_trained(trim_offsets):
    tokenizer = byte_level(trim_offsets=trim_offsets, use_regex=False)
    ids = tokenizer("Response:\n")["input_ids"]
    straddling = tokenizer.decode(ids[-1:])
    assert len(straddling) > 1  # the training sentences have a merge that ends in the line break
    bare = Template("bare", "{instruction}{input}", "{instruction}", has_headings=False)
    row = encode([example("Response:", "\n")], tokenizer, bare)[0][0]
    assert tokenizer.decode(trained(row)) == straddling + EOS
    assert masked(row) == ids[:-1]


@every_tokenizer
def test_text_without_prompt_masks_bos_only(name):
    tokenizer = TOKENIZERS[name]
    row = encode([{"id": "a", "instruction": None, "input": None, "output": "\n hello"}], tokenizer, META)[0][0]
    assert tokenizer.decode(trained(row)) == f"\n hello{EOS}"
    assert len(masked(row)) == (name != "nothing")


@every_tokenizer
def test_empty_output_trains_eos_only_or_is_refused(name):
    tokenizer = TOKENIZERS[name]
    row = encode([example(output="")], tokenizer)[0][0]
    assert trained(row) == [tokenizer.eos_token_id]
    examples = [example(output=""), example(number=1)]
    for truncation in ("error", "left"):
        with pytest.raises(MolaError, match="`output` must not be empty.*`r0`"):
            encode(examples, tokenizer, add_eos_token=False, truncation=truncation)
    for truncation in ("drop", "right"):
        report = encode(examples, tokenizer, add_eos_token=False, truncation=truncation)[1]
        assert (report.kept, report.dropped) == (1, 1)


def lengths(tokenizer, examples):
    return encode(examples, tokenizer)[0]["length"]


@pytest.mark.parametrize("name", ["bos", "slow"])
def test_too_long_is_an_error_by_default(name):
    tokenizer = TOKENIZERS[name]
    examples = [example(number=0), example("w" * 500, number=1), example("w" * 600, number=2)]
    short, _, longest = lengths(tokenizer, examples)
    message = f"2 of 3 samples would lose tokens. The longest, `r2`, has {longest}, but `cutoff_len` is {short}"
    with pytest.raises(MolaError, match=message):
        encode(examples, tokenizer, cutoff_len=short)
    assert encode(examples, tokenizer, cutoff_len=longest)[1].kept == 3


@every_tokenizer
def test_left_keeps_bos_and_the_whole_answer(name):
    tokenizer = TOKENIZERS[name]
    samples = [example("w" * 50, "A rather long answer.")]
    full = encode(samples, tokenizer)[0][0]
    answer, special = len(trained(full)), int(name != "nothing")
    least = answer + 1  # no token predicts the first one
    for cutoff_len in (least, least + 7, full["length"] - 1):
        dataset, report = encode(samples, tokenizer, cutoff_len=cutoff_len, truncation="left")
        row = dataset[0]
        assert row["length"] == cutoff_len
        assert trained(row) == trained(full)
        kept = cutoff_len - special
        assert row["input_ids"] == full["input_ids"][:special] + full["input_ids"][-kept:]
        assert (report.truncated, report.answer_cut, report.dropped) == (1, 0, 0)
    with pytest.raises(MolaError, match=f"`r0` needs {least} tokens without its prompt"):
        encode(samples, tokenizer, cutoff_len=least - 1, truncation="left")


@pytest.mark.parametrize("name", ["bos", "bos-eos", "slow"])
def test_right_counts_every_loss(name):
    tokenizer = TOKENIZERS[name]
    full = encode([example()], tokenizer)[0][0]
    size, prompt = full["length"], len(masked(full))
    for cutoff_len, counts in [(size, (1, 0, 0, 0)), (size - 1, (1, 0, 1, 0)), (size - 2, (1, 0, 1, 1))]:
        dataset, report = encode([example()], tokenizer, cutoff_len=cutoff_len, truncation="right")
        assert dataset[0]["input_ids"] == full["input_ids"][:cutoff_len]
        assert dataset[0]["labels"] == full["labels"][:cutoff_len]
        assert (report.kept, report.dropped, report.truncated, report.answer_cut) == counts
    with pytest.raises(MolaError, match="leaves no sample"):
        encode([example()], tokenizer, cutoff_len=prompt, truncation="right")
    options = {"cutoff_len": prompt, "truncation": "right", "train_on_inputs": True}
    report = encode([example()], tokenizer, **options)[1]
    assert (report.kept, report.truncated, report.answer_cut) == (1, 1, 1)


@given(
    pairs=st.lists(st.tuples(texts, texts.filter(bool)), min_size=1, max_size=4),
    cutoff_len=st.integers(8, 120),
    truncation=st.sampled_from(["drop", "left", "right"]),
    train_on_inputs=st.booleans(),
)
def test_no_answer_is_lost_in_silence(pairs, cutoff_len, truncation, train_on_inputs):
    tokenizer = TOKENIZERS["bos"]
    short = get_template("alpaca_short")
    examples = [example(*pair, number=number) for number, pair in enumerate(pairs)]
    full = encode(examples, tokenizer, short)[0]
    options = {"cutoff_len": cutoff_len, "truncation": truncation, "train_on_inputs": train_on_inputs}
    try:
        dataset, report = encode(examples, tokenizer, short, **options)
    except MolaError:
        assert max(full["length"]) > cutoff_len
        return
    assert report.total == len(examples) == report.kept + report.dropped
    assert report.kept == len(dataset)
    assert max(dataset["length"]) <= cutoff_len
    assert report.longest == max(full["length"])
    long = [row for row in full if row["length"] > cutoff_len]
    # One token too many costs EOS only; what ends before the answer starts has no token to train on.
    empty = [row for row in long if len(masked(row)) >= cutoff_len and not train_on_inputs]
    cut = [row for row in long if row["length"] > cutoff_len + 1 and row not in empty]
    dropped, truncated, answer_cut = {
        "drop": (len(long), 0, 0),
        "left": (0, len(long), 0),
        "right": (len(empty), len(long) - len(empty), len(cut)),
    }[truncation]
    assert (report.dropped, report.truncated, report.answer_cut) == (dropped, truncated, answer_cut)
    if truncation != "right":
        kept = full if truncation == "left" else [row for row in full if row["length"] <= cutoff_len]
        for row, before in zip(dataset, kept, strict=True):
            assert row["input_ids"][-len(trained(before)) :] == trained(before)
    assert report.trained_tokens == sum(len(trained(row)) for row in dataset)
    assert all(trained(row) for row in dataset)


def test_summary_is_one_line_with_the_numbers():
    report = encode([example(), example("w" * 500, number=1)], TOKENIZERS["bos"])[1]
    assert report.summary() == (
        f"2 of 2 samples kept, 0 dropped, 0 truncated (0 with a cut answer); longest {report.longest} "
        f"tokens; {report.tokens} tokens, {report.trained_tokens} of them in the loss"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutoff_len": 7}, "`cutoff_len` must be at least 8: got 7"),
        ({"truncation": "cut"}, "`truncation` must be one of 'error', 'drop', 'left', 'right': got 'cut'"),
    ],
)
def test_wrong_option_is_explained(options, message):
    with pytest.raises(MolaError, match=message):
        encode([example()], TOKENIZERS["bos"], **options)


def test_wrong_example_is_named():
    with pytest.raises(MolaError, match="example `r0`: `instruction` must be text"):
        encode([example(instruction=None)], TOKENIZERS["bos"])
    with pytest.raises(MolaError, match="example `r0`: `output` must be text: got None"):
        encode([example(output=None)], TOKENIZERS["bos"])


def test_no_example_and_no_sample_left_are_errors():
    with pytest.raises(MolaError, match="`examples` must not be empty"):
        encode([], TOKENIZERS["bos"])
    with pytest.raises(MolaError, match="all 1 were dropped"):
        encode([example("w" * 500)], TOKENIZERS["bos"], cutoff_len=100, truncation="drop")


def test_tokenizer_without_eos_needs_the_option_off():
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(MolaError, match="`add_eos_token` needs a tokenizer with an EOS token"):
        encode([example()], tokenizer)
    assert encode([example()], tokenizer, add_eos_token=False)[1].kept == 1


@pytest.mark.parametrize("truncation", ["drop", "right"])
def test_many_examples_are_encoded_in_parts(monkeypatch, truncation):
    outputs = ["a" * (1 + number % 40) for number in range(250)]
    examples = [example(output=output, number=number) for number, output in enumerate(outputs)]
    options = {"tokenizer": TOKENIZERS["bos"], "cutoff_len": 125, "truncation": truncation}
    whole, report = encode(examples, **options)
    assert report.total == 250
    assert 0 < report.dropped + report.truncated < 250
    monkeypatch.setattr("mola.data.encode._CHUNK", 100)
    monkeypatch.setattr("mola.data.tokenized._BATCH", 64)
    parts, same = encode(examples, **options)
    assert same == report
    assert parts.features == whole.features
    assert parts.to_list() == whole.to_list()
    with pytest.raises(
        MolaError, match=r"of 250 samples would lose tokens. The longest, `r39`, has \d+, but `cutoff_len` is 125"
    ):
        encode(examples, **{**options, "truncation": "error"})


def test_fingerprint_follows_content_and_order():
    one, two = example(), example("Other?", number=1)
    first = data_fingerprint([one, two])
    assert first == data_fingerprint([{**one, "answer": "A"}, dict(reversed(two.items()))])
    assert len(first) == 64
    assert first != data_fingerprint([two, one])
    for name in ("id", "instruction", "input", "output"):
        assert first != data_fingerprint([{**one, name: "changed"}, two])
    assert data_fingerprint([example(instruction=None)]) != data_fingerprint([example(instruction="")])


def test_data_needs_no_torch_of_its_own():
    # `mola` itself may import torch, so the package is put in the way of its own __init__.
    code = (
        "import sys, types, importlib.util as u;"
        "m = types.ModuleType('mola'); m.__path__ = u.find_spec('mola').submodule_search_locations;"
        "sys.modules['mola'] = m;"
        "import mola.data.templates, mola.data.tasks, mola.data.read, mola.data.prepare, mola.data.encode;"
        "sys.exit('torch' in sys.modules or any(n.startswith('mola.tuner') for n in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
