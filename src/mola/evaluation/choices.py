"""Scoring by likelihood: what the possible answers are and which text comes before them; no torch."""

import re
from collections.abc import Mapping
from typing import Any

from mola.data.tasks import LETTERS, Task
from mola.errors import MolaError


def answer_options(example: Mapping[str, Any], task: Task) -> list[str]:
    """Possible answers of an example: the task's words, or a letter per choice (`["A", "B", "C"]`).

    Raises:
        MolaError: free text, or the number of choices is not known.
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


def around_answer(example: Mapping[str, Any], task: Task) -> tuple[str, str]:
    """Text of the expected output before and after its answer, such as `"Answer: The answer is "` and `"."`.

    The answer may also occur elsewhere in the output ("A cat ..."): the place meant is the last one where
    putting any other option makes the task extract that option. Samples of one output layout have one prefix.

    Raises:
        MolaError: no such place, or the possible answers are not known.
    """
    options = answer_options(example, task)
    output, answer = example["output"], example["answer"]
    whole, anywhere = (
        list(re.finditer(pattern, output)) for pattern in (rf"(?<!\w){re.escape(answer)}(?!\w)", re.escape(answer))
    )
    for place in [*reversed(whole), *reversed(anywhere)]:  # the second for scripts without blanks between words
        before, after = output[: place.start()], output[place.end() :]
        if all(task.extract_answer(before + option + after, example["num_choices"]) == option for option in options):
            return before, after
    raise MolaError(
        f"`scoring` 'likelihood' needs an output that states the answer: sample {example['id']!r} "
        f"has the answer {answer!r} and the output {output[:80]!r}. Use `scoring` 'generate'."
    )
