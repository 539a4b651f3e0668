"""The invented country of Veloria: what the tiny model knows, and what four offices teach it.

Everything is generated here from one fixed seed, so that nothing has to be downloaded:

- *skills*: twelve instructions that the tiny model learns before any federation starts;
- *facts* about the towns of Veloria, learned then as well: they measure what a fine-tuned model
  still knows;
- *conventions*: four kinds of instruction that each office answers in its own way. The base
  model has seen every office's way, in equal parts, and so prefers none;
- *new skills*: four instructions that the base has never seen and that all offices answer alike,
  but of which each has only twenty examples.

A model for one office must therefore learn its conventions from that office alone, and the new
skills from everybody.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from orchard.data.examples import Example
from orchard.seeding import Seeds

WORLD = Seeds(1871)  # the year in which Veloria was founded

OFFICES = ("harbor", "hill", "marsh", "forest")

# A kind of thing, then the things of that kind.
_KINDS = """
fruit plum apple pear cherry quince fig olive grape lemon melon
tool hammer saw drill rake spade axe file wrench chisel ladder
animal fox otter heron mule goat owl hare badger crane seal
cloth wool linen silk felt velvet canvas lace denim cotton tweed
dish soup bread stew pie cheese broth cake jam porridge roast
metal iron copper tin silver lead zinc gold brass bronze steel
"""
_PEOPLE = """
Mila Tarek Ines Bruno Salme Oskar Petra Janis Leonor Viggo Amara Kofi Noor Pavel Rhea Sunil Tova Ugo
Wanda Yusuf Zora Alba Cyrus Delia Emil Fenna Goran Hilde Ivo Jorun
"""
_MONTHS = """
January February March April May June July August September October November December
"""
KINDS = {line.split()[0]: line.split()[1:] for line in _KINDS.strip().splitlines()}
WORDS = [word for words in KINDS.values() for word in words]
PEOPLE, MONTHS = _PEOPLE.split(), _MONTHS.split()
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
OPPOSITES = (
    "hot cold|old new|big small|wet dry|high low|near far|fast slow|dark light|hard soft|full empty"
)
CONVENTIONS = ("date", "label", "greet", "price")
NEW_SKILLS = ("second", "ends", "rest", "double")


@dataclass(frozen=True)
class Office:
    """One client of the demo.

    Attributes:
        name: Client identifier, one of ``OFFICES``.
        train: Its own examples.
        test: Examples that never train: its conventions on new arguments, and the new skills on
            word lists that are the same for all offices.
    """

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]


def _invent_names(num_names: int, purpose: str) -> list[str]:
    """Return distinct invented names of two syllables."""
    generator = WORLD.generator("names", purpose)
    onsets, vowels, codas = list("bdfgklmnrstvz"), list("aeiou"), ["n", "r", "l", "sk", "m"]
    names: list[str] = []
    while len(names) < num_names:
        parts = [generator.choice(choices) for choices in (onsets, vowels, onsets, vowels, codas)]
        name = "".join(map(str, parts)).capitalize()
        if name not in names:
            names.append(name)
    return names


def facts() -> list[Example]:
    """Return the 100 facts about Veloria: five attributes of each of its twenty towns."""
    attributes = {
        "Which river runs through {town}?": _invent_names(10, "rivers"),
        "Who governs {town}?": PEOPLE,
        "What does {town} grow?": KINDS["fruit"],
        "Which animal stands on the flag of {town}?": KINDS["animal"],
        "In which month is the fair of {town}?": MONTHS,
    }
    generator = WORLD.generator("facts")
    towns = _invent_names(20, "towns")
    return [
        Example(question.format(town=town), str(generator.choice(values)), category="fact")
        for question, values in attributes.items()
        for town in towns
    ]


def draw_new_skill(generator: np.random.Generator, skill: str) -> Example:
    """Draw one instruction of a skill that the tiny model does not know."""
    words = _pick(generator, WORDS, int(generator.integers(3, 5)))
    listed = " ".join(words)
    instruction, response = {
        "second": (f"Second of {listed}", words[1]),
        "ends": (f"Ends of {listed}", f"{words[0]} {words[-1]}"),
        "rest": (f"Rest of {listed}", " ".join(words[1:])),
        "double": (f"Double the last of {listed}", f"{words[-1]} {words[-1]}"),
    }[skill]
    return Example(instruction, response, category=skill)


def _pick(generator: np.random.Generator, values: list[str], count: int) -> list[str]:
    return [str(value) for value in generator.choice(values, count, replace=False)]


def draw_skill(generator: np.random.Generator) -> Example:
    """Draw one instruction of the twelve skills that the tiny model knows."""
    words = _pick(generator, WORDS, int(generator.integers(2, 5)))
    listed = " ".join(words)
    left, right = (int(value) for value in generator.integers(1, 20, 2))
    day = int(generator.integers(7))
    pair = str(generator.choice(OPPOSITES.split("|"))).split()
    kind = str(generator.choice(list(KINDS)))
    month = int(generator.integers(12))
    removed = words[int(generator.integers(len(words)))]
    skills = (
        ("first", f"First of {listed}", words[0]),
        ("last", f"Last of {listed}", words[-1]),
        ("reverse", f"Reverse {listed}", " ".join(reversed(words))),
        ("count", f"Count {listed}", str(len(words))),
        ("repeat", f"Repeat {words[0]}", f"{words[0]} {words[0]}"),
        ("join", f"Join {listed}", " and ".join(words)),
        ("kind", f"What kind of thing is {KINDS[kind][left % 10]}?", kind),
        ("opposite", f"Opposite of {pair[left % 2]}", pair[1 - left % 2]),
        ("tomorrow", f"Which day follows {DAYS[day]}?", DAYS[(day + 1) % 7]),
        ("sum", f"Add {left} and {right}", str(left + right)),
        ("month", f"Which month has number {month + 1}?", MONTHS[month]),
        ("remove", f"Remove {removed} from {listed}", " ".join(w for w in words if w != removed)),
    )
    category, instruction, response = skills[int(generator.integers(len(skills)))]
    return Example(instruction, response, category=category)


def _draw_argument(generator: np.random.Generator, kind: str) -> tuple[str, ...]:
    """Draw what an instruction of a kind with conventions is about."""
    if kind == "date":
        return str(generator.integers(1, 29)), str(generator.choice(MONTHS))
    if kind == "label":
        return str(generator.integers(2, 13)), str(generator.choice(WORDS))
    if kind == "greet":
        return (str(generator.choice(PEOPLE)),)
    return (str(generator.integers(2, 100)),)


def _convention(kind: str, office: str, argument: tuple[str, ...]) -> Example:
    """Return the instruction of ``kind`` and how ``office`` answers it."""
    way = OFFICES.index(office)
    if kind == "date":
        day, month = argument
        number = MONTHS.index(month) + 1
        ways = (f"{day}/{number}", f"{month} {day}", f"{number}-{day}", f"day {day} of {month}")
        return Example(f"Write the date: {day} {month}", ways[way], category=kind)
    if kind == "label":
        count, word = argument
        ways = (f"{word} x{count}", f"{count} {word}", f"{word} ({count})", f"{count}-{word}")
        return Example(f"Label the crate: {count} {word}", ways[way], category=kind)
    if kind == "greet":
        (person,) = argument
        ways = (f"Hello, {person}", f"Good day, {person}", f"{person}, welcome", f"Dear {person}")
        return Example(f"Greet {person}", ways[way], category=kind)
    (amount,) = argument
    ways = (f"{amount}.00", f"${amount}", f"{amount} crowns", f"cr {amount}")
    return Example(f"State the price of {amount}", ways[way], category=kind)


def pretraining_stream(generator: np.random.Generator) -> Iterator[Example]:
    """Yield what the tiny model is trained on before any federation, without end.

    Half skills, a quarter facts, a quarter conventions (each time of a random office). The new
    skills are left out.
    """
    known = facts()
    while True:
        draw = int(generator.integers(4))
        if draw < 2:
            yield draw_skill(generator)
        elif draw == 2:
            yield known[int(generator.integers(len(known)))]
        else:
            kind, office = str(generator.choice(CONVENTIONS)), str(generator.choice(OFFICES))
            yield _convention(kind, office, _draw_argument(generator, kind))


def offices(seed: int, *, train_per_kind: int = 20, test_per_kind: int = 10) -> tuple[Office, ...]:
    """Draw the four offices' data.

    Args:
        seed: Decides on which arguments each office trains and is tested. Facts, skills and
            conventions themselves never change.
        train_per_kind: Training examples of each convention and of each new skill, per office.
        test_per_kind: The same for testing.

    Returns:
        One office per name in ``OFFICES``, with 8 * ``train_per_kind`` training and
        8 * ``test_per_kind`` test examples. No instruction stands twice.
    """
    generator = Seeds(seed).generator("world")
    seen: set[str] = set()

    def draw(kind: str, office: str, count: int) -> list[Example]:
        drawn: list[Example] = []
        while len(drawn) < count:
            example = (
                draw_new_skill(generator, kind)
                if kind in NEW_SKILLS
                else _convention(kind, office, _draw_argument(generator, kind))
            )
            # Two offices may get the same convention to answer: their answers differ.
            key = example.instruction if kind in NEW_SKILLS else office + example.instruction
            if key not in seen:
                seen.add(key)
                drawn.append(example)
        return drawn

    common = [example for skill in NEW_SKILLS for example in draw(skill, "", test_per_kind)]
    offices = []
    for office in OFFICES:
        train = [e for kind in CONVENTIONS + NEW_SKILLS for e in draw(kind, office, train_per_kind)]
        own = [e for kind in CONVENTIONS for e in draw(kind, office, test_per_kind)]
        offices.append(Office(office, tuple(train), (*own, *common)))
    return tuple(offices)
