"""The `mola` command: flags, recipes, wrong input, exit codes; every command once on tiny data."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from mola import TrainOptions, __version__
from mola.cli import COMMANDS, find, main, run
from mola.data.options import PrepareOptions
from mola.errors import MolaError
from mola.exporting.options import ConvertOptions
from mola.generation.generate import GenerateOptions
from mola.models.plan import PlanOptions
from mola.options.fields import is_required, shown_name
from mola.options.parsing import parse, read_recipe
from mola.serving.serve import ServeOptions
from mola.studies.comparison.options import CompareOptions

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
LABELS = "ABC"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of data files and recipes, right and wrong ones."""
    folder = tmp_path_factory.mktemp("files")
    raw = [
        {"id": str(i), "question": f"What is {i}?", "choices": ["a", "b", "c"], "answer": i % 3, "hint": ""}
        for i in range(6)
    ]
    prepared = [
        {"id": str(i), "instruction": f"q{i}", "input": "", "output": f"Answer: The answer is {LABELS[i % 3]}."}
        for i in range(10)
    ]
    contents = {
        "raw.json": json.dumps(raw),
        "no_choices.json": json.dumps([{k: v for k, v in row.items() if k != "choices"} for row in raw]),
        "prepared.json": json.dumps(prepared),
        "unknown.json": json.dumps([{"ask": "Where do ferns grow?", "reply": "In shade."}]),
        "broken.json": '[{"a": 1},\n{"b": }]',
        "broken.jsonl": '{"a": 1}\n{"b": 2}\n{"c"\n',
        "typo.yaml": "learning_rat: 1",
        "broken.yaml": "a: [1\nb: }",
        "twice.yaml": "seed: 1\nseed: 2",
        "dashes.yaml": "learning_rate: 1\nlearning-rate: 2",
        "no_value.yaml": "learning_rate:",
        "empty.yaml": "",
    }
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def command(**options) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def options_of(name: str):
    return find(COMMANDS[name].options)


# ---------------------------------------------------------------------- wrong input of `mola train`

# What is changed in a correct command ({files} is the folder above, None leaves the option out), and what
# the message has to say.
WRONG = [
    ({"num_experts": "2,4,6"}, ["`num_experts`", "3 entries", "4 layers"]),
    ({"num_experts": "2468", "top_k": "4"}, ["`top_k`", "layer 0"]),
    *(
        ({name: value}, [f"`{name}` must", value])
        for name, value in (("r", "0"), ("top_k", "many"), ("num_experts", "1.5"))
    ),
    ({"target_modules": "q_prj"}, ["`target_modules`", "'q_prj'", "'q_proj'", "down_proj"]),
    ({"modules_to_save": "lm_head,nosuch"}, ["`modules_to_save`", "nosuch", "embed_tokens"]),
    ({"lora_dropout": 1.5}, ["`lora_dropout`", "1.5"]),
    ({"data": "{files}/nosuch.json"}, ["`data`", "nosuch.json", "does not exist"]),
    ({"data": None}, ["`data`", "--data"]),
    ({"data": "{files}/broken.json"}, ["broken.json", "line 2"]),
    ({"data": "{files}/broken.jsonl"}, ["broken.jsonl", "line 3"]),
    ({"data": "{files}/no_choices.json", "task": "scienceqa"}, ["no column `choices`", "question", "hint"]),
    ({"data": "{files}/unknown.json"}, ["`data`", "no known format", "ask, reply", "`task`"]),
    ({"task": "nosuch"}, ["`task`", "'nosuch'", "scienceqa"]),
    ({"template": "nosuch"}, ["`template`", "'nosuch'", "alpaca"]),
    ({"cutoff_len": 20}, ["`cutoff_len`", "168", "20"]),
    ({"cutoff_len": 2000}, ["`cutoff_len`", "2000", "1024"]),
    ({"cutoff_len": 0}, ["`cutoff_len`", "0"]),
    ({"truncation": "cut"}, ["`truncation`", "'cut'", "left"]),
    ({"limit": 0}, ["`limit`", "0"]),
    ({"output_dir": "{files}/raw.json/run"}, ["raw.json", "cannot be written"]),
    ({"output_dir": "{files}/raw.json"}, ["`output`", "is a file"]),
    ({"output_dir": "{files}"}, ["`output`", "must be empty", "--overwrite "]),
    ({"output_dir": None}, ["`output`", "--output DIR"]),
    ({"base_model": None}, ["`base_model`", "--base_model"]),
    ({"base_model": "{files}/nosuch"}, ["`base_model`", "nosuch"]),
    ({"base_model": "{files}"}, ["`base_model`", "config.json"]),
    ({"learning_rat": 1}, ["--learning_rat", "--learning_rate"]),
    ({"config": "{files}/typo.yaml"}, ["`learning_rat`", "typo.yaml", "`learning_rate`"]),
    ({"config": "{files}/nosuch.yaml"}, ["`config`", "nosuch.yaml"]),
    ({"config": "{files}"}, ["`config`", "cannot be read"]),
    ({"config": "{files}/broken.yaml"}, ["broken.yaml", "line 1"]),
    ({"config": "{files}/empty.yaml"}, ["must be a mapping", "None"]),
    ({"config": "{files}/twice.yaml"}, ["'seed'", "twice"]),
    ({"config": "{files}/dashes.yaml"}, ["`learning-rate`", "dashes.yaml", "twice"]),
    ({"config": "{files}/no_value.yaml"}, ["`learning_rate`", "needs a value"]),
    ({"adapter": "{files}", "num_experts": 2}, ["`adapter`", "`num_experts`"]),
    ({"adapter": "{files}"}, ["`adapter`", "adapter_config.json"]),
    ({"resume_from_checkpoint": "{files}/nosuch"}, ["`resume_from_checkpoint`", "nosuch", "does not exist"]),
    ({"resume_from_checkpoint": "{files}"}, ["`resume_from_checkpoint`", "adapter_config.json"]),
    ({"resume_from_checkpoint": "last"}, ["'last'", "no complete checkpoint"]),
    ({"warmup_steps": -1}, ["warmup_steps", "-1"]),
    ({"per_device_train_batch_size": 0}, ["`batch_size`", "0"]),
    ({"device": "gpu"}, ["`device`", "'gpu'"]),
    ({"device": "meta"}, ["`device`", "'meta'"]),
    ({"per_device_eval_batch_size": 0}, ["`per_device_eval_batch_size`", "0"]),
    ({"gradient_accumulation_steps": 0}, ["`gradient_accumulation_steps`", "0"]),
    ({"num_train_epochs": 0}, ["`num_train_epochs`", "0"]),
    ({"max_steps": 0}, ["`max_steps`", "0"]),
    ({"learning_rate": "nan"}, ["`learning_rate`", "nan"]),
    ({"logging_steps": "inf"}, ["`logging_steps`", "inf"]),
    ({"save_strategy": "steps", "save_steps": 0}, ["`save_steps`", "above 0"]),
    ({"eval_strategy": "steps", "eval_steps": "nan"}, ["`eval_steps`", "nan"]),
    ({"fp16_full_eval": "true"}, ["`fp16_full_eval`", "round the weights"]),
    ({"optim": "grokadamw"}, ["`optim` grokadamw cannot be made", "pip install grokadamw"]),
    (
        {"data": "{files}/raw.json", "task": "scienceqa", "train_split": "fold1"},
        ["`train_split` ('fold1')", "no splits"],
    ),
    ({"learning_rate": "fast"}, ["learning_rate", "'fast'"]),
    ({"dtype": "float8"}, ["`dtype`", "'float8'", "bfloat16"]),
    ({"save_strategy": "sometimes"}, ["sometimes", "epoch"]),
    ({"save_strategy": "steps"}, ["load_best_model_at_end", "EPOCH", "STEPS"]),
    ({"save_steps": 2}, ["`save_steps`", "--save_strategy steps"]),
    ({"eval_steps": 2}, ["`eval_steps`", "--eval_strategy steps"]),
    (
        {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 4},
        ["`load_best_model_at_end`", "`save_steps` is 4", "`eval_steps` 2"],
    ),
    ({"metric_for_best_model": "accuracy"}, ["`metric_for_best_model`", "'accuracy'"]),
    ({"validation_size": 10}, ["`validation_size`", "10"]),
    ({"validation_size": 1.5}, ["`validation_size`", "1.5"]),
    ({"validation_size": -1}, ["`validation_size`", "-1"]),
    ({"validation_size": 2, "eval_split": "test"}, ["`validation_size`", "2", "`eval_split`", "'test'"]),
    ({"validation_size": 2, "eval_data": "more.json"}, ["`validation_size`", "2", "`eval_data`", "more.json"]),
    ({"eval_split": "nosuch"}, ["`eval_split`", "'nosuch'"]),
    ({"lr_scheduler_type": "zigzag"}, ["SchedulerType", "zigzag", "cosine"]),
    ({"lr_scheduler_kwargs": '{"a":'}, ["JSON", '{"a":']),
    ({"liger_kernel_config": '{"a":'}, ["--liger_kernel_config", "JSON mapping", '{"a":']),
    ({"report_to": "nosuch"}, ["`report_to`", "nosuch"]),
    ({"train_on_inputs": "maybe"}, ["train_on_inputs", "maybe"]),
    ({"eval_limit": 0}, ["`eval_limit`", "0"]),
    ({"save_strategy": "best", "eval_strategy": "no"}, ["`save_strategy` best", "`eval_strategy` is no"]),
    ({"bf16_full_eval": "true"}, ["`bf16_full_eval`", "round the weights"]),
    ({"optim": "galore_adamw", "optim_target_modules": "all-linear"}, ["`optim` galore_adamw", "Pass a different"]),
    ({"accelerator_config": "nowhere.json"}, ["nowhere.json"]),
    ({"label_smoothing_factor": 10}, ["`label_smoothing_factor`", "10"]),
    (
        {"label_smoothing_factor": 0.1, "router_aux_loss_coef": 0.5},
        ["`label_smoothing_factor` (0.1)", "`router_aux_loss_coef` (0.5)"],
    ),
    ({"dataloader_drop_last": "true", "per_device_train_batch_size": 11}, ["`dataloader_drop_last`", "all 10 samples"]),
]


@pytest.mark.parametrize(("changes", "parts"), WRONG, ids=lambda value: str(value)[:60] if type(value) is dict else "")
def test_train_refuses_wrong_input_before_weights_load(changes, parts, files, no_weights_dir, tmp_path, capsys):
    options = {
        "base_model": no_weights_dir,
        "data": files / "prepared.json",
        "output_dir": tmp_path / "run",
        "dtype": "float32",
        **{k: v.replace("{files}", str(files)) if isinstance(v, str) else v for k, v in changes.items()},
    }
    assert main(["train", *command(**options)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("mola train: error: ")
    assert "no file named model.safetensors" not in line, "the weights were asked for"
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["stray"], "'stray' belongs to no flag"),
        (["--r"], "expected one argument"),
        (["--batch_size"], "argument --batch_size: expected one argument"),
        (["--config"], "argument --config: expected one argument"),
        (["--config", "a.yaml", "--config=b.yaml"], "`--config` must be given once: got a.yaml, b.yaml"),
        (["--learning_r", "1"], "no flag --learning_r."),
        (["--outptu_dir=x"], "no flag --outptu_dir. Did you mean --output"),
        (["--lora_r", "8"], "there is no flag --lora_r: mola calls it --r."),
        (["--max-seq-length=8"], "there is no flag --max-seq-length: mola calls it --cutoff_len."),
        (["--model", "x"], "mola calls it --base_model."),
    ],
)
def test_train_refuses_stray_words_and_unknown_flags(words, part, capsys):
    assert main(["train", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mola train: error: ")
    assert part in line


def test_a_launcher_that_contradicts_the_dtype_is_refused(files, no_weights_dir, tmp_path, capsys, monkeypatch):
    options = {"base_model": no_weights_dir, "data": files / "prepared.json", "output_dir": tmp_path / "run"}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert main(["train", *command(**options, dtype="float32")]) == 2
    assert "`dtype` float32 and the launcher's `mixed_precision` bf16" in capsys.readouterr().err
    for value in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)
        assert main(["train", *command(**options, dtype="bfloat16", template="nosuch")]) == 2
        assert "`template`" in capsys.readouterr().err


def test_float16_is_refused_on_a_cpu(files, no_weights_dir, tmp_path, capsys):
    arguments = command(
        base_model=no_weights_dir,
        data=files / "prepared.json",
        output_dir=tmp_path / "run",
        dtype="float16",
        use_cpu="true",
    )
    assert main(["train", *arguments]) == 2
    assert "bfloat16 or float32" in capsys.readouterr().err


def test_messages_of_libraries_become_one_line(no_weights_dir, files, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "nosuch"}', encoding="utf-8")
    assert main(["plan", *command(base_model=tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# ---------------------------------------------------------------------- flags and recipes


def parse_train(*arguments: str) -> TrainOptions:
    return parse(TrainOptions, ["--output_dir", "run", "--dtype", "float32", *arguments], prog="mola train")


@pytest.mark.parametrize("words", ["--train_on_inputs=False", "--train-on-inputs=no", "--train_on_inputs 0"])
def test_false_is_false(words):
    assert parse_train(*words.split()).train_on_inputs is False
    assert parse_train("--train_on_inputs").train_on_inputs is True


def test_flags_and_recipes_have_the_names_of_the_help_text(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("overwrite: true\noutput: a\nbatch_size: 2\n")
    options = parse(TrainOptions, ["--config", str(recipe), "--device=cpu"], prog="mola train")
    assert (options.output_dir, options.overwrite_output_dir, options.per_device_train_batch_size) == ("a", True, 2)
    assert options.use_cpu
    assert parse(ServeOptions, ["--base_model=m", "--max-new-tokens", "9"], prog="mola serve").max_tokens == 9


def test_commands_that_train_keep_the_names_of_the_trainer(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: a\nper_device_train_batch_size: 2\n")
    options = parse(TrainOptions, ["--config", str(recipe)], prog="mola train")
    assert (options.output_dir, options.per_device_train_batch_size) == ("a", 2)
    recipe.write_text("output_dir: a\noutput: b")
    with pytest.raises(MolaError, match="`output` is in .* twice, in two spellings"):
        parse(TrainOptions, ["--config", str(recipe)], prog="mola train")


@pytest.mark.parametrize(
    ("options", "old", "new"),
    [
        (TrainOptions, "overwrite_output_dir", "overwrite"),
        (PrepareOptions, "output_dir", "output"),
        (ServeOptions, "max_tokens", "max_new_tokens"),
        (ConvertOptions, "rank", "r"),
        (ConvertOptions, "source_format", "from"),
        (ConvertOptions, "target_format", "to"),
    ],
)
def test_a_name_from_before_1_0_is_answered_with_the_new_one(options, old, new, tmp_path):
    with pytest.raises(MolaError, match=f"there is no flag --{old}: mola calls it --{new}"):
        parse(options, [f"--{old}=2"], prog="mola")
    (tmp_path / "recipe.yaml").write_text(f"{old}: 2")
    with pytest.raises(MolaError, match=f"`{old}` in .* is no option of this command. mola calls it `{new}`"):
        parse(options, ["--config", str(tmp_path / "recipe.yaml")], prog="mola")


def test_dashes_and_underscores_are_the_same():
    options = parse_train("--learning-rate", "0.5", "--num-experts=8642", "--save-total-limit", "7")
    assert (options.learning_rate, options.num_experts, options.save_total_limit) == (0.5, "8642", 7)


def test_recipe_values_of_every_kind(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """
        num_experts: [2, 4, 6, 8]
        r: 4
        target_modules: [q_proj, v_proj]
        label_names: [labels]
        report-to: [none]
        train_on_inputs: true
        add_eos_token: no
        eval_strategy: no
        save_strategy: no
        save_total_limit: null
        learning_rate: 1e-4
        lr_scheduler_type: cosine_with_min_lr
        lr_scheduler_kwargs: {min_lr: 1e-5}
        liger_kernel_config: {rope: true}
        router_aux_loss_coef: 1.0e-3
        """,
        encoding="utf-8",
    )
    options = parse_train("--config", str(recipe))
    assert (options.num_experts, options.r, options.target_modules) == ("2,4,6,8", "4", "q_proj,v_proj")
    assert (options.label_names, options.report_to) == (["labels"], [])
    assert (options.train_on_inputs, options.add_eos_token) == (True, False)
    assert (options.eval_strategy, options.save_strategy, options.load_best_model_at_end) == ("no", "no", False)
    assert options.keeps_one
    assert (options.learning_rate, options.router_aux_loss_coef) == (1e-4, 1e-3)
    assert options.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert options.liger_kernel_config == {"rope": True}


@pytest.mark.parametrize("first", ["recipe", "flag"])
def test_flags_win_over_the_recipe(tmp_path, first):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 1\nnum_experts: '8642'\ntrain_on_inputs: true\n", encoding="utf-8")
    flags = ["--seed=2", "--train_on_inputs=false"]
    config = [f"--config={recipe}"]
    options = parse_train(*(config + flags if first == "recipe" else flags + config))
    assert (options.seed, options.num_experts, options.train_on_inputs) == (2, "8642", False)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, text) for text in ("no", "1e-4", "007", "2468", "True")),
        *[("'~'", "~"), ("~", None), ("[1, no]", ["1", "no"])],
        ("{a: 1e-4, b: no, c: true}", {"a": 1e-4, "b": "no", "c": True}),
    ],
)
def test_values_of_a_recipe_stay_as_written_except_in_mappings(tmp_path, text, value):
    (tmp_path / "r.yaml").write_text(f"key: {text}", encoding="utf-8")
    assert read_recipe(tmp_path / "r.yaml")["key"] == value


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("first: &mix {r: 8, top_k: 2}\nlast: {<<: *mix, r: 4}", {"r": 4, "top_k": 2}),
        ("first: &mix {<<: {r: 1, top_k: 2}, r: 8}\nlast: {r: 4, <<: *mix}", {"r": 4, "top_k": 2}),
        ("first: &a {r: 8}\nsecond: &b {r: 2, top_k: 2}\nlast: {<<: [*a, *b]}", {"r": 8, "top_k": 2}),
    ],
)
def test_a_key_beside_a_reference_replaces_the_one_referred_to(tmp_path, text, last):
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    assert read_recipe(tmp_path / "r.yaml")["last"] == last


def test_a_repeated_key_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("first: &mix {r: 8, r: 4}\nlast: {<<: *mix}", encoding="utf-8")
    with pytest.raises(MolaError, match="occurs twice"):
        read_recipe(tmp_path / "r.yaml")


def test_a_tilde_is_the_home_folder_in_flags_and_recipes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("base_model: ~/model\ndata: test=~/a.json\noutput_dir: ~/runs/first\n")
    options = parse(TrainOptions, ["--config=~/recipe.yaml", "--adapter=~/old"], prog="mola train")
    assert options.base_model == f"{tmp_path}/model"
    assert options.data == f"test={tmp_path}/a.json"
    assert options.output_dir == f"{tmp_path}/runs/first"
    assert options.adapter == f"{tmp_path}/old"
    words = ["--base_model=~/model", "--instruction=~/ is home", "--num_experts=~"]
    assert parse(GenerateOptions, words[:2], prog="mola generate").instruction == "~/ is home"
    assert parse(PlanOptions, [words[0], words[2]], prog="mola plan").num_experts == "~"


def test_a_list_is_given_once(tmp_path):
    with pytest.raises(
        MolaError, match="`seeds` must be given once, with all its values after it: got a second --seeds"
    ):
        parse(CompareOptions, ["--seeds", "0", "--seeds=1"], prog="mola compare")
    with pytest.raises(MolaError, match="`source` must be given once"):
        parse(ConvertOptions, ["a", "--source", "b"], prog="mola convert", positional="source")
    words = ["--base_model", "m", "--adapter", "a", "--adapter", "b"]
    assert parse(ServeOptions, words, prog="mola serve").adapter == ["a", "b"]


def test_a_stray_word_is_not_added_to_a_list_of_a_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seeds: [0, 1]\n")
    with pytest.raises(MolaError, match="'7' belongs to no flag"):
        parse(CompareOptions, ["--config", str(tmp_path / "recipe.yaml"), "7"], prog="mola compare")


def test_the_type_of_an_option_decides_what_a_number_of_a_recipe_means(tmp_path):
    text = "output_dir: 007\nrun_name: 12:30\nlearning_rate: 3e-4\nmax_steps: 010\nnum_experts: [16]\nr: [4, 8]\n"
    (tmp_path / "recipe.yaml").write_text(text)
    options = parse(TrainOptions, ["--config", str(tmp_path / "recipe.yaml")], prog="mola train")
    assert (options.output_dir, options.run_name) == ("007", "12:30")
    assert (options.learning_rate, options.max_steps) == (3e-4, 10)
    assert (options.num_experts, options.r) == ("16,", "4,8")


def test_names_of_other_programs_are_answered_only_where_the_command_has_the_option(tmp_path):
    for command, said in ((GenerateOptions, "mola calls it --max_new_tokens."), (PrepareOptions, "Run the command")):
        with pytest.raises(MolaError, match=f"no flag --max_length.*{re.escape(said)}"):
            parse(command, ["--max_length", "8"], prog="mola")
    (tmp_path / "recipe.yaml").write_text("lr: 1e-4")
    with pytest.raises(MolaError, match="`lr` in .* mola calls it `learning_rate`"):
        parse(TrainOptions, ["--config", str(tmp_path / "recipe.yaml")], prog="mola train")


@pytest.mark.parametrize("name", [name for name, each in COMMANDS.items() if each.positional and not each.further])
def test_first_word_and_its_flag_are_the_same(name):
    positional, options = COMMANDS[name].positional, options_of(name)
    required = {"base_model", *(shown_name(each) for each in fields(options) if is_required(each))}
    names = {shown_name(each) for each in fields(options)}
    others = command(**dict.fromkeys(required & names - {positional}, "2"))
    by_word = parse(options, ["runs/first", *others], prog=name, positional=positional)
    assert by_word == parse(options, [f"--{positional}=runs/first", *others], prog=name, positional=positional)


@pytest.mark.parametrize(
    "name", ["train", "evaluate", "lm-eval", "generate", "serve", "allocate", "inspect", "merge", "demo"]
)
def test_the_base_model_is_the_one_that_the_adapter_records(name, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    required = {"train": ["output_dir"]}.get(
        name, [each.name for each in fields(options_of(name)) if is_required(each)]
    )
    words = command(adapter=tmp_path, **dict.fromkeys({*required} - {"adapter"}, "2"))
    assert parse(options_of(name), words, prog=name).base_model == "owner/base"
    assert parse(options_of(name), [*words, "--base_model=other"], prog=name).base_model == "other"


def test_a_first_word_and_its_flag_add_up_in_serve_only():
    words = ["a", "b", "--base_model", "m", "--adapter", "c=d"]
    assert parse(ServeOptions, words, prog="mola serve", positional="adapter").adapter == ["a", "b", "c=d"]
    with pytest.raises(MolaError, match="`adapter` must be given once: got the first word 'a' and a flag too"):
        parse(GenerateOptions, ["a", "--base_model", "m", "--adapter=b"], prog="mola", positional="adapter")


def test_first_word_of_prepare_is_its_task():
    options = parse(PrepareOptions, ["sample", "--output", "x"], prog="mola prepare", positional="task")
    assert (options.task, options.output_dir) == ("sample", "x")
    with pytest.raises(MolaError, match="task"):
        parse(PrepareOptions, ["--output", "x"], prog="mola prepare", positional="task")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipe_fits_the_command_on_its_first_line(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    first = recipe.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# mola "), "the first line has to name the command"
    _, _, name, *arguments = shlex.split(first)
    assert f"recipes/{recipe.name}" in arguments or f"--config=recipes/{recipe.name}" in arguments
    options = parse(options_of(name), arguments, prog=name, positional=COMMANDS[name].positional)
    names = {shown_name(each): each.name for each in fields(options)}
    for key, value in yaml.safe_load(recipe.read_text(encoding="utf-8")).items():
        read = getattr(options, names.get(key, key))
        if isinstance(value, str):
            assert str(getattr(read, "value", read)) == value
        elif isinstance(value, (int, float)):
            assert float(read) == value


# ---------------------------------------------------------------------- the command itself


def test_usage_names_every_command(capsys):
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert main([]) == 2
    assert capsys.readouterr().out == usage
    assert all(f"  {name.split()[0]} " in usage for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mola {__version__}\n"


@pytest.mark.parametrize(("word", "meant"), [("trian", "train"), ("finetune", "train"), ("Evaluate", "evaluate")])
def test_a_wrong_command_is_answered_with_the_one_meant(word, meant, capsys):
    assert main([word]) == 2
    assert f"mola: error: there is no command '{word}'. Did you mean `{meant}`? The" in capsys.readouterr().err


def test_unknown_command(capsys):
    assert main(["nosuch"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mola: error: ")
    assert "'nosuch'" in line
    assert "train" in line


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name, capsys):
    with pytest.raises(SystemExit) as stop:
        run(name, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    words = {"run_dir": "RUN ", "task": "TASK ", "source": "SOURCE ... "}
    words |= {"folder": "FOLDER "}
    further = {"skills add": "NAME=ADAPTER ... ", "skills remove": "NAME ... ", "skills merge": "OTHER ... "}
    words |= {"adapter": "ADAPTER " if name in ("merge", "reallocate", "inspect", "demo") else "[ADAPTER] "}
    word = "[ADAPTER ...] " if name == "serve" else words.get(COMMANDS[name].positional, "") + further.get(name, "")
    assert text.startswith(f"usage: mola {name} {word}[--config RECIPE.yaml] [--flag value ...]\n")
    assert "--config" in text


def test_plan_prints_json_and_nothing_else(no_weights_dir, capsys):
    assert main(["plan", *command(base_model=no_weights_dir, num_experts="1,2,3,4"), "--json"]) == 0
    captured = capsys.readouterr()
    totals = json.loads(captured.out)["totals"]
    assert totals
    assert captured.err == ""
    assert main(["plan", *command(base_model=no_weights_dir, r=0)]) == 2
    assert capsys.readouterr().err.startswith("mola plan: error: `r`")


def test_prepare_train_evaluate_generate(files, tiny_model_dir, tmp_path, capsys):
    prepared, run_folder, result = tmp_path / "prepared", tmp_path / "run", tmp_path / "result.json"
    assert main(["prepare", "scienceqa", *command(data=files / "raw.json", output=prepared)]) == 0
    data = prepared / "train.json"
    base = command(base_model=tiny_model_dir, dtype="float32")
    settings = command(task="scienceqa", data=data, output_dir=run_folder, num_experts="1,2,2,2", max_steps=3)
    assert main(["train", *base, *settings, "--disable_tqdm", "true"]) == 0
    evaluation = command(task="scienceqa", data=data, output=result, limit=3, dtype="float32")
    assert main(["evaluate", str(run_folder), *evaluation]) == 0
    read = json.loads(result.read_text(encoding="utf-8"))
    assert {"accuracy", "correct", "total", "unanswered", "interval_95", "groups", "samples"} <= read.keys()
    assert {"settings", "versions"} <= read.keys()
    assert (read["total"], len(read["samples"])) == (3, 3)
    assert {"id", "prompt", "output", "predicted", "answer", "correct"} <= read["samples"][0].keys()
    assert read["settings"]["adapter"] == str(run_folder)
    assert read["settings"]["base_model"] == str(tiny_model_dir), "as the adapter records it"
    capsys.readouterr()
    assert main(["generate", str(run_folder), "--instruction", "Say A", "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", ["evaluate", "generate", "prepare", "plan"])
def test_unknown_flag_of_every_command(name, capsys):
    assert main([name, "--nosuch", "1"]) == 2, "also where required options are missing"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mola {name}: error: there is no flag --nosuch.")
