"""The files of a skills folder: the same bytes in any order, old or new when killed, one clear line when wrong."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mola.checkpoints.plain_lora import check_plain_lora, describe_lora
from mola.checkpoints.skills_folder import (
    SkillEntry,
    SkillsFolder,
    add_entry,
    copy_lora,
    locked,
    merge_folders,
    read_skills,
    remove_entry,
    write_skills,
)
from mola.errors import MolaError
from mola.files.digests import file_sha256
from tests.damage import WEIGHTS, change_settings, cut_off, flip_bit
from tests.grids import slow

NAMES = "birds", "rivers", "tools"


def make_lora(folder: Path, seed: int, **settings) -> Path:
    """A LoRA of the layers 2 and 3, without a model."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    modules = [f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in (2, 3)]
    shapes = {"A": (2, 8), "B": (8, 2)}
    tensors = {
        f"{module}.lora_{part}.weight": torch.randn(shape, generator=draw)
        for module in modules
        for part, shape in shapes.items()
    }
    save_file(tensors, folder / WEIGHTS)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return {name: make_lora(folder / name, seed) for seed, name in enumerate(NAMES)}


def empty(path: Path) -> SkillsFolder:
    return SkillsFolder(path, "my-model", "0" * 64, 2, 0.5, 0.02, {}, {"mean": torch.arange(8.0)}, {})


def with_skill(folder: SkillsFolder, lora: Path) -> SkillsFolder:
    entry = SkillEntry(file_sha256(lora / WEIGHTS), "", 2, 10)
    return add_entry(folder, lora.name, entry, {"mean": torch.full((8,), float(len(lora.name)))})


def add(path: Path, lora: Path) -> None:
    folder = read_skills(path) if path.exists() else empty(path)
    write_skills(with_skill(folder, lora), {lora.name: lora}, copy_lora)


def content(path: Path) -> dict[str, bytes]:
    """Name -> bytes of the files, without those of commands that were killed."""
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(name): file.read_bytes() for file in files if (name := file.relative_to(path)).parts[0][0] != "."}


@pytest.fixture
def folder(tmp_path, loras):
    for name in NAMES[:2]:
        add(tmp_path / "skills", loras[name])
    return tmp_path / "skills"


def test_any_order_gives_the_same_bytes_and_removing_those_of_never_having_added(tmp_path, loras):
    for number, order in enumerate([(0, 1, 2), (2, 0, 1), (1, 2, 0)]):
        for index in order:
            add(tmp_path / str(number), loras[NAMES[index]])
    assert content(tmp_path / "0") == content(tmp_path / "1") == content(tmp_path / "2")
    for name in NAMES[:2]:
        add(tmp_path / "never", loras[name])
    write_skills(remove_entry(read_skills(tmp_path / "0"), "tools"), {}, copy_lora)
    assert content(tmp_path / "0") == content(tmp_path / "never")
    with pytest.raises(MolaError, match="is the only skill"):
        remove_entry(remove_entry(read_skills(tmp_path / "0"), "birds"), "rivers")


def test_what_was_written_is_read(folder, loras):
    found = read_skills(folder)
    assert (found.names, found.layer, found.threshold, found.reject_rate) == (["birds", "rivers"], 2, 0.5, 0.02)
    assert found.general["mean"].tolist() == torch.arange(8.0).tolist()
    assert found.statistics["rivers"]["mean"].tolist() == [6.0] * 8
    tensors = load_file(folder / "birds" / WEIGHTS)
    assert describe_lora({name: each.shape for name, each in tensors.items()}, folder) == (2, [2, 3])
    assert (folder / "birds" / WEIGHTS).read_bytes() == (loras["birds"] / WEIGHTS).read_bytes()


def killed(work, step: int) -> bool:
    """Do some work in a process that is killed before its change number `step` to a file system; False if it ends."""
    process = os.fork()
    if process == 0:
        changes = 0

        def hook(event, arguments):
            nonlocal changes
            is_write = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa")
            if is_write or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
                changes += 1
                if changes > step:
                    os._exit(9)

        sys.addaudithook(hook)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("change", ["add", *slow("create", "remove")])
def test_killed_at_any_step_it_is_the_old_or_the_new_folder_and_again_gives_the_new_one(
    change, tmp_path, loras, monkeypatch
):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and of no use here
    old = tmp_path / "old"
    for name in NAMES[: {"create": 0, "add": 2, "remove": 3}[change]]:
        add(old, loras[name])

    def work(path):
        if change == "remove":
            write_skills(remove_entry(read_skills(path), "rivers"), {}, copy_lora)
        else:
            add(path, loras["tools"])

    def names(path):
        return read_skills(path).names if path.exists() else []

    def copy_of_old(path):
        for name in names(old):
            add(path, loras[name])
        return path

    work(copy_of_old(new := tmp_path / "new"))
    seen, step = [], 0
    while killed(lambda: work(path), step) if (path := copy_of_old(tmp_path / f"at {step}")) else False:
        seen.append(names(path))
        assert seen[-1] in (names(old), names(new))
        for name in seen[-1]:
            assert file_sha256(path / name / WEIGHTS) == read_skills(path).skills[name].adapter_sha256
        if seen[-1] != names(new):
            work(path)
            assert content(path) == content(new)
        step += 1
    assert content(path) == content(new)
    assert names(old) in seen  # killed before and
    assert step > 3
    if change == "remove":
        assert names(new) in seen  # after the file that counts


def test_merged_with_another_folder(tmp_path, folder, loras):
    for name in NAMES[1:]:
        add(tmp_path / "other", loras[name])
    new, adapters = merge_folders(read_skills(folder), read_skills(tmp_path / "other"))
    assert list(adapters) == ["tools"]  # the same `rivers` is in both
    write_skills(new, adapters, copy_lora)
    for name in NAMES:
        add(tmp_path / "all", loras[name])
    assert content(folder) == content(tmp_path / "all")
    other = read_skills(tmp_path / "other")
    with pytest.raises(MolaError, match="reads the input of layer 2, .* has 3"):
        merge_folders(new, replace(other, layer=3))
    with pytest.raises(MolaError, match="`base_model` must have the weights that .* was made on, those of 'my-model'"):
        merge_folders(new, replace(other, base_model="other-model", base_digest="1" * 64))
    entries = {**other.skills, "tools": replace(other.skills["tools"], rows=3)}
    with pytest.raises(MolaError, match="both folders have a skill 'tools', and they differ"):
        merge_folders(new, replace(other, skills=entries))


def test_other_weights_of_the_base_model_are_noticed(folder, caplog):
    skills = read_skills(folder)
    skills.check_base("anywhere", "0" * 64)
    with pytest.raises(MolaError, match="the weights of `base_model` '/models/my-model' have changed"):
        skills.check_base("/models/my-model", "1" * 64)
    assert not caplog.text
    skills.check_base("my-model", "my-model@commit")  # cannot be compared
    assert "results are meaningful only if" in caplog.text


def test_a_skill_is_replaced(folder, tmp_path):
    lora = make_lora(tmp_path / "birds", seed=9)
    add(folder, lora)
    assert (folder / "birds" / WEIGHTS).read_bytes() == (lora / WEIGHTS).read_bytes()
    assert read_skills(folder).names == ["birds", "rivers"]
    assert file_sha256(lora / WEIGHTS) == read_skills(folder).skills["birds"].adapter_sha256
    assert sorted(os.listdir(folder)) == ["birds", "rivers", "skills.json", "statistics.safetensors"]


def test_files_of_the_user_are_not_replaced(folder, loras):
    (folder / "tools").mkdir()
    (folder / "tools" / "notes.txt").write_text("mine")
    before = content(folder)
    with pytest.raises(MolaError, match="must be free for the skill: it holds notes.txt"):
        add(folder, loras["tools"])
    assert content(folder) == before
    assert sorted(os.listdir(folder)) == ["birds", "rivers", "skills.json", "statistics.safetensors", "tools"]


def test_two_commands_do_not_change_a_folder_at_once(folder):
    with locked(folder), pytest.raises(MolaError, match="another command is changing"), locked(folder):
        pass


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "skills.json").write_text("{"), "skills.json' is damaged"),
        (lambda folder: (folder / "skills.json").write_text('{"format": 1}'), "skills.json' is damaged: KeyError"),
        (lambda folder: (folder / "skills.json").write_text("[]"), "skills.json' is damaged"),
        (lambda folder: (folder / "skills.json").write_text('{"format": 2}'), "has format 2, .* Update mola"),
        (lambda folder: (folder / "skills.json").unlink(), "must be a skills folder: .*no skills.json in it"),
        (lambda folder: cut_off(folder / "statistics.safetensors", 0.5), "statistics.safetensors' is damaged"),
        (lambda folder: flip_bit(folder / "statistics.safetensors", -8 * 4), "the statistics of the skill 'rivers'"),
        (lambda folder: (folder / "statistics.safetensors").unlink(), "statistics.safetensors' is damaged: No such"),
        (lambda folder: (folder / "birds" / WEIGHTS).unlink(), "birds' is damaged: adapter_model.safetensors is miss"),
    ],
)
def test_damaged_files(damage, message, folder):
    damage(folder)
    with pytest.raises(MolaError, match=message) as raised:
        read_skills(folder)
    assert "\n" not in str(raised.value)


def test_unknown_names(folder):
    with pytest.raises(MolaError, match=r"no skill 'river' in .* Did you mean 'rivers'\? Its skills are birds, rivers"):
        read_skills(folder).adapter("river")


@pytest.mark.parametrize("name", ["", "base", "Base", "a.b", "a/b", "..", ".a", "a b", "x" * 101])
def test_names_that_no_skill_can_have(name, tmp_path):
    with pytest.raises(MolaError, match="a skill's name must be"):
        add_entry(empty(tmp_path), name, SkillEntry("", "", 2, 1), {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "MOLA"}, "has `peft_type` 'MOLA'.*convert --to lora"),
        ({"peft_type": "IA3"}, "must be a LoRA of PEFT"),
        ({"use_dora": True}, "`use_dora` is set .* DoRA scales the base weight"),
        ({"modules_to_save": ["lm_head"]}, "trained in full"),
        ({"bias": "all"}, "trained biases"),
        ({"lora_bias": True}, "its update has a bias"),
        ({"trainable_token_indices": [1]}, "tokens that are trained in full"),
        ({"target_parameters": ["experts"]}, "belong to no linear"),
        ({"init_lora_weights": "pissa"}, "changes the base weight"),
    ],
)
def test_adapters_that_cannot_be_skills(settings, message, tmp_path):
    lora = make_lora(tmp_path / "lora", 0)
    check_plain_lora(lora)
    change_settings(lora, **settings)
    with pytest.raises(MolaError, match=message):
        check_plain_lora(lora)


def test_embeddings_cannot_be_part_of_a_skill(tmp_path):
    with pytest.raises(MolaError, match="LoRA of linears: .* has the tensor '.*lora_embedding_A'"):
        describe_lora({"base_model.model.model.embed_tokens.lora_embedding_A": (2, 8)}, tmp_path)
