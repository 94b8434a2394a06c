"""The template `chat` in the commands: trained, asked and served in one form, the tokenizer's or an adapter's."""

import json
import shutil
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from mola.cli import main
from mola.data.encode import encode_examples
from mola.data.prepare import PrepareOptions, prepare
from mola.data.templates import ChatTemplate
from mola.generation.decoding import generate_text
from mola.generation.predicting import encode_before_answer
from mola.models.prompts import own_chat, own_chats, template_for, warn_of_other_template
from mola.serving.jobs import JobMaker, Limits
from mola.serving.requests import ChatRequest, CompletionRequest

TURNS = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
OTHER = (
    "{% for m in messages %}{{ 'ask' if m.role == 'user' else 'answer' }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}answer: {% endif %}"
)


@pytest.fixture(scope="module")
def base(tiny_model_dir, tmp_path_factory):
    folder = shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("chat") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TURNS
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "data"
    prepare(PrepareOptions("sample", str(folder), train_size=8, validation_size=2, test_size=2))
    return folder


def run(name, **options):
    return main([name, *(f"--{key}={value}" for key, value in options.items())])


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    shape = {"num_experts": "2,", "r": 2, "max_steps": 1, "warmup_steps": 0, "eval_strategy": "no", "use_cpu": "true"}
    asked = {"base_model": base, "task": "sample", "data": data / "train.json", "template": "chat"}
    assert run("train", **asked, **shape, disable_tqdm="true", output_dir=folder) == 0
    return folder


def test_training_evaluation_generation_and_server_use_one_format(base, data, trained, tmp_path, capsys, caplog):
    assert json.loads((trained / "run.json").read_text())["template"] == "chat"
    common = {"base_model": base, "adapter": trained, "device": "cpu"}
    result = tmp_path / "after.json"
    assert run("evaluate", **common, task="sample", data=data / "test.json", template="chat", output=result) == 0
    prompts = [sample["prompt"] for sample in json.loads(result.read_text())["samples"]]
    assert all(prompt.startswith("[user] ") and prompt.endswith("</s>[assistant] ") for prompt in prompts)
    assert "prompt template" not in caplog.text
    capsys.readouterr()
    assert run("generate", **common, instruction="Why?", max_new_tokens=4, stream="false") == 0
    with_template = capsys.readouterr().out
    assert with_template.strip("\n")
    chats = own_chats({"run": str(trained)})
    assert chats["run"].template == TURNS
    # The tokens are those of the training, in the commands and in the server.
    tokenizer = AutoTokenizer.from_pretrained(base)
    template = template_for("chat", tokenizer, trained)
    row = {"id": "1", "instruction": "Why?", "input": "", "output": "So."}
    ((sample,), _) = encode_examples([row], tokenizer, template, cutoff_len=64)
    asked = encode_before_answer(tokenizer, [template.prompt("Why?")], template)[0]
    jobs = JobMaker(tokenizer, {"run": "run"}, Limits(8, 1, None), chats)
    chat = ChatRequest(model="run", messages=[{"role": "user", "content": "Why?"}])
    assert sample["input_ids"][: len(asked)] == asked == list(jobs.make(chat)[0].prompt)
    assert sample["labels"][len(asked)] == sample["input_ids"][len(asked)]
    assert "send that template's text" not in caplog.text
    # An answer ends where its turn does, be it with another token than the base model's end.
    assert jobs.make(chat)[0].stops == ["</s>"]
    turns = {"run": chats["run"]._replace(template=TURNS.replace("{{ eos_token }}", "<s>"))}
    assert template_for("chat", tokenizer).ending(tokenizer) == [tokenizer.eos_token_id]
    other = JobMaker(tokenizer, {"run": "run", "base": None}, Limits(8, 1, None), turns)
    assert other.make(chat)[0].stops == ["</s>", "<s>"]
    assert other.make(CompletionRequest(model="run", prompt="Why?"))[0].stops == ["</s>"]
    assert other.make(chat.model_copy(update={"model": "base", "stop": ["So"]}))[0].stops == ["So", "</s>"]


def test_the_template_beside_an_adapter_is_used(base, trained, tmp_path, caplog):
    """As TRL leaves one, with no record of the run."""
    other = shutil.copytree(trained, tmp_path / "other")
    (other / "run.json").unlink()
    (other / "chat_template.jinja").write_text(OTHER)
    assert own_chat(other).template == OTHER
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert template_for("chat", tokenizer, other).prompt("Why?") == "ask: Why?answer: "
    assert template_for("chat", tokenizer).prompt("Why?") == "[user] Why?</s>[assistant] "
    warn_of_other_template(other, "chat")
    assert not caplog.records
    warn_of_other_template(other, "alpaca")
    assert "it is used with the template alpaca. Pass `template` chat if it was trained on chats" in caplog.text


def test_a_chat_model_is_trained_in_its_chat_template(base, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"Q{i}", "output": "x"} for i in range(4)]))
    shape = {"num_experts": 2, "max_steps": 1, "warmup_steps": 0, "use_cpu": "true", "disable_tqdm": "true"}
    assert run("train", base_model=base, data=rows, **shape, output_dir=tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["template"] == "chat"


def test_a_missing_chat_template_is_an_error(tiny_model_dir, data, tmp_path, capsys):
    asked = {"task": "sample", "data": data / "test.json", "template": "chat"}
    assert run("evaluate", base_model=tiny_model_dir, **asked) == 2
    assert "`template` chat needs a tokenizer with a chat template" in capsys.readouterr().err


def test_the_end_of_a_turn_ends_an_answer(tiny_model, tiny_tokenizer):
    """Also where neither model nor tokenizer has it as their end token."""

    class Ends(ChatTemplate):
        def ending(self, tokenizer):
            return [turn, tokenizer.eos_token_id]

    def answer(template):
        heard = []
        streamer = SimpleNamespace(put=lambda value: heard.append(value.flatten().tolist()), end=lambda: None)
        generate_text(tiny_model, tiny_tokenizer, "[user] Why?", max_new_tokens=8, template=template, streamer=streamer)
        return [token for tokens in heard[1:] for token in tokens]

    plain = ChatTemplate("chat", "", "", tokenizer=tiny_tokenizer, jinja=TURNS)
    ids = answer(plain)
    turn = next(each for each in ids[1:] if each != ids[0])
    assert answer(Ends("chat", "", "", tokenizer=tiny_tokenizer, jinja=TURNS)) == ids[: ids.index(turn) + 1]


def test_training_on_from_an_adapter_has_its_template_and_end_token(base, data, trained, tmp_path):
    other = shutil.copytree(trained, tmp_path / "other")
    (other / "run.json").unlink()
    (other / "chat_template.jinja").write_text(OTHER)
    asked = {"base_model": base, "task": "sample", "data": data / "train.json", "template": "chat"}
    shape = {"max_steps": 1, "warmup_steps": 0, "eval_strategy": "no", "use_cpu": "true", "disable_tqdm": "true"}
    assert run("train", **asked, **shape, adapter=other, output_dir=tmp_path / "on") == 0
    assert own_chat(tmp_path / "on") == own_chat(other)
    assert own_chat(other).template == OTHER
