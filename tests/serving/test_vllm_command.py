"""`mola serve --engine vllm`: the command it becomes, and what it refuses. Needs no vLLM."""

import json
import os
import shutil
import sys
from importlib import util

import pytest
from peft import LoraConfig

from mola.cli import main as cli
from mola.errors import MolaError
from mola.serving.serve import ServeOptions, main, running_server
from tests.conftest import save_adapter

TOKEN = "a-secret-token"


@pytest.fixture
def became(monkeypatch):
    """Runs the command as if vLLM were installed; what the process would have become."""

    def run(**options):
        seen = []
        monkeypatch.setattr(os, "execve", lambda *arguments: seen.append(arguments))
        monkeypatch.setattr(util, "find_spec", lambda name: name)
        main(ServeOptions(engine="vllm", **options))
        ((program, command, environment),) = seen
        assert program == command[0] == sys.executable
        return command[1:], environment

    return run


@pytest.fixture
def folder(adapters):
    return adapters["first"]


def value_of(command, flag):
    return command[command.index(flag) + 1]


def test_command_serves_one_adapter_under_its_name(became, tiny_model_dir, folder):
    command, _ = became(base_model=str(tiny_model_dir), adapter=[f"science={folder}"], port=8123, dtype="float32")
    assert command[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    flags = {"--model": str(tiny_model_dir), "--served-model-name": "science", "--host": "127.0.0.1"}
    flags |= {"--port": "8123", "--dtype": "float32", "--load-format": "mola"}
    assert {flag: value_of(command, flag) for flag in flags} == flags
    assert json.loads(value_of(command, "--model-loader-extra-config")) == {"adapter": str(folder)}
    defaults = json.loads(value_of(command, "--override-generation-config"))
    assert (defaults["temperature"], defaults["max_new_tokens"]) == (0.0, 1024)
    assert "--trust-remote-code" not in command


def test_loras_are_served_by_vllm_itself_beside_the_base_model(became, tiny_model_dir, tmp_path):
    folders = {"one": tmp_path / "one", "two": tmp_path / "two"}
    for folder, r in zip(folders.values(), (4, 12), strict=True):
        save_adapter(tiny_model_dir, folder, LoraConfig(r=r, task_type="CAUSAL_LM"))
    words = [f"{name}={folder}" for name, folder in folders.items()]
    command, _ = became(base_model=str(tiny_model_dir), adapter=words, base_name="plain")
    assert value_of(command, "--served-model-name") == "plain"
    assert value_of(command, "--max-lora-rank") == "16"
    assert "--enable-lora" in command
    at = command.index("--lora-modules")
    served = {json.loads(word)["name"]: json.loads(word)["path"] for word in command[at + 1 :]}
    assert served == {name: str(folder) for name, folder in folders.items()}
    assert "--load-format" not in command


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "`rank_pattern` must be empty: vLLM ignores"),
        ({"use_dora": True}, "must be a plain LoRA: `use_dora` is set"),
    ],
)
def test_a_lora_that_vllm_would_read_wrongly_is_refused(became, tiny_model_dir, tmp_path, settings, message):
    save_adapter(tiny_model_dir, tmp_path / "lora", LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    with pytest.raises(MolaError, match=message):
        became(base_model=str(tiny_model_dir), adapter=[str(tmp_path / "lora")])


def test_command_serves_the_base_model_alone(became, tiny_model_dir):
    command, _ = became(base_model=str(tiny_model_dir), base_name="plain", trust_remote_code=True, max_tokens=7)
    assert value_of(command, "--served-model-name") == "plain"
    assert json.loads(value_of(command, "--override-generation-config"))["max_new_tokens"] == 7
    assert "--trust-remote-code" in command
    assert "--load-format" not in command


def test_an_adapters_own_chats_go_along(became, tiny_model_dir, folder, tmp_path, caplog):
    """As TRL leaves them beside one."""
    own = shutil.copytree(folder, tmp_path / "own")
    asked = {"base_model": str(tiny_model_dir), "adapter": [f"own={own}"]}
    assert "--chat-template" not in became(**asked)[0]
    (own / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": "{{ messages }}"}))
    assert "--chat-template" not in became(**asked)[0]
    assert "Write the template to chat_template.jinja" in caplog.text
    (own / "chat_template.jinja").write_text("{{ messages }}")
    assert value_of(became(**asked)[0], "--chat-template") == str(own / "chat_template.jinja")
    assert "ends its answers with '<end>'" in caplog.text
    caplog.clear()
    became(base_model="owner/model", adapter=asked["adapter"])
    assert "'<end>', but vLLM's server stops at the base model's end token, which is not known" in caplog.text
    (own / "run.json").write_text(json.dumps({"template": "alpaca"}))
    assert "--chat-template" not in became(**asked)[0]
    assert "was trained with the prompt template alpaca" in caplog.text


def test_an_adapter_that_vllm_cannot_serve_is_refused_before(became, tiny_model_dir, folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    config = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    with pytest.raises(MolaError, match="`modules_to_save` must be empty for vLLM"):
        became(base_model=str(tiny_model_dir), adapter=[str(own)])


def test_token_goes_through_the_environment(became, tiny_model_dir, monkeypatch, caplog):
    monkeypatch.setenv("MOLA_API_KEY", TOKEN)
    monkeypatch.setattr("mola.serving.vllm_command.SET", ["OMP_WAIT_POLICY"])
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # of mola's own process, not of vLLM's
    with caplog.at_level("INFO"):
        command, environment = became(base_model=str(tiny_model_dir))
    assert environment["VLLM_API_KEY"] == TOKEN
    assert "OMP_WAIT_POLICY" not in environment
    assert not [word for word in command if TOKEN in word]
    assert TOKEN not in caplog.text
    assert "vllm.entrypoints" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_waiting": 3}, "`max_waiting` must be left out.*got 3"),
        ({"max_connections": 5}, "`max_connections` must be left out"),
        ({"device": "cpu"}, "`device` must be left out"),
        ({"load_in_4bit": True}, "`load_in_4bit` must be left out"),
        ({"adapter": ["first", "second"]}, "`adapter` must be one mixture, or LoRAs.*first, second"),
        ({"adapter": ["first"], "base_name": "plain"}, "`base_name` must be left out.*'plain'"),
        ({"adapter": ["nowhere"]}, "no such folder"),
        ({"base_model": "no/such/folder"}, "names a folder that does not exist"),
    ],
)
def test_what_vllm_cannot_do_is_refused(options, message, became, tiny_model_dir, adapters):
    folders = dict(zip(("first", "second"), adapters.values(), strict=True))
    if "adapter" in options:
        named = [f"{name}={folders.get(name, name)}" for name in options["adapter"]]
        options = {**options, "adapter": named}
    with pytest.raises(MolaError, match=message):
        became(**{"base_model": str(tiny_model_dir), **options})


def test_missing_vllm_is_one_line(tiny_model_dir, capsys):
    if util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    assert cli(["serve", "--engine", "vllm", "--base_model", str(tiny_model_dir)]) == 2
    assert "pip install 'mola-peft[vllm]'" in capsys.readouterr().err


def test_engine_is_a_known_one_and_not_inside_a_program(tiny_model_dir):
    with pytest.raises(MolaError, match="`engine` must be mola, or vllm .*'triton'"):
        main(ServeOptions(base_model=str(tiny_model_dir), engine="triton"))
    options = ServeOptions(base_model=str(tiny_model_dir), engine="vllm")
    with pytest.raises(MolaError, match="`engine` must be mola"), running_server(options):
        pass
