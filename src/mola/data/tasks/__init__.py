"""Tasks as data: one YAML file says how a row becomes a prompt, an answer and a score.

`scienceqa.yaml` explains the keys. There are two kinds of answers:

- ``answer: {column: answer, choices: choices}``: a letter; the column holds an index or the letter.
- ``answer: {column: label, words: {0: "No", 1: "Yes"}}``: the word of a label.

Without `answer` the task is free text, which is used for training but not scored.
"""

from mola.data.tasks.loading import load_task, task_names
from mola.data.tasks.task import LETTERS, AnswerRule, FieldRule, StrataRule, Task, example_id

__all__ = [
    "LETTERS",
    "AnswerRule",
    "FieldRule",
    "StrataRule",
    "Task",
    "example_id",
    "load_task",
    "task_names",
]
