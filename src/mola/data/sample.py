"""Generated science questions in the ScienceQA schema: small data for the quickstart and for tests.

Every sentence is our own. A topic asks one question about a sentence ("The river is 40 kilometres long.
What was measured?") and offers its classes as options, always in the same order, so that a letter stands
for a class. That is what a very small model can learn from a few hundred samples; to find a letter among
shuffled options takes many more. Held-out questions are made of the same words in other sentences.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from mola.data.sample_topics import TOPICS, Topic
from mola.errors import MolaError

DEFAULT_KINDS = 5  # the first of `TOPICS`, with short options

# Share of questions that come with the topic's rule as a hint.
HINT_SHARE = 0.2
_TRIES = 200  # draws without a new question before a topic counts as used up


def generate_splits(
    sizes: Mapping[str, int], seed: int = 0, kinds: int = DEFAULT_KINDS
) -> dict[str, list[dict[str, Any]]]:
    """Generate science questions, all different, in the ScienceQA schema.

    No question stands twice, within a split or in two. Over all splits together topics take equal shares, and
    within a topic every class is right equally often, up to one.

    Args:
        sizes: split name -> number of questions, 0 or more.
        seed: the same sizes, seed and kinds give the same questions.
        kinds: how many topics, the first of `TOPICS`; those after the fifth are harder and have longer options.

    Returns:
        Rows by split, with the columns of ScienceQA and an `id`; `answer` is the index of the right
        choice, `image` is None.

    Raises:
        MolaError: a size is no integer or negative, there are not so many kinds, or more questions are asked for than
            can be made.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise MolaError(f"`{name}_size` must be an integer of 0 or more: got {size!r}. Correct it.")
    if not 1 <= kinds <= len(TOPICS):
        raise MolaError(f"`kinds` must be 1 to {len(TOPICS)}: got {kinds}. Ask for fewer kinds, or leave it out.")
    writer = _Writer(seed, TOPICS[:kinds])
    return {name: [writer.row(f"{name}-{index}") for index in range(size)] for name, size in sizes.items()}


class _Writer:
    """Draws one question after the other and remembers what it has used."""

    def __init__(self, seed: int, kinds: Sequence[Topic]) -> None:
        self._random = random.Random(seed)
        self._kinds = kinds
        self._seen: set[str] = set()
        self._topics: list[Topic] = []
        self._answers: dict[str, list[int]] = {}

    def row(self, identifier: str) -> dict[str, Any]:
        topic = self._next_topic()
        answer = self._next_answer(topic)
        return {
            "id": identifier,
            "question": self._new_question(topic, answer),
            "choices": list(topic.options),
            "answer": answer,
            "hint": topic.hint if self._random.random() < HINT_SHARE else "",
            "task": "closed choice",
            "grade": f"grade{self._random.choice(topic.grades)}",
            "subject": topic.subject,
            "topic": topic.topic,
            "category": topic.category,
            "skill": topic.skill,
            "lecture": topic.hint,
            "solution": f"The answer is {topic.options[answer]}.",
            "image": None,
        }

    def _next_topic(self) -> Topic:
        """Every topic comes once before any comes again."""
        if not self._topics:
            self._topics = self._random.sample(self._kinds, len(self._kinds))
        return self._topics.pop()

    def _next_answer(self, topic: Topic) -> int:
        """Every class of a topic is right once before any is again."""
        if not self._answers.get(topic.category):
            self._answers[topic.category] = self._random.sample(range(len(topic.options)), len(topic.options))
        return self._answers[topic.category].pop()

    def _new_question(self, topic: Topic, answer: int) -> str:
        for _ in range(_TRIES):
            question = f"{topic.sentence(self._random, answer)} {topic.question}"
            if question not in self._seen:
                self._seen.add(question)
                return question
        raise MolaError(
            f"`train_size`, `validation_size` and `test_size` ask for more questions than there are: the topic "
            f"{topic.category!r} is used up after {len(self._seen)} questions in all. Ask for fewer."
        )
