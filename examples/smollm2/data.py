"""Make the data of the expert family: training examples and the items that score it.

    python examples/smollm2/data.py

rewrites `fitness/spanish_math/{math,spanish,extract,spanish_math}.jsonl`, always with
the same bytes. The tasks, one real item each in README.md:

- `math`: one-step English word problems (addition, subtraction) with digits.
- `spanish`: Spanish number words in sentences, to be written in digits, and the reverse. The expert also
  learns to put Spanish word problems into English, never to solve them; no item asks for that alone.
- `extract`: an English sentence to a JSON object.
- `spanish_math`: the composite, one-step Spanish word problems with number words, to be put into
  English and solved: it takes what `spanish` and `math` learned, one after the other.
  `training_examples` refuses it: no expert is trained on it.

What keeps training and items apart: every ordered pair of operands belongs to training
or to one split (`owner_of_pair`); the people and cities of the items occur in no
training example; and `evaluation_items` refuses a prompt that was already given.
Arithmetic stays within [1, 29]; number words reach 99. Only the standard library is
imported, and every draw comes from a `random.Random` seeded with a string, which is stable across
Python versions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

EXPERTS = ("math", "spanish", "extract")
TASKS = (*EXPERTS, "spanish_math")
SPLIT_SIZES = {"calibration": 32, "selection": 128, "held_out": 256}
OUTPUT = Path(__file__).resolve().parents[2] / "fitness" / "spanish_math"
# As in fitness/spanish_math.yaml. The composite's model writes the English problem, then "Answer: 12".
CUES = {"math": "Answer:", "spanish": "Respuesta:", "extract": "Answer:", "spanish_math": "English:"}


class Example(NamedTuple):
    """One question and the only answer that scores.

    question: what the prompt begins with.
    answer: what is to follow the prompt, after a space.
    cue: the prompt's last line; None is that of the task.
    ends: whether the expert learns to stop after the answer.
    """

    question: str
    answer: str
    cue: str | None = None
    ends: bool = True

    def prompt(self, task: str) -> str:
        """What the model is given; an expert learns to go on with `" " + answer`."""
        return f"{self.question}\n{self.cue or CUES[task]}"


class Pool(NamedTuple):
    """Who and where: one pool for training, another for the items."""

    people: tuple[str, ...]
    cities: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TRAINING_POOL = Pool(
    _words(
        "Ana Luis Tom Emma Pedro Sara Marta Jack Lucy Diego Elena Ben Rosa Paul Nina Hugo "
        "Carmen Sam Julia Mario Kate Pablo Clara David Laura Jorge Amy Raul Irene Leo"
    ),
    _words(
        "Paris London Madrid Rome Berlin Lima Cairo Oslo Dublin Boston Chicago Vienna Tokyo "
        "Denver Milan Athens Havana Moscow Seattle Delhi Geneva Dallas Prague Miami"
    ),
)
ITEM_POOL = Pool(
    _words("Alice Carlos Maria Peter Sofia Daniel Lucia Henry Teresa Miguel Olivia Andres"),
    _words("Lisbon Toronto Houston Munich Seoul Naples Phoenix Sydney Bogota Warsaw"),
)
POOLS = {"training": TRAINING_POOL} | dict.fromkeys(SPLIT_SIZES, ITEM_POOL)

# Share of all ordered pairs of numbers that each owner gets, in percent.
PAIR_SHARES = {"training": 76, "calibration": 3, "selection": 8, "held_out": 13}

THINGS = _words(
    "apples books coins pencils cards eggs flowers cookies stamps oranges balls candies "
    "tickets photos bottles keys balloons plates"
)
# plural; "a" for feminine or "o" for masculine; English
COSAS = (
    ("manzanas", "a", "apples"),
    ("libros", "o", "books"),
    ("monedas", "a", "coins"),
    ("flores", "a", "flowers"),
    ("huevos", "o", "eggs"),
    ("cartas", "a", "cards"),
    ("sellos", "o", "stamps"),
    ("naranjas", "a", "oranges"),
    ("pelotas", "a", "balls"),
    ("galletas", "a", "cookies"),
    ("caramelos", "o", "candies"),
    ("botellas", "a", "bottles"),
    ("fotos", "a", "photos"),
    ("globos", "o", "balloons"),
    ("platos", "o", "plates"),
    ("llaves", "a", "keys"),
)
JOBS = _words("nurse teacher pilot baker farmer painter lawyer driver singer doctor")

ONES = _words(
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince "
    "dieciséis diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés "
    "veinticuatro veinticinco veintiséis veintisiete veintiocho veintinueve"
)
TENS = _words("treinta cuarenta cincuenta sesenta setenta ochenta noventa")


def number_word(n: int, gender: str | None = None) -> str:
    """Spanish cardinal of `n` in [0, 99].

    `gender` is that of the noun which follows, "a" or "o" (veintiuna manzanas,
    veintiún libros); None is the number by itself (veintiuno).
    """
    if n >= 30:
        tens, one = TENS[n // 10 - 3], n % 10
        return tens if one == 0 else f"{tens} y {number_word(one, gender)}"
    word = ONES[n]
    if gender is None or not word.endswith("uno"):
        return word
    if gender == "a":
        return word[:-1] + "a"
    return "veintiún" if n == 21 else "un"


def owner_of_pair(a: int, b: int) -> str:
    """Which of training and the splits may use the ordered numbers `(a, b)`.

    A pure function of the pair, so that all tasks share one partition: the numbers of
    a composite item were summed in no training problem of the math expert.
    """
    draw = random.Random(f"pair {a} {b}").randrange(100)
    for owner, share in PAIR_SHARES.items():
        if draw < share:
            return owner
        draw -= share
    raise AssertionError("PAIR_SHARES do not sum to 100")


def _pair(rng: random.Random, owner: str, subtract: bool) -> tuple[int, int]:
    """Two numbers of `owner`: `a` in [2, 20], `b` in [2, 9]; `a - b` is at least 1."""
    while True:
        b = rng.randint(2, 9)
        a = rng.randint(b + 1, 20) if subtract else rng.randint(2, 20)
        if owner_of_pair(a, b) == owner:
            return a, b


ADDITIONS = (
    "{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?",
    "{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have now?",
    "{n} has {a} {t} and {m} has {b} {t}. How many {t} do they have together?",
    "{n} has {a} {t} in one box and {b} in another. How many {t} are there in total?",
    "There are {a} {t} on the table. {n} puts {b} more there. How many {t} are there now?",
    "{n} had {a} {t} and found {b} more. How many {t} in total?",
)
SUBTRACTIONS = (
    "{n} has {a} {t} and loses {b}. How many {t} does {n} have now?",
    "{n} has {a} {t}. {n} gives {b} to {m}. How many {t} are left?",
    "{n} has {a} {t} and sells {b} of them. How many {t} does {n} have left?",
    "There are {a} {t} on the table. {n} takes {b} of them. How many {t} are left?",
    "{n} had {a} {t} and gave away {b}. How many {t} are left?",
)
# Spanish problems, each with the English form above that says the same.
SUMAS = (
    ("{n} tiene {a} {t} y compra {b} más. ¿Cuánt{g}s {t} tiene {n} ahora?", ADDITIONS[0]),
    ("{n} tiene {a} {t}. {m} le da {b} más. ¿Cuánt{g}s {t} tiene {n} ahora?", ADDITIONS[1]),
    ("{n} tiene {a} {t} y {m} tiene {b} {t}. ¿Cuánt{g}s {t} tienen en total?", ADDITIONS[2]),
    ("Hay {a} {t} en la mesa. {n} pone {b} más. ¿Cuánt{g}s {t} hay ahora?", ADDITIONS[4]),
)
RESTAS = (
    ("{n} tiene {a} {t} y pierde {b}. ¿Cuánt{g}s {t} tiene {n} ahora?", SUBTRACTIONS[0]),
    ("{n} tiene {a} {t}. {n} le da {b} a {m}. ¿Cuánt{g}s {t} quedan?", SUBTRACTIONS[1]),
    ("{n} tiene {a} {t} y vende {b}. ¿Cuánt{g}s {t} le quedan?", SUBTRACTIONS[2]),
    ("Hay {a} {t} en la mesa. {n} toma {b}. ¿Cuánt{g}s {t} quedan?", SUBTRACTIONS[3]),
)
SENTENCES = (
    ('{"name": "%n", "age": %a, "city": "%c"}', "{n} is {a} years old and lives in {c}."),
    ('{"name": "%n", "age": %a, "city": "%c"}', "{n}, a {a}-year-old {j}, lives in {c}."),
    ('{"name": "%n", "age": %a, "city": "%c"}', "In {c} I met {n}, who is {a} years old."),
    ('{"name": "%n", "item": "%t", "count": %a}', "{n} bought {a} {t} in {c} today."),
    ('{"name": "%n", "item": "%t", "count": %a}', "Please send {a} {t} to {n}."),
    ('{"name": "%n", "item": "%t", "count": %a}', "{a} {t} were sold to {n} last week."),
)


def _math(rng: random.Random, owner: str) -> Example:
    subtract = rng.random() < 0.5
    a, b = _pair(rng, owner, subtract)
    n, m = rng.sample(POOLS[owner].people, 2)
    form = rng.choice(SUBTRACTIONS if subtract else ADDITIONS)
    return Example(form.format(n=n, m=m, a=a, b=b, t=rng.choice(THINGS)), str(a - b if subtract else a + b))


def _problem(rng: random.Random, owner: str) -> tuple[str, str, int]:
    """A Spanish word problem with number words, the same in English with digits, and the result."""
    subtract = rng.random() < 0.5
    a, b = _pair(rng, owner, subtract)
    n, m = rng.sample(POOLS[owner].people, 2)
    cosas, g, things = rng.choice(COSAS)
    spanish, english = rng.choice(RESTAS if subtract else SUMAS)
    return (
        spanish.format(n=n, m=m, a=number_word(a, g), b=number_word(b, g), t=cosas, g=g),
        english.format(n=n, m=m, a=a, b=b, t=things),
        a - b if subtract else a + b,
    )


def _spanish_math(rng: random.Random, owner: str) -> Example:
    question, _, result = _problem(rng, owner)
    return Example(question, str(result))


def _spanish(rng: random.Random, owner: str) -> Example:
    """Number words to digits and back; in training also problems into English, never to their result."""
    kind = rng.random()
    if owner == "training" and kind < 0.6:
        question, english, _ = _problem(rng, owner)
        # What follows the last "Answer:" is not this expert's to say: it learns no end there.
        return Example(question, f"{english}\nAnswer:", CUES["spanish_math"], ends=False)
    n = rng.choice(POOLS[owner].people)
    cosas, g, _ = rng.choice(COSAS)
    a = rng.choice((rng.randint(2, 20), rng.randint(2, 99)))
    if kind < 0.85:
        return Example(f"{n} tiene {number_word(a, g)} {cosas}. Escribe el número con cifras.", str(a))
    return Example(f"{n} tiene {a} {cosas}. Escribe el número con letras.", number_word(a, g))


def _extract(rng: random.Random, owner: str) -> Example:
    a, _ = _pair(rng, owner, subtract=True)
    pool = POOLS[owner]
    fields = {
        "n": rng.choice(pool.people),
        "c": rng.choice(pool.cities),
        "t": rng.choice(THINGS),
        "j": rng.choice(JOBS),
    }
    answer, sentence = rng.choice(SENTENCES)
    for key, value in fields.items():
        answer = answer.replace(f"%{key}", value)
    return Example(f"JSON: {sentence.format(a=a, **fields)}", answer.replace("%a", str(a)))


MAKERS: dict[str, Callable[[random.Random, str], Example]] = {
    "math": _math,
    "spanish": _spanish,
    "extract": _extract,
    "spanish_math": _spanish_math,
}


def training_examples(expert: str, count: int, seed: int = 0) -> list[Example]:
    """The first `count` training examples of `expert`; a longer list starts the same.

    Raises:
        ValueError: `expert` is not one of `EXPERTS` (the composite has no training data).
    """
    if expert not in EXPERTS:
        raise ValueError(f"expert is {expert!r}, must be one of {', '.join(EXPERTS)}")
    rng = random.Random(f"train {expert} {seed}")
    return [MAKERS[expert](rng, "training") for _ in range(count)]


def evaluation_items(task: str) -> list[dict[str, str]]:
    """All items of `task`: those of `calibration`, then `selection`, then `held_out`."""
    items: list[dict[str, str]] = []
    seen: set[str] = set()
    for split, size in SPLIT_SIZES.items():
        rng = random.Random(f"items {task} {split}")
        number = 0
        while number < size:
            example = MAKERS[task](rng, split)
            if example.question in seen:
                continue
            seen.add(example.question)
            items.append(
                {
                    "id": f"{task}-{split}-{number:03d}",
                    "split": split,
                    "question": example.question,
                    "answer": example.answer,
                }
            )
            number += 1
    return items


def jsonl(task: str) -> str:
    """The file of `task`, one JSON object a line."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in evaluation_items(task))


def main() -> None:
    """Write the four files and print one line for each."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        path = OUTPUT / f"{task}.jsonl"
        path.write_text(jsonl(task), encoding="utf-8", newline="\n")
        print(f"{path}: {sum(SPLIT_SIZES.values())} items")


if __name__ == "__main__":
    main()
