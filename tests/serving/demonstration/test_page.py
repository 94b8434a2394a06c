"""The page of `mola demo`, in a real browser and without one."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mola import MolaConfig, generate_text, load_model, load_tokenizer
from mola.data.templates import get_template
from mola.errors import MolaError
from mola.insight.recorder import ModuleGates
from mola.serving.demonstration.demo import DemoOptions, main, running_demo
from tests.browser import browser, complaints, requested_addresses
from tests.ports import free_port
from tests.serving.skills_folders import KINDS, PROMPTS, make_skills_folder
from tests.waiting import PATIENCE

gradio = pytest.importorskip("gradio", reason="needs gradio")


@pytest.fixture(scope="module")
def adapter_dir(tiny_model_dir, tmp_path_factory):
    torch.manual_seed(1)
    config = MolaConfig(num_experts="2468", r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config).save_pretrained(folder)
    return folder


@pytest.fixture
def options(tiny_model_dir, adapter_dir):
    return DemoOptions(str(tiny_model_dir), str(adapter_dir), port=free_port(), max_new_tokens=8, device="cpu")


def test_the_page_begins_with_the_template_of_the_training(options, monkeypatch, caplog):
    from mola.serving.demonstration import page

    begun = []
    monkeypatch.setattr(
        page,
        "build_page",
        lambda answerer, base, template, count: begun.append(template) or SimpleNamespace(close=lambda verbose: None),
    )
    monkeypatch.setattr(page, "launch", lambda *_: "")
    for asked, template in ((None, "meta"), ("vigogne", "vigogne")):
        Path(options.adapter, "run.json").write_text('{"template": "meta"}', encoding="utf-8")
        try:
            with running_demo(replace(options, template=asked)):
                assert begun[-1] == template
        finally:
            Path(options.adapter, "run.json").unlink()
    assert "password" not in caplog.text
    with running_demo(replace(options, template="meta", host="0.0.0.0")):
        assert "Anyone who reaches 0.0.0.0 can use this page: it asks for no password" in caplog.text


def test_page_without_a_browser(options):
    """The controls' functions, called as the page calls them."""
    from mola.serving.demonstration.answering import Answerer
    from mola.serving.demonstration.page import _answers, _find_experts, _tables

    model = load_model(options.base_model, options.adapter, device="cpu")
    tokenizer = load_tokenizer(options.base_model)
    answerer = Answerer(model, tokenizer)
    try:
        *_, (adapted, plain, answer) = _answers(answerer, "Hi", "alpaca", 8, 0, 1, 0, 0)
        expected = generate_text(model, tokenizer, get_template("alpaca").prompt("Hi", ""), max_new_tokens=8)
        assert adapted == answer.text == expected != plain
        found, kind, layer = _find_experts(answerer, answer)
        assert kind.value == "q_proj"
        assert layer.value == 3
        by_layer, by_token = _tables(answer, found, "q_proj", 3, "answer")
        assert by_layer.count('scope="row"') == 4
        assert by_token.count('scope="row"') == len(answer.token_ids) - answer.num_prompt_tokens
        with pytest.raises(gradio.Error, match="must hold some text"):
            next(_answers(answerer, "  ", "alpaca", 8, 0, 1, 0, 0))
    finally:
        answerer.close()


def test_page_of_a_skills_folder(options, tiny_model_dir, tmp_path, monkeypatch):
    """Each answer is that of the skill that knows the text, in its own template."""
    from mola.serving.demonstration import page

    kinds = {kind: PROMPTS[kind] for kind in ("numbers", "shouts")}
    folder = make_skills_folder(str(tiny_model_dir), tmp_path / "skills", kinds, tmp_path / "loras")
    (folder / "numbers" / "prompts.json").write_text('{"template": "alpaca_short"}')
    pages, built = [], SimpleNamespace(close=lambda verbose: None)
    monkeypatch.setattr(page, "build_page", lambda *arguments: pages.append(arguments) or built)
    monkeypatch.setattr(page, "launch", lambda *_: "")
    with running_demo(replace(options, adapter=str(folder))):
        ((answerer, _, template, _),) = pages
        assert template is None
        tokenizer, base = load_tokenizer(options.base_model), load_model(options.base_model, device="cpu")
        for skill, text in KINDS:
            *_, (shown, plain, _) = page._answers(answerer, text, page._OWN_TEMPLATE, 8, 0, 1, 0, 0)
            prompt = get_template("alpaca_short" if skill == "numbers" else "alpaca").prompt(text, "")
            model = load_model(options.base_model, None if skill is None else folder / skill, device="cpu")
            assert shown.label == ("No skill knows this" if skill is None else f"Skill {skill}")
            assert shown.value == generate_text(model, tokenizer, prompt, max_new_tokens=8, before_answer=True)
            assert plain == generate_text(base, tokenizer, prompt, max_new_tokens=8, before_answer=True)


def test_two_linears_of_one_name_in_a_layer_are_different_kinds():
    """As GPT-2's `c_proj`, of its attention and of its MLP."""
    from mola.serving.demonstration.answering import Answer, Experts
    from mola.serving.demonstration.page import _find_experts, _tables

    names = [f"transformer.h.{layer}.{part}.c_proj" for layer in range(2) for part in ("attn", "mlp")]
    gates = torch.full((3, 2), 0.5)
    modules = [ModuleGates(name, int(name[14]), gates, gates[:, 0]) for name in names]
    experts = Experts(modules, ["a", "b", "c"], 1)
    answer = Answer("c", [1, 2, 3], 1)
    found, kind, _ = _find_experts(SimpleNamespace(experts=lambda answer: experts), answer)
    assert [value for value, _ in kind.choices] == ["attn.c_proj", "mlp.c_proj"]
    assert _tables(answer, found, "mlp.c_proj", 1, "answer")[0].count('scope="row"') == 2
    for other in (None, Answer("d", [1, 2, 4], 1)):  # another question is asked meanwhile, or answered
        assert "row" not in _tables(other, found, "mlp.c_proj", 1, "answer")[0]


def test_an_adapter_without_routers(options, tiny_model_dir, tmp_path):
    from mola.serving.demonstration.answering import Answer, Answerer
    from mola.serving.demonstration.page import _find_experts, _tables

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), LoraConfig(target_modules=["q_proj"]))
    answerer = Answerer(model.eval(), load_tokenizer(options.base_model))
    answer = Answer("", [0, 5, 6], 2)
    found, kind, _ = _find_experts(answerer, answer)
    answerer.close()
    assert kind.value is None
    assert "no mixture" in _tables(answer, found, None, None, "answer")[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "alpacka"}, "`template` must be one of"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"adapter": "nowhere"}, "`adapter` must be a folder"),
        ({"base_model": "./nowhere"}, "`base_model`"),
    ],
)
def test_wrong_options(options, change, message):
    with pytest.raises(MolaError, match=message), running_demo(DemoOptions(**{**vars(options), **change})):
        pass


@contextmanager
def command(options):
    """`mola demo` in a process of its own: gradio leaves event loops behind."""
    words = [f"--{name}={value}" for name, value in vars(options).items() if value is not None]
    process = subprocess.Popen([sys.executable, "-m", "mola.cli", "demo", *words], stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


def address(process):
    """Where a running command says its page is."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "The demo is at " in line:
            return line.split("The demo is at ")[1].split()[0].rstrip(".")
    raise AssertionError("".join(lines))


def test_a_port_that_is_taken(options, no_weights_dir):
    options.base_model = str(no_weights_dir)
    with socket.socket() as one:
        one.bind(("127.0.0.1", options.port))
        one.listen()
        with pytest.raises(MolaError, match=f"'127.0.0.1' and `port` {options.port} cannot be used"):
            main(options)


def test_a_missing_chat_template(options, no_weights_dir):
    options.base_model, options.template = str(no_weights_dir), "chat"
    with pytest.raises(MolaError, match="chat template"):
        main(options)


def test_signals_end_the_program_while_the_model_is_loaded(options, monkeypatch):
    monkeypatch.setattr("mola.serving.demonstration.demo.model_for", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        main(options)


@pytest.mark.slow
def test_command_ends_after_sigterm(options):
    with command(options) as process:
        assert b"mola" in urllib.request.urlopen(address(process), timeout=PATIENCE).read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


def box(window, label):
    return window.find_element("xpath", f"//label[.//span[normalize-space()='{label}']]//textarea")


def button(window, text):
    return window.find_element("xpath", f"//button[normalize-space()='{text}']")


@pytest.mark.slow
def test_in_a_browser(options, tmp_path):
    pictures = Path(os.environ.get("MOLA_SCREENSHOTS", tmp_path))
    with command(options) as process, browser() as window:
        url = address(process)
        window.get(url)
        waiting = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait(window, 180)
        waiting.until(lambda _: window.find_elements("xpath", "//button[normalize-space()='Answer']"))
        box(window, "Instruction").send_keys("Name a colour.")
        button(window, "Answer").click()
        waiting.until(lambda _: window.find_elements("css selector", "table th[scope=row]"))
        adapted, plain = (
            box(window, label).get_attribute("value") for label in ("With the adapter", "Base model alone")
        )
        assert adapted
        assert adapted != plain
        assert [each.text for each in window.find_elements("tag name", "caption")] == [
            "Mean gate of each expert, by layer, per cent",
            "Gates of base_model.model.model.layers.3.self_attn.q_proj, by token, per cent",
        ]
        window.save_screenshot(str(pictures / "demo.png"))
        window.set_window_size(500, 844)  # the narrowest that headless Chromium makes
        assert window.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        window.save_screenshot(str(pictures / "demo-narrow.png"))
        asked = requested_addresses(window)
        assert any(each.startswith(url) for each in asked)
        assert [each for each in asked if not each.startswith((url, "data:", "blob:"))] == []
        assert complaints(window) == []
        keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
        box(window, "Instruction").send_keys(keys.CONTROL, "a", keys.NULL, keys.DELETE)
        button(window, "Answer").click()  # nothing of that answer stays beside a question that is refused
        waiting.until(lambda _: "must hold some text" in window.find_element("tag name", "body").text)
        assert not box(window, "With the adapter").get_attribute("value")
        assert not box(window, "Base model alone").get_attribute("value")
        assert not window.find_elements("css selector", "table th[scope=row]")


@pytest.mark.slow
def test_stop_in_a_browser(options):
    options.max_new_tokens = 500
    with command(options) as process, browser() as window:
        window.get(address(process))
        waiting = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait(window, 180)
        waiting.until(lambda _: window.find_elements("xpath", "//button[normalize-space()='Answer']"))
        box(window, "Instruction").send_keys("Count.")
        button(window, "Answer").click()
        waiting.until(lambda _: box(window, "With the adapter").get_attribute("value"))
        button(window, "Stop").click()
        time.sleep(1)
        stopped = box(window, "With the adapter").get_attribute("value")
        time.sleep(1)
        assert box(window, "With the adapter").get_attribute("value") == stopped
        box(window, "Instruction").send_keys(" Something else, please.")
        button(window, "Answer").click()  # the page lives on
        waiting.until(
            lambda _: (text := box(window, "With the adapter").get_attribute("value")) and text[:5] != stopped[:5]
        )


# ---------------------------------------------------------------------- tables of gates: text of a model is no HTML


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.rows = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        else:
            assert tag in ("div", "table", "caption", "thead", "tbody", "code"), tag

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


TWO = ModuleGates("layers.0.q_proj", 0, torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]), torch.zeros(3))
THREE = ModuleGates(
    "layers.1.q_proj", 1, torch.tensor([[0.25, 0.75, 0.0], [0.25, 0.0, 0.75], [0.0, 0.0, 1.0]]), torch.zeros(3)
)


def test_mean_gate_by_layer():
    from mola.serving.demonstration.page import layers_table

    assert Cells(layers_table([TWO, THREE], slice(0, 2))).rows == [
        ["layer", "expert 0", "expert 1", "expert 2"],
        ["0", "75", "25", ""],
        ["1", "25", "38", "38"],
    ]


def test_mean_gates_without_tokens():
    from mola.serving.demonstration.page import layers_table

    assert Cells(layers_table([TWO], slice(3, None))).rows[1] == ["0", "·", "·"]


def test_gates_by_token():
    from mola.serving.demonstration.page import tokens_table

    assert Cells(tokens_table(THREE, ["a", "<script>", "&"], slice(1, None))).rows == [
        ["token", "expert 0", "expert 1", "expert 2"],
        ["<script>", "25", "·", "75"],
        ["&", "·", "·", "100"],
    ]
