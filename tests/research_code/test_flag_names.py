"""Messages name the flags of a script, and nothing else is renamed."""

import logging
import warnings

import pytest

from mola.checkpoints.formats import conversion_hint
from mola.errors import MolaError
from mola.exporting.convert import ConvertOptions
from mola.options.parsing import parse
from mola.research_code import training
from mola.research_code.flag_names import flag_names
from mola.training.advice import memory_advice
from mola.training.options import TrainOptions

EVALUATION = {"data": "test_dataset", "adapter": "mola_weights", "output": "save_path"}


def said(text, names=EVALUATION, phrases=None):
    with pytest.raises(MolaError) as caught, flag_names(names, phrases):
        raise MolaError(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("`output` exists: pass --output again", "`save_path` exists: pass --save_path again"),
        ("row `test-0`: `output` must be text", "row `test-0`: `output` must be text"),
        ("`output` in a/adapter_config.json must be one", "`output` in a/adapter_config.json must be one"),
        ("`adapter`: run `mola convert a --output DIR`.", "`mola_weights`: run `mola convert a --output DIR`."),
    ],
)
def test_flags_alone_are_renamed(text, expected):
    assert said(text) == expected


def test_log_lines_are_renamed_too(caplog):
    log = logging.getLogger("mola.somewhere")
    other = logging.getLogger("elsewhere")
    with flag_names({"template": "prompt_template_name"}):
        log.warning("%s is used with %s. Pass `template` %s.", "The adapter", "alpaca", "meta")
        other.warning("Pass `template` %s.", "meta")
    log.warning("Pass `template` %s.", "meta")
    renamed, kept, after = caplog.messages
    assert renamed == "The adapter is used with alpaca. Pass `prompt_template_name` meta."
    assert kept == after == "Pass `template` meta."


def test_the_same_as_a_command_of_mola_is_shown_as_it_is(caplog):
    command = training.as_command({"base_model": "m", "adapter": "./step2", "save_total_limit": 3, "template": "meta"})
    with caplog.at_level(logging.INFO, "mola"), flag_names(training._FLAGS, training._PHRASES):
        logging.getLogger("mola.somewhere").info("The same as: %s", command)
    assert caplog.messages == [f"The same as: {command}"]


def test_a_command_to_copy_is_one():
    settings = {"peft_type": "LORA", "r": [8, 8], "routing_strategy": "mola", "num_experts": [2, 2]}
    hint = conversion_hint(settings, "a b")
    words = said(hint).partition("mola convert ")[2]
    assert words == hint.partition("mola convert ")[2]
    assert "--output NEW_FOLDER" in words
    assert parse(ConvertOptions, ["a", "--output=b"], prog="mola convert", positional="source").output == "b"


def test_advice_names_flags_that_the_scripts_have():
    options = TrainOptions(output_dir="unused", per_device_train_batch_size=8, gradient_accumulation_steps=16)
    advice = said(memory_advice(options), training._FLAGS, training._PHRASES)
    assert advice.startswith("Pass --micro_batch_size 4, which gives the same effective batch; or `mola train --act")
    assert "accumulation" not in advice
    assert "`mola train --per_device_eval_batch_size`" in advice


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pass --load_in_4bit or --load_in_8bit; or", "pass `mola train` with --load_in_4bit or --load_in_8bit; or"),
        (
            "Lower `learning_rate` (0.1), let it decay with `lr_scheduler_type` cosine or linear (now linear), or end "
            "with an earlier checkpoint: evaluate more often with `load_best_model_at_end`.",
            "Lower `learning_rate` (0.1) or end with an earlier checkpoint: save and evaluate more often with "
            "`save_steps`.",
        ),
        ("`split` must be one of test for", "`data_path` must have the split `train`, not only test for"),
        ("`train_split` must be one of test for", "`data_path` must have the split `train`, not only test for"),
    ],
)
def test_words_of_other_flags_are_those_that_there_are(text, expected):
    assert said(text, training._FLAGS, training._PHRASES) == expected


def test_warnings_are_renamed_too():
    text = "Set `router_aux_loss_coef` (e.g. 1e-3) or `top_k=2`."
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *rest, **more: shown.append(str(message))
        with flag_names(training._FLAGS, training._PHRASES):
            warnings.warn(text, UserWarning, stacklevel=1)
    assert shown == ["Set `obalance` or `top_k=2`."]
