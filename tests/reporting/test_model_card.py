"""The model card of a run, and its upload to a hub that listens on this machine."""

import base64
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from mola.cli import main
from mola.errors import MolaError
from mola.files.digests import is_own_file
from mola.options.parsing import parse
from mola.reporting.model_card import PLOT_FILE, render_card, write_model_card
from mola.training.options import TrainOptions
from mola.training.run_record import without_token
from mola.training.train import train
from tests.waiting import PATIENCE

TOKEN = "hf_of_the_test"


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.json"
    rows = [
        {"id": str(i), "instruction": f"Say {i}", "input": "", "output": f"Answer: {'ABC'[i % 3]}."} for i in range(10)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def flags(tiny_model_dir, rows_file):
    """Command line of a short run."""

    def build(folder, **options):
        settings = {
            "base_model": tiny_model_dir,
            "data": rows_file,
            "output_dir": folder,
            "dtype": "float32",
            "template": "meta",
            "num_experts": "1224",
            "r": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "warmup_steps": 0,
            "validation_size": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "disable_tqdm": "true",
            "use_cpu": "true",
            **options,
        }
        return ["train", *(f"--{name}={value}" for name, value in settings.items() if value is not None)]

    return build


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """A run folder that no test changes."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["/some/where/bin/mola", *flags(folder)])
        assert main(flags(folder)) == 0
    return folder


@pytest.fixture
def run_folder(finished, tmp_path):
    """A copy to change."""
    subprocess.run(["cp", "-r", finished, tmp_path / "first"], check=True)
    return tmp_path / "first"


@pytest.fixture
def mola_log(caplog):
    caplog.set_level(logging.INFO, logger="mola")
    return caplog


# ---------------------------------------------------------------------- what it says


def test_the_card_describes_the_run(finished, rows_file):
    card = ModelCard.load(finished / "README.md")
    assert card.data.library_name == "peft"
    assert "mola" in card.data.tags
    assert card.data.license is None
    record = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    assert f"| mean training loss | {record['metrics']['train_loss']:.4f} |" in card.text
    assert f"| evaluation loss | {record['metrics']['eval_loss']:.4f} |" in card.text
    assert record["data_fingerprints"]["train"] in card.text
    assert f"| train | {record['data']['train']['kept']} |" in card.text
    assert "Accuracy was not measured" in card.text
    for name, version in record["versions"].items():
        assert f"| {name} | {version} |" in card.text
    assert f"mola train --base_model={record['settings']['base_model']} --data={rows_file}" in card.text
    pytest.importorskip("matplotlib")
    assert f"({PLOT_FILE})" in card.text
    assert (finished / PLOT_FILE).read_bytes().startswith(b"\x89PNG")


def test_the_table_counts_the_saved_values(finished):
    """Per layer and in all; by hand: attention 4 linears, MLP 3, of hidden 32, key/value 16 and 48."""
    ranks = sum(a + b for a, b in [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)])
    inputs = 6 * 32 + 48
    rows = re.findall(
        r"^\| ([\d–]+) \| (\d+) \| (\d+) \| 2 \| ([\d,]+) \| ([\d,]+) \|$",
        ModelCard.load(finished / "README.md").text,
        re.M,
    )
    numbers = [(name, *(int(value.replace(",", "")) for value in values)) for name, *values in rows]
    assert numbers == [
        ("0", 1, 1, 2 * ranks, 0),
        ("1–2", 2, 2, 2 * 2 * ranks, 2 * inputs),
        ("3", 4, 2, 4 * 2 * ranks, 4 * inputs),
    ]


def test_partly_adapted_layers_and_an_expression_as_target(flags, tmp_path):
    folder = tmp_path / 'a "run"'
    targets = r".*\.layers\.[02]\..*\.(q_proj|v_proj)"
    assert main(flags(folder, num_experts="3,", target_modules=targets)) == 0
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| ([\d–]+) \| 3 \| 2 \| 2 ", text, re.M) == ["0", "2"]
    assert f"Adapted modules: `{targets}`." in text
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
        compile(block, "README.md", "exec")
    allocation = json.loads((folder / "run.json").read_text(encoding="utf-8"))["allocation"]
    assert (allocation["num_layers"], allocation["num_experts"]) == (2, 6)


def test_local_paths_are_not_in_the_front_matter(finished, tmp_path, monkeypatch):
    record = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    record["settings"].update(base_model="./models/base", data="data/rows.json")
    monkeypatch.chdir(tmp_path)  # not where the run was
    card = ModelCard(render_card(finished, record))
    assert (card.data.base_model, card.data.datasets) == (None, None)


def test_the_code_on_the_card_loads_the_adapter(finished):
    blocks = re.findall(r"^```python\n(.*?)^```$", (finished / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 2
    ids, logits = torch.tensor([[3, 4, 5, 6]]), []
    for block in blocks:
        names = {}
        exec(block, names)
        with torch.no_grad():
            logits.append(names["model"].eval()(input_ids=ids).logits)
    assert "tokenizer" in {name for block in blocks for name in re.findall(r"^(\w+) =", block, re.M)}
    base = AutoModelForCausalLM.from_pretrained(names["base"].config._name_or_path)
    with torch.no_grad():
        without = base(input_ids=ids).logits
    assert torch.equal(*logits)
    assert not torch.allclose(logits[0], without)


@pytest.mark.slow
def test_auto_class_loads_in_a_new_process(finished):
    code = (
        "import sys, mola\nfrom peft import AutoPeftModelForCausalLM\n"
        "print(type(AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).peft_config['default']).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, finished], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "MolaConfig"


def test_names_of_the_hub_are_in_the_front_matter(finished):
    record = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    record["settings"].update(base_model="someone/model", data="someone/data")
    record["repository"] = "me/adapter"
    card = ModelCard(render_card(finished, record))
    assert card.data.base_model == "someone/model"
    assert card.data.datasets == ["someone/data"]
    assert 'from_pretrained("me/adapter")' in card.text
    assert card.text.strip().startswith("# adapter")


def test_accuracy_is_added_afterwards(run_folder, tmp_path):
    result = {
        "accuracy": 0.75,
        "total": 40,
        "interval_95": [0.6, 0.86],
        "settings": {"task": "sample", "data": "a|b.json", "scoring": "generate"},
    }
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result), encoding="utf-8")
    assert write_model_card(run_folder, [file]) == run_folder / "README.md"
    text = ModelCard.load(run_folder / "README.md").text
    row = "sample, 40 samples of `a\\|b.json` | 75.0% | 60.0% to 86.0%, scoring generate |"
    assert f"| accuracy, base model alone, {row}" in text
    assert "not measured" not in text
    result["settings"]["adapter"] = "runs/first/"
    file.write_text(json.dumps(result), encoding="utf-8")
    write_model_card(run_folder, [file])
    assert f"| accuracy, with `first`, {row}" in ModelCard.load(run_folder / "README.md").text
    free = {"loss": 1.5, "perplexity": 4.48, "total": 9, "interval_95": [1.25, 1.75], "settings": {"data": "b.jsonl"}}
    file.write_text(json.dumps(free), encoding="utf-8")
    write_model_card(run_folder, [file])
    row = "| loss per token (nats), base model alone, 9 samples of `b.jsonl` | 1.5000 | 1.2500 to 1.7500 |"
    assert row in ModelCard.load(run_folder / "README.md").text


def test_the_code_on_the_card_loads_the_base_as_the_run_did(finished):
    record = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    record["repository"] = "me/adapter"
    record["settings"].update(base_model="base", trust_remote_code=True, hub_revision="trial")
    text = render_card(finished, record)
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/adapter", revision="trial", trust_remote_code=True)' in text
    assert 'AutoModelForCausalLM.from_pretrained("base", trust_remote_code=True)' in text
    assert 'PeftModel.from_pretrained(base, "me/adapter", revision="trial")' in text
    record["settings"].update(trust_remote_code=False, hub_revision=None, gguf_file="model.Q4_1.gguf")
    text = render_card(finished, record)
    assert "AutoPeftModel" not in text  # which cannot be told the file
    assert 'AutoModelForCausalLM.from_pretrained("base", gguf_file="model.Q4_1.gguf")' in text


def test_the_card_names_the_launcher(finished):
    record = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    assert "processes" not in render_card(finished, record)
    text = render_card(finished, {**record, "processes": 2})
    assert "| processes | 2 |" in text
    assert "Started in 2 processes by a launcher such as torchrun; each ran:" in text


@pytest.mark.parametrize("content", ["{}", None])
def test_other_files_are_refused_as_results(run_folder, tmp_path, content):
    file = tmp_path / "result.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    before = (run_folder / "README.md").read_bytes()
    with pytest.raises(MolaError, match="`results`.*result.json"):
        write_model_card(run_folder, [file])
    assert (run_folder / "README.md").read_bytes() == before


def test_a_folder_without_a_run_gets_no_card(tmp_path):
    with pytest.raises(MolaError, match="`folder`"):
        write_model_card(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_card_says_so(run_folder, monkeypatch):
    (run_folder / PLOT_FILE).write_bytes(b"of an earlier card")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    write_model_card(run_folder)
    assert "mola-peft[plot]" in (run_folder / "README.md").read_text(encoding="utf-8")
    assert not (run_folder / PLOT_FILE).exists()


def test_a_broken_matplotlib_does_not_end_a_training(run_folder, monkeypatch, mola_log):
    """As one that was made for another numpy."""

    def fail(name):
        raise ImportError("numpy.core.multiarray failed to import")

    monkeypatch.setattr("mola.reporting.model_card.importlib.import_module", fail)
    write_model_card(run_folder)
    assert not (run_folder / PLOT_FILE).exists()
    assert "matplotlib cannot be used: numpy.core.multiarray failed to import" in mola_log.text


# ---------------------------------------------------------------------- whose it is


def test_a_changed_card_is_kept(run_folder, flags, mola_log):
    path = run_folder / "README.md"
    assert is_own_file(path)
    path.write_text(path.read_text(encoding="utf-8").replace("## Use", "## How I use it"), encoding="utf-8")
    changed = path.read_bytes()
    assert write_model_card(run_folder) is None
    assert "README.md was not written by mola, or was changed since. It is kept" in mola_log.text
    # Nor by a new run in the folder.
    assert main([*flags(run_folder), "--overwrite"]) == 0
    assert path.read_bytes() == changed


def test_own_card_is_replaced_by_that_of_a_new_run(run_folder, flags):
    assert main([*flags(run_folder, num_experts="2222"), "--overwrite"]) == 0
    text = (run_folder / "README.md").read_text(encoding="utf-8")
    assert "| 0–3 | 2 | 2 | 2 |" in text
    assert is_own_file(run_folder / "README.md")


def test_peft_saving_into_the_folder_leaves_a_valid_card(run_folder):
    model = AutoPeftModelForCausalLM.from_pretrained(run_folder)
    assert isinstance(model, PeftModel)
    model.save_pretrained(run_folder)
    card = ModelCard.load(run_folder / "README.md")
    assert card.data.library_name == "peft"
    assert "## Experts" in card.text


# ---------------------------------------------------------------------- uploading


class Hub(BaseHTTPRequestHandler):
    """The calls that making a repository and one commit need, as the hub answers them."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.calls.append((self.path, self.headers["Authorization"], body))
        if self.path == self.server.broken:
            self.answer(403, {"error": "You may not do this"})
        elif self.path == "/api/repos/create":
            self.answer(200, {"url": f"{self.server.address}/me/{json.loads(body)['name'].rpartition('/')[2]}"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif "/commit/" in self.path:
            self.answer(200, {"commitUrl": f"{self.server.address}/me/adapter/commit/abc", "commitOid": "abc"})
        else:
            self.answer(404, {"error": f"unexpected {self.path}"})

    def do_GET(self):
        self.server.calls.append((self.path, self.headers["Authorization"], b""))
        self.answer(403 if self.server.broken else 404, {"error": "nothing here"})

    def answer(self, status, content):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        """Silent."""


@pytest.fixture
def local_hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls, server.broken = [], None
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def error_of(capsys):
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("mola train: error: ")
    return line


@pytest.fixture
def use_hub(monkeypatch):
    """The hub's client of this process calls an address, with a token."""

    def use(address):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # a client of an earlier address
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    return use


@pytest.mark.slow
def test_finished_run_is_uploaded_in_one_commit(flags, local_hub, tmp_path):
    """In a process of its own, with the hub's address and the token as a user gives them."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": local_hub.address, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    arguments = flags(tmp_path / "run", push_to_hub="true", hub_token=TOKEN, hub_model_id="me/adapter")
    done = subprocess.run(
        [sys.executable, "-m", "mola.cli", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    created = [json.loads(body) for path, _, body in local_hub.calls if path == "/api/repos/create"]
    assert [(call["name"], call.get("organization")) for call in created] == [("adapter", "me")]
    commits = [body for path, _, body in local_hub.calls if path == "/api/models/me/adapter/commit/main"]
    assert len(commits) == 1
    own = ("/api/repos/", "/api/models/", "/api/validate-yaml")  # the client also asks what it needs no token for
    assert {token for path, token, _ in local_hub.calls if path.startswith(own)} == {f"Bearer {TOKEN}"}
    lines = [json.loads(line) for line in commits[0].splitlines()]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    folder = tmp_path / "run"
    expected = {"adapter_config.json", "adapter_model.safetensors", "README.md", "run.json"}
    expected |= {"metrics.jsonl", "routing.jsonl"}
    expected |= {"tokenizer.json", "tokenizer_config.json"} | ({PLOT_FILE} if (folder / PLOT_FILE).exists() else set())
    assert set(files) == expected
    assert [name for name in files if files[name] != (folder / name).read_bytes()] == []
    assert b'from_pretrained("me/adapter")' in files["README.md"]
    record = json.loads(files["run.json"])
    assert (record["status"], record["repository"]) == ("finished", "me/adapter")
    # The token was a flag: whoever reads the files must not find it.
    assert [name for name in files if TOKEN.encode() in files[name]] == []


def test_failed_upload_keeps_the_run(flags, local_hub, use_hub, tmp_path, capsys):
    local_hub.broken = "/api/models/me/run/commit/main"
    use_hub(local_hub.address)
    assert main(flags(tmp_path / "run", push_to_hub="true")) == 2
    assert "403" in error_of(capsys)
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


class SignalInTheFirstStep(TrainerCallback):
    """Ctrl-C while a run trains."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            signal.raise_signal(signal.SIGINT)


def test_only_the_finished_run_is_uploaded(flags, local_hub, use_hub, tmp_path, caplog):
    use_hub(local_hub.address)
    asked = {"push_to_hub": "true", "hub_private_repo": "true", "hub_revision": "trial"}
    command = flags(tmp_path / "run", **asked)
    stopped = train(parse(TrainOptions, command[1:], prog="mola train"), callbacks=[SignalInTheFirstStep()])
    assert (stopped.status, stopped.steps) == ("interrupted", 1)
    assert "Not uploaded to me/run: the run is not finished" in caplog.text
    made = [json.loads(body) for path, _, body in local_hub.calls if path == "/api/repos/create"]
    assert [call.get("private") or call.get("visibility") for call in made] in ([True], ["private"])
    assert not any("/commit/" in path for path, *_ in local_hub.calls)
    assert main([*command, "--resume_from_checkpoint", "last"]) == 0
    commits = [path for path, *_ in local_hub.calls if "/commit/" in path]
    assert commits == ["/api/models/me/run/commit/trial"]
    assert 'from_pretrained("me/run", revision="trial")' in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_a_run_is_uploaded_at_its_end_only(flags, tmp_path, capsys):
    assert main(flags(tmp_path / "run", push_to_hub="true", hub_strategy="every_save")) == 2
    assert "`hub_strategy` must be end: got every_save" in error_of(capsys)
    assert not (tmp_path / "run").exists()


def test_token_is_masked_wherever_it_stands():
    command = ["mola", "train", f"--hub_token={TOKEN}", TOKEN, "x"]
    assert without_token(command, TOKEN) == ["mola", "train", "--hub_token=<HUB_TOKEN>", "<HUB_TOKEN>", "x"]
    assert without_token(command, None) == command
