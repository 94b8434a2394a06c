"""Generated science questions in the ScienceQA schema: small data for the quickstart and for tests.

A topic asks one question about a sentence ("The river is 40 kilometres long. What is measured?"). Its options are the
classes of the topic, always in the same order, so that a letter stands for a class. A very small model can learn that
from a few hundred samples; shuffled options would need many more. Held-out questions use the same words in other
sentences.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from mola.errors import MolaError

DEFAULT_KINDS = 5  # the first of `TOPICS`, with short options
HINT_SHARE = 0.2  # share of questions that have the topic's rule as a hint
_TRIES = 200  # draws without a new question after which a topic counts as used up
_T = TypeVar("_T")


class Topic(NamedTuple):
    """One kind of question."""

    subject: str  # `subject`, `topic`, `category` and `skill` are columns of the rows
    topic: str
    category: str
    skill: str
    grades: tuple[int, ...]  # school years to choose from
    question: str  # stands after the sentence
    options: tuple[str, ...]  # the classes, in the order of the letters
    hint: str  # the rule
    sentence: Callable[[random.Random, int], str]  # draws a sentence for the class with this index


# ---------------------------------------------------------------------- words; a table has one entry per class

_PEOPLE = "Mia, Tom, Ada, Ben, Lea, Max, Eva, Sam, Ida, Leo, Zoe, Finn, Nora, Paul, Rosa, Hugo"
_OBJECTS = "the ball, a letter, the garden, some bread, the boat, a picture, the old house, the map"
_PLACES = "Paris, Oslo, Lima, Cairo, Delhi, Rome, Perth, Quito, Tokyo, Nairobi, Boston, Athens"
_VERBS = (  # infinitive, present, past
    "paint paints painted, carry carries carried, clean cleans cleaned, watch watches watched, "
    "draw draws drew, find finds found, open opens opened, mend mends mended"
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
_STATES = (
    "a coin, some ice, a nail, a lump of sugar, a key, a marble, a button, some chalk",
    "some milk, cold tea, olive oil, lemon juice, warm water, vinegar, ink, syrup",
    "steam, helium, oxygen, fresh air, carbon dioxide, neon, hydrogen, nitrogen",
)
_ANIMALS = (
    "a whale, a bat, a horse, a hare, a tiger, a goat, a mouse, a seal",
    "an owl, a swan, a gull, a robin, a crow, a stork, a hen, a parrot",
    "a trout, a shark, a carp, a herring, a cod, a salmon, a tuna, a pike",
    "a bee, an ant, a wasp, a beetle, a moth, a fly, a flea, a cricket",
    "a lizard, a turtle, a snake, a gecko, a crocodile, a viper, a tortoise, an iguana",
)
_WORD_CLASSES = (
    "table, spoon, window, forest, hammer, pillow, candle, ladder",
    "swim, bring, think, write, jump, forget, build, choose",
    "heavy, narrow, clever, round, hungry, yellow, ancient, sweet",
    "slowly, loudly, gladly, barely, politely, often, soon, never",
)
_MONTHS = (  # of the seasons in the north
    "March, April, May",
    "June, July, August",
    "September, October, November",
    "December, January, February",
)
_NORTH = "Oslo, Paris, Rome, Boston, Athens, Tokyo, Madrid, Moscow"
_SOUTH = "Perth, Sydney, Auckland, Santiago, Cape Town, Buenos Aires, Melbourne, Wellington"
_MACHINES = (
    "a crowbar, a seesaw, a bottle opener, a wheelbarrow, a nutcracker, an oar",
    "a ramp, a slide, a sloping road, a loading ramp, a mountain path, a water chute",
    "a well rope over a wheel, the rope of a flagpole, a crane hook, a block and tackle, a ski lift, a curtain cord",
    "a jar lid, a bolt, a corkscrew, a drill bit, a vice, a piano stool that turns up",
)
_RELATED = (
    "big and large, quick and fast, glad and happy, begin and start, tiny and small, silent and quiet",
    "hot and cold, early and late, rich and poor, up and down, wet and dry, open and shut, young and old",
    "finger and hand, page and book, wheel and car, branch and tree, roof and house, petal and flower, toe and foot",
)


# ---------------------------------------------------------------------- sentences


def _pick(rng: random.Random, words: str) -> str:
    return rng.choice(words.split(", "))


def _measured(rng: random.Random, index: int) -> str:
    pattern, things, units = _MEASURED[index]
    return pattern.format(_pick(rng, things), rng.randint(2, 90), _pick(rng, units))


def _sensed(rng: random.Random, index: int) -> str:
    verb, things = _SENSED[index]
    return f"{_pick(rng, _PEOPLE)} {verb} {_pick(rng, things)}."


def _climate_or_weather(rng: random.Random, index: int) -> str:
    place = _pick(rng, _PLACES)
    if index == 0:
        season = _pick(rng, "Winters, Summers, Springs, Autumns")
        return f"{season} in {place} are usually {_pick(rng, 'cold, mild, wet, dry, short, long')}."
    moment = rng.choice(("This morning", "This evening", "At noon today", "Right now"))
    return f"{moment} it is {_pick(rng, 'rainy, windy, foggy, cloudy, sunny, stormy')} in {place}."


def _tense(rng: random.Random, index: int) -> str:
    verb, present, past = _pick(rng, _VERBS).split()
    person, thing = _pick(rng, _PEOPLE), _pick(rng, _OBJECTS)
    sentences = (
        f"Yesterday {person} {past} {thing}.",
        f"Every day {person} {present} {thing}.",
        f"Tomorrow {person} will {verb} {thing}.",
    )
    return sentences[index]


def _sentence_kind(rng: random.Random, index: int) -> str:
    verb, _, past = _pick(rng, _VERBS).split()
    person, thing = _pick(rng, _PEOPLE), _pick(rng, _OBJECTS)
    sentences = (f"{verb.capitalize()} {thing}, please.", f"Did {person} {verb} {thing}?", f"{person} {past} {thing}.")
    return sentences[index]


def _compared(rng: random.Random, index: int) -> str:
    low, high = sorted(rng.sample(range(10, 100), 2))
    first, second = ((high, low), (low, high), (low, low))[index]
    thing = _pick(rng, "marbles, coins, stamps, shells, beads, nuts")
    return f"The first bag holds {first} {thing} and the second {second}."


def _state(rng: random.Random, index: int) -> str:
    person, box = _pick(rng, _PEOPLE), _pick(rng, "jar, tin, box, glass, bottle, bag")
    return f"{person} has a {box} with {_pick(rng, _STATES[index])} in it."


def _animal(rng: random.Random, index: int) -> str:
    return f"{_pick(rng, _PEOPLE)} {_pick(rng, 'draws, dreams of, reads about')} {_pick(rng, _ANIMALS[index])}."


def _word_class(rng: random.Random, index: int) -> str:
    word = _pick(rng, _WORD_CLASSES[index])
    return f"{_pick(rng, _PEOPLE)} {_pick(rng, 'writes, spells, learns')} the word {word}."


def _season(rng: random.Random, index: int) -> str:
    is_south = rng.random() < 0.5
    month = _pick(rng, _MONTHS[(index + 2 * is_south) % 4])
    return f"{_pick(rng, _PEOPLE)} is in {_pick(rng, _SOUTH if is_south else _NORTH)} in {month}."


def _machine(rng: random.Random, index: int) -> str:
    return f"{_pick(rng, _PEOPLE)} {_pick(rng, 'uses, needs, tries')} {_pick(rng, _MACHINES[index])}."


def _relation(rng: random.Random, index: int) -> str:
    return f"{_pick(rng, _PEOPLE)} {_pick(rng, 'says, hears, copies')} the words {_pick(rng, _RELATED[index])}."


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
    # The following topics are harder: they have longer options and need more knowledge.
    Topic("mathematics", "numbers", "Numbers", "Compare two numbers", (2, 3), "Which bag holds more?",
          ("the first bag", "the second bag", "neither of them, as both hold the same number"),
          "Of two numbers with two digits look at the tens first.", _compared),
    Topic("natural science", "chemistry", "States of matter", "Name the state", (3, 4), "In which state is it?",
          ("solid, so that it keeps its shape", "liquid, so that it takes the shape of what it is in",
           "a gas, so that it fills all the room there is"), "Of a gas one can fill a balloon.", _state),
    Topic("natural science", "zoology", "Animals", "Name the group", (3, 4), "To which group does the animal belong?",
          ("mammals, which feed their young with milk", "birds, which have feathers", "fish, which breathe with gills",
           "insects, which have six legs", "reptiles, which have dry scales"), "Bats and whales are mammals.", _animal),
    Topic("language science", "words", "Word classes", "Name the word class", (3, 4), "What kind of word is it?",
          ("a noun, which names something", "a verb, which says what is done",
           "an adjective, which says what a thing is like", "an adverb, which says how or when something is done"),
          "Many adverbs end in ly.", _word_class),
    Topic("natural science", "geography", "Seasons", "Name the season of a place", (4, 5), "Which season is it there?",
          ("spring, when days grow longer", "summer, when days are longest", "autumn, when days grow shorter",
           "winter, when days are shortest"), "South of the equator seasons are the other way round.", _season),
    Topic("natural science", "engineering", "Machines", "Name the machine", (4, 5), "Which simple machine is it?",
          ("a lever, which turns about a point", "an inclined plane, which is a slope",
           "a pulley, which is a wheel with a rope", "a screw, which is a slope around a rod"),
          "A simple machine changes the size or direction of a force.", _machine),
    Topic("language science", "vocabulary", "Pairs of words", "How are two words related?", (3, 4),
          "How are these two words related?", ("they mean nearly the same", "they mean the opposite of each other",
           "the first names a part of the second"), "Opposites are at the two ends of one scale.", _relation),
)  # fmt: skip


def generate_splits(
    sizes: Mapping[str, int], seed: int = 0, kinds: int = DEFAULT_KINDS
) -> dict[str, list[dict[str, Any]]]:
    """Generate science questions, all different, in the ScienceQA schema.

    No question occurs twice, neither in one split nor in two. Over all splits together, topics have equal shares, and
    the classes of a topic are the correct answer equally often, up to one.

    Args:
        sizes: split name -> number of questions, 0 or more.
        seed: the same sizes, seed and kinds give the same questions.
        kinds: number of topics, from the first of `TOPICS` on; the ones after the fifth are harder.

    Returns:
        Rows by split, with the columns of ScienceQA and an `id`; `answer` is the index of the correct
        choice, `image` is None.

    Raises:
        MolaError: a size is negative, `kinds` is out of range, or not enough different questions can be made.
    """
    for name, size in sizes.items():
        if size < 0:
            raise MolaError(f"`{name}_size` must be 0 or more: got {size!r}. Correct it.")
    if not 1 <= kinds <= len(TOPICS):
        raise MolaError(f"`kinds` must be 1 to {len(TOPICS)}: got {kinds}. Choose fewer kinds, or leave it out.")
    rng = random.Random(seed)
    topics = _in_rounds(rng, TOPICS[:kinds])
    answers = {topic: _in_rounds(rng, range(len(topic.options))) for topic in TOPICS[:kinds]}
    seen: set[str] = set()

    def row(row_id: str) -> dict[str, Any]:
        topic = next(topics)
        answer = next(answers[topic])
        return {
            "id": row_id,
            "question": _new_question(rng, topic, answer, seen),
            "choices": list(topic.options),
            "answer": answer,
            "hint": topic.hint if rng.random() < HINT_SHARE else "",
            "task": "closed choice",
            "grade": f"grade{rng.choice(topic.grades)}",
            "subject": topic.subject,
            "topic": topic.topic,
            "category": topic.category,
            "skill": topic.skill,
            "lecture": topic.hint,
            "solution": f"The answer is {topic.options[answer]}.",
            "image": None,
        }

    return {name: [row(f"{name}-{index}") for index in range(size)] for name, size in sizes.items()}


def _in_rounds(rng: random.Random, items: Sequence[_T]) -> Iterator[_T]:
    """Yield items forever, in random order, every item once before any item comes again."""
    while True:
        yield from reversed(rng.sample(items, len(items)))  # reversed: keeps the questions of earlier versions


def _new_question(rng: random.Random, topic: Topic, answer: int, seen: set[str]) -> str:
    """Draw a question that is not in `seen`, and add it."""
    for _ in range(_TRIES):
        question = f"{topic.sentence(rng, answer)} {topic.question}"
        if question not in seen:
            seen.add(question)
            return question
    raise MolaError(
        f"`train_size`, `validation_size` and `test_size` together need more questions than there are: the topic "
        f"{topic.category!r} is used up after {len(seen)} questions in all. Lower the sizes."
    )
