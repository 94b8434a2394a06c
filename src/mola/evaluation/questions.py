"""Questions of an evaluation, made from examples and checked before a model is loaded."""

import functools
import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from mola.data.tasks import LETTERS, Task
from mola.data.templates import Template, get_template
from mola.errors import MolaError
from mola.evaluation.options import MAX_NEW_TOKENS
from mola.generation import predicting

SCORINGS = ("generate", "likelihood")
# Thai to Myanmar, Khmer, Chinese and Japanese.
_SCRIPTS_WITHOUT_BLANKS = "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"

_warn_once = functools.cache(logging.getLogger(__name__).warning)


@dataclass(frozen=True)
class Question:
    """An example as a prompt, with its possible answers."""

    example: Mapping[str, Any]  # the example as loaded
    prompt: str  # text before the answer
    prefix: str = ""  # likelihood only: text of the output before the answer
    options: tuple[str, ...] = ()  # likelihood only: the possible answers
    suffix: str = ""  # likelihood only: text of the output after its answer
    template: Template | None = None  # the prompt's

    def option_texts(self, end: str) -> list[str]:
        """The text that ends with the answer, for every option: prompt, prefix and option.

        If one option begins with another option ("1" and "10"), the longer one could not be more probable than the
        shorter one. In this case every text gets one more word or mark: the first of the suffix, or `end` (the token
        that ends an answer) if the suffix is empty. The rest of the suffix is left out, because it may explain the
        correct answer.
        """
        is_ambiguous = any(a != b and b.startswith(a) for a in self.options for b in self.options)
        suffix = (_first_word(self.suffix) or end) if is_ambiguous else ""
        return [self.prompt + self.prefix + option + suffix for option in self.options]


def _first_word(text: str) -> str:
    """The first word or mark of a text, with the blanks before it; in a script without blanks the first character."""
    found = re.match(rf"\s*([^\W{_SCRIPTS_WITHOUT_BLANKS}]+|[^\w\s]+|\w)", text)
    return found[0] if found else text


def checked_questions(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Mapping[str, Any]],
    template: str | Template | None,
    scoring: str,
    max_new_tokens: int = MAX_NEW_TOKENS,
    limit: int | None = None,
) -> tuple[list[Question], list[int]]:
    """The questions, and the tokens of the longest text that the model will see for each of them; needs no model.

    Args:
        tokenizer: the model's.
        task: its prompts and its answer extraction.
        examples: as `mola.data.examples.load_examples` returns them.
        template: prompt template or its name; None for the task's own.
        scoring: one of `SCORINGS`.
        max_new_tokens: tokens to generate for each answer.
        limit: the model's maximum length in tokens, or None.

    Raises:
        MolaError: there is no example, one lacks an answer or has an answer that the task cannot read, a question
            leaves no room for its answer, or (likelihood) the possible answers of an example are unknown.
    """
    questions = make_questions(task, examples, template, scoring, tokenizer)
    if scoring == "generate":
        warn_unread_outputs(task, examples)
    layout = questions[0].template
    end = end_text(tokenizer, layout)
    # The texts that the model will see for each question: its options, or the prompt alone.
    texts = [question.option_texts(end) or [question.prompt] for question in questions]
    encoded = iter(predicting.encode_prompts(tokenizer, [text for each in texts for text in each], layout))
    longest = [max(itertools.islice(encoded, len(each)), key=len) for each in texts]
    num_new_tokens = max_new_tokens if scoring == "generate" else 0
    predicting.check_lengths([example["id"] for example in examples], longest, num_new_tokens, limit)
    return questions, [len(ids) for ids in longest]


def make_questions(
    task: Task,
    examples: Sequence[Mapping[str, Any]],
    template: str | Template | None,
    scoring: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Question]:
    """The questions of all examples; arguments and errors as in `checked_questions`.

    The template `chat` is the chat template of the tokenizer.
    """
    if scoring not in SCORINGS:
        raise MolaError(f"`scoring` must be one of {', '.join(SCORINGS)}: got {scoring!r}.")
    if not examples:
        raise MolaError("`data` must hold at least one sample: got none. Check the file and `split`.")
    template = task.template if template is None else template
    layout = template if isinstance(template, Template) else get_template(template, tokenizer)
    questions = []
    for example in examples:
        _check_answer(example, task)
        prompt = layout.prompt(example["instruction"], example["input"])
        if scoring == "likelihood":
            options = tuple(answer_options(example, task))
            before, after = split_at_answer(example, task)
            questions.append(Question(example, prompt, layout.answer(before), options, after, layout))
        else:
            questions.append(Question(example, prompt, template=layout))
    return questions


def _check_answer(example: Mapping[str, Any], task: Task) -> None:
    """Raise for a sample that would always count as wrong, because the task reads its answer from no text."""
    answer, rule = example.get("answer"), task.answer
    if not answer:
        cure = "Add the column, or prepare the source with `mola prepare`."
        raise MolaError(
            f"`data` must have answers: sample {example['id']!r} of the task {task.name!r} has `answer` {answer!r}. "
            + ("Evaluate a task with an answer rule." if rule is None else cure)
        )
    if rule is None:
        return
    possible = list(LETTERS[: example["num_choices"]]) if rule.words is None else list(rule.words.values())
    if answer not in possible:
        raise MolaError(
            f"`answer` of sample {example['id']!r} must be one of {', '.join(map(repr, dict.fromkeys(possible)))} for "
            f"the task {task.name!r}: got {answer!r}. Correct it, or run `mola prepare` on the raw data."
        )


def answer_options(example: Mapping[str, Any], task: Task) -> list[str]:
    """Possible answers of an example: the task's words, or a letter for each choice (`["A", "B", "C"]`).

    Raises:
        MolaError: the answer is free text, or the number of choices is unknown.
    """
    if task.answer is not None and task.answer.words is not None:
        return list(dict.fromkeys(task.answer.words.values()))
    num_choices = example["num_choices"]
    if task.answer is None or num_choices is None or not 2 <= num_choices <= len(LETTERS):
        raise MolaError(
            f"`scoring` 'likelihood' needs a known number of choices, 2 to {len(LETTERS)}: sample "
            f"{example['id']!r} of the task {task.name!r} has {num_choices!r}. Use `scoring` 'generate'."
        )
    return list(LETTERS[:num_choices])


def split_at_answer(example: Mapping[str, Any], task: Task) -> tuple[str, str]:
    """Text of the expected output before and after its answer, such as `"Answer: The answer is "` and `"."`.

    The answer may occur in the output more than once ("A cat ... The answer is A."). An occurrence is
    used if the task extracts every possible answer that is put in its place. Later occurrences are tried before earlier
    ones, and whole words before parts of words.

    Raises:
        MolaError: no occurrence can be used, or the possible answers are unknown.
    """
    options = answer_options(example, task)
    output, answer = example["output"], example["answer"]
    as_word, anywhere = (
        list(re.finditer(pattern, output)) for pattern in (rf"(?<!\w){re.escape(answer)}(?!\w)", re.escape(answer))
    )
    for match in [*reversed(as_word), *reversed(anywhere)]:  # anywhere: some scripts have no blanks between words
        before, after = output[: match.start()], output[match.end() :]
        if all(task.extract_answer(before + option + after, example["num_choices"]) == option for option in options):
            return before, after
    raise MolaError(
        f"`scoring` 'likelihood' needs an output that states the answer: sample {example['id']!r} "
        f"has the answer {answer!r} and the output {output[:80]!r}. Use `scoring` 'generate'."
    )


def warn_unread_outputs(task: Task, examples: Sequence[Mapping[str, Any]]) -> None:
    """Warn once if the task does not find the answer in the expected output of some examples."""
    if task.answer is None:
        return
    unread = [
        each["id"]
        for each in examples
        if each.get("output") and task.extract_answer(each["output"], each["num_choices"]) != each["answer"]
    ]
    if unread:
        _warn_once(
            "`answer_pattern` of the task %s does not find the answer in the output of %d of %d samples, such as %r: a "
            "model that writes these outputs counts as wrong.",
            task.name,
            len(unread),
            len(examples),
            unread[0],
        )


def end_text(tokenizer: PreTrainedTokenizerBase, template: Template | None) -> str:
    """Text of the token that ends an answer."""
    if template is None or template.adds_special_tokens:
        return str(tokenizer.eos_token or "")
    return "".join(tokenizer.convert_ids_to_tokens(template.ending(tokenizer)[:1]))
