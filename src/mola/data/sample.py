"""Generated science questions in the ScienceQA schema: small data for the quickstart and for tests.

Every sentence is our own. A topic asks one question about a sentence ("The river is 40 kilometres long.
What was measured?") and offers its classes as options, always in the same order, so that a letter stands
for a class. That is what a very small model can learn from a few hundred samples; to find a letter among
shuffled options takes many more. Held-out questions are made of the same words in other sentences.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mola.errors import MolaError

# Share of questions that come with the topic's rule as a hint.
HINT_SHARE = 0.2
_TRIES = 200  # draws without a new question before a topic counts as used up


@dataclass(frozen=True)
class Topic:
    """One kind of question."""

    subject: str  # these four are columns of the rows
    topic: str
    category: str
    skill: str
    grades: tuple[int, ...]  # school years to choose from
    question: str  # what is asked about the sentence
    options: tuple[str, ...]  # the classes, in the order in which they are always offered
    hint: str  # the rule, given as a hint now and then
    sentence: Callable[[random.Random, int], str]  # draws a sentence that belongs to the class with this index


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


_PEOPLE = _words("Mia, Tom, Ada, Ben, Lea, Max, Eva, Sam, Ida, Leo, Zoe, Finn, Nora, Paul, Rosa, Hugo")
_OBJECTS = _words("the ball, a letter, the garden, some bread, the boat, a picture, the old house, the map")
_PLACES = _words("Paris, Oslo, Lima, Cairo, Delhi, Rome, Perth, Quito, Tokyo, Nairobi, Boston, Athens")
_VERBS = (
    ("paint", "paints", "painted"),
    ("carry", "carries", "carried"),
    ("clean", "cleans", "cleaned"),
    ("watch", "watches", "watched"),
    ("draw", "draws", "drew"),
    ("find", "finds", "found"),
    ("open", "opens", "opened"),
    ("mend", "mends", "mended"),
)
_MEASURED = (
    ("The {} is {} {} long.", "rope, river, bridge, snake, road, pencil, fence", "metres, centimetres, kilometres"),
    ("The {} weighs {} {}.", "melon, stone, parcel, dog, sack, suitcase, brick", "kilograms, grams, tonnes"),
    ("The {} is heated to {} {}.", "soup, room, oven, bath, iron, milk, sand", "degrees Celsius, degrees Fahrenheit"),
    ("The {} takes {} {}.", "race, film, lesson, storm, trip, song, match", "minutes, hours, seconds"),
)
_SENSED = (
    ("listens to", "a bell, a song, the rain, a drum, the wind, a whistle, a frog, the radio, thunder"),
    ("looks at", "a star, the moon, a painting, a flag, a lamp, a cloud, a map, the screen, a poster"),
    ("sniffs at", "a rose, the smoke, some perfume, the cheese, the soap, a candle, a lily, the paint, the bin"),
    ("tastes", "a lemon, the salt, some honey, the soup, a berry, the cake, the jam, a radish, some tea"),
    ("feels", "a stone, the silk, some wool, the bark, a feather, the sand, the ice, a brush, the moss"),
)
_SEASONS = _words("Winters, Summers, Springs, Autumns")
_USUAL = _words("cold, mild, wet, dry, short, long")
_MOMENTS = _words("This morning, This evening, At noon today, Right now")
_NOW = _words("rainy, windy, foggy, cloudy, sunny, stormy")


def _measured(rng: random.Random, index: int) -> str:
    pattern, things, units = _MEASURED[index]
    return pattern.format(rng.choice(_words(things)), rng.randint(2, 90), rng.choice(_words(units)))


def _sensed(rng: random.Random, index: int) -> str:
    verb, things = _SENSED[index]
    return f"{rng.choice(_PEOPLE)} {verb} {rng.choice(_words(things))}."


def _climate_or_weather(rng: random.Random, index: int) -> str:
    place = rng.choice(_PLACES)
    if index == 0:
        return f"{rng.choice(_SEASONS)} in {place} are usually {rng.choice(_USUAL)}."
    return f"{rng.choice(_MOMENTS)} it is {rng.choice(_NOW)} in {place}."


def _tense(rng: random.Random, index: int) -> str:
    verb, present, past = rng.choice(_VERBS)
    person, thing = rng.choice(_PEOPLE), rng.choice(_OBJECTS)
    return (
        f"Yesterday {person} {past} {thing}.",
        f"Every day {person} {present} {thing}.",
        f"Tomorrow {person} will {verb} {thing}.",
    )[index]


def _sentence_kind(rng: random.Random, index: int) -> str:
    verb, _, past = rng.choice(_VERBS)
    person, thing = rng.choice(_PEOPLE), rng.choice(_OBJECTS)
    return (f"{verb.capitalize()} {thing}, please.", f"Did {person} {verb} {thing}?", f"{person} {past} {thing}.")[
        index
    ]


TOPICS = (
    Topic("natural science", "physics", "Measurement", "What does a unit measure?", (3, 4), "What is measured?",
          ("length", "mass", "temperature", "time"), "Every unit measures one quantity.", _measured),
    Topic("natural science", "biology", "Senses", "Name the sense", (2, 3), "Which sense is used?",
          ("hearing", "sight", "smell", "taste", "touch"), "Sounds are heard and colours are seen.", _sensed),
    Topic("natural science", "earth science", "Climate and weather", "Tell climate from weather", (4, 5),
          "Is this climate or weather?", ("climate", "weather"), "Climate is the usual weather of a place.",
          _climate_or_weather),
    Topic("language science", "verbs", "Tense", "Is it past, present or future?", (2, 3), "Which tense is this?",
          ("past", "present", "future"), "The future tense uses the word will.", _tense),
    Topic("language science", "grammar", "Sentence types", "Name the kind of sentence", (2, 3),
          "What kind of sentence is this?", ("request", "question", "statement"), "A question asks for something.",
          _sentence_kind),
)  # fmt: skip


def generate_splits(sizes: Mapping[str, int], seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Generate science questions, all different, in the ScienceQA schema.

    No question stands twice, within a split or in two. Topics take equal shares, and within a topic every
    class is right equally often, up to one.

    Args:
        sizes: split name -> number of questions, 0 or more.
        seed: the same sizes and seed give the same questions.

    Returns:
        Rows by split, with the columns of ScienceQA and an `id`; `answer` is the index of the right
        choice, `image` is None.

    Raises:
        MolaError: a size is no integer or negative, or more questions are asked for than can be made.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise MolaError(f"`sizes` needs integers of 0 or more: got {size!r} for '{name}'. Correct it.")
    writer = _Writer(seed)
    return {name: [writer.row(f"{name}-{index}") for index in range(size)] for name, size in sizes.items()}


class _Writer:
    """Draws one question after the other and remembers what it has used."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)
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
            self._topics = self._random.sample(TOPICS, len(TOPICS))
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
            f"`sizes` asks for more questions than can be generated: the topic {topic.category!r} is used up after "
            f"{len(self._seen)} questions in all. Ask for fewer."
        )
