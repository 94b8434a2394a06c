"""From examples to answers: prompts, checks that need no model, batches, extraction."""

import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from mola.data.tasks import Task
from mola.data.templates import Template, get_template
from mola.errors import MolaError, NotFiniteError
from mola.evaluation.choices import answer_options, around_answer
from mola.generation import predicting
from mola.generation.likelihood import option_log_probabilities

SCORINGS = ("generate", "likelihood")
# Thai to Myanmar, Khmer, Chinese and Japanese.
_WITHOUT_BLANKS = "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"


@dataclass(frozen=True)
class Question:
    """An example made ready to be asked."""

    example: Mapping[str, Any]  # the example as loaded
    prompt: str  # text before the answer
    prefix: str = ""  # likelihood only: text of the output before its answer
    options: tuple[str, ...] = ()  # likelihood only: the possible answers
    suffix: str = ""  # likelihood only: text of the output after its answer
    template: Template | None = None  # the prompt's

    def option_texts(self, end: str) -> list[str]:
        """Prompt and output up to and with the answer, for every option.

        Where one begins as another ("1" and "10") the word or mark that follows the answer is part of both, the `end`
        of a text if nothing does: the shorter one could not be less probable than the longer. Not all that follows,
        which may give the reason for the right answer.
        """
        begins = any(a != b and b.startswith(a) for a in self.options for b in self.options)
        suffix = (_begin_of(self.suffix) or end) if begins else ""
        return [self.prompt + self.prefix + option + suffix for option in self.options]


def _begin_of(text: str) -> str:
    """The first word or mark of a text, with the blanks before it; of a script without blanks the first character."""
    found = re.match(rf"\s*([^\W{_WITHOUT_BLANKS}]+|[^\w\s]+|\w)", text)
    return found[0] if found else text


def make_questions(
    task: Task,
    examples: Sequence[Mapping[str, Any]],
    template: str | Template | None,
    scoring: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Question]:
    """Prompts of all examples; everything that can be wrong with them shows here, before a model is loaded.

    Without a prompt template or its name it is the task's own; `scoring` is one of `SCORINGS`. The template `chat` is
    the tokenizer's.

    Raises:
        MolaError: no examples, an unknown `scoring` or template, an example without an answer, or
            (likelihood) one whose possible answers are not known.
    """
    if scoring not in SCORINGS:
        raise MolaError(f"`scoring` must be one of {', '.join(SCORINGS)}: got {scoring!r}.")
    if not examples:
        raise MolaError("`data` must hold at least one sample: got none. Check the file and `split`.")
    template = task.template if template is None else template
    layout = template if isinstance(template, Template) else get_template(template, tokenizer)
    questions = []
    for example in examples:
        if not example.get("answer"):
            if task.answer is not None:
                raise MolaError(
                    f"`data` must have answers: sample {example['id']!r} has `answer` {example.get('answer')!r}. Add "
                    "the column, or prepare the source with `mola prepare`."
                )
            raise MolaError(
                f"`task` must have answers to be evaluated: sample {example['id']!r} of {task.name!r} has "
                f"`answer` {example.get('answer')!r}. Evaluate a task with an answer rule."
            )
        prompt = layout.prompt(example["instruction"], example["input"])
        if scoring == "likelihood":
            options = tuple(answer_options(example, task))
            before, after = around_answer(example, task)
            questions.append(Question(example, prompt, layout.answer(before), options, after, layout))
        else:
            questions.append(Question(example, prompt, template=layout))
    return questions


def question_lengths(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    scoring: str,
    max_new_tokens: int,
    limit: int | None,
) -> list[int]:
    """Tokens of each question as the model will see it.

    New tokens do not count for `scoring` "likelihood"; `limit` is the number of the model's positions, if limited.

    Raises:
        MolaError: a question leaves no room for `max_new_tokens` within `limit`.
    """
    template, names = questions[0].template, [question.example["id"] for question in questions]
    end = _end(tokenizer, template)
    texts = [question.option_texts(end) or [question.prompt] for question in questions]
    encoded = iter(predicting.encode_prompts(tokenizer, [text for each in texts for text in each], template))
    longest = [max(itertools.islice(encoded, len(each)), key=len) for each in texts]  # in tokens: `ÄÖ` may be four
    num_new_tokens = max_new_tokens if scoring == "generate" else 0
    predicting.check_lengths(names, longest, num_new_tokens, limit)
    return [len(ids) for ids in longest]


def answer_questions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    questions: Sequence[Question],
    batches: Iterable[Sequence[int]],
    max_new_tokens: int,
    on_batch: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Ask batch by batch, each of indices into `questions`, and hand over the records of each as soon as it is done.

    `on_batch` gets `[{"index", "seconds", "sample"}]`; `seconds` is the sample's share of the batch's wall time.
    """
    with predicting.inference_state(model):
        for batch in batches:
            start = time.perf_counter()
            answers = list(_answer_batch(model, tokenizer, task, [questions[i] for i in batch], max_new_tokens))
            share = (time.perf_counter() - start) / len(batch)
            on_batch(
                [
                    {"index": index, "seconds": share, "sample": _sample(questions[index], *answer)}
                    for index, answer in zip(batch, answers, strict=True)
                ]
            )


def _answer_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    questions: Sequence[Question],
    max_new_tokens: int,
) -> Iterator[tuple[str, str | None]]:
    """Output text and extracted answer of each question."""
    template, asked = questions[0].template, [question.prompt for question in questions]
    if questions[0].options:
        end = _end(tokenizer, template)
        texts = [question.option_texts(end) for question in questions]
        scores = option_log_probabilities(model, tokenizer, texts, template, asked)
        for question, values in zip(questions, scores, strict=True):
            if any(map(math.isnan, values)):
                raise NotFiniteError(
                    f"scores must be numbers to be compared: those of sample {question.example['id']!r} are NaN. Pass "
                    "--dtype float32 or bfloat16, and look whether the weights of `base_model` are finite."
                )
            answer = question.options[values.index(max(values))]
            yield question.prefix + answer, answer
        return
    prompts = predicting.encode_before_answer(tokenizer, asked, template)
    ends = [] if template is None else template.ending(tokenizer)[:1]
    outputs = predicting.generate_batch(
        model, tokenizer, prompts, ends=ends, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
    )
    for question, output in zip(questions, outputs, strict=True):
        yield output, task.extract_answer(output, question.example["num_choices"])


def _end(tokenizer: PreTrainedTokenizerBase, template: Template | None) -> str:
    """Text of the token that ends an answer."""
    if template is None or template.adds_special_tokens:
        return str(tokenizer.eos_token or "")
    return "".join(tokenizer.convert_ids_to_tokens(template.ending(tokenizer)[:1]))


def _sample(question: Question, output: str, predicted: str | None) -> dict[str, Any]:
    return {
        "id": question.example["id"],
        "prompt": question.prompt,
        "output": output,
        "predicted": predicted,
        "answer": question.example["answer"],
        "correct": predicted == question.example["answer"],
    }
