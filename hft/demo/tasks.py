"""Eight tasks in TRACE's form that a small model learns in seconds: strings, numbers, lookup and format."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

ANIMALS = ["ant", "bee", "cat", "dog", "elk", "fox", "goat", "hen", "owl", "pig", "rat", "seal"]
PLANTS = ["ash", "bean", "corn", "fern", "iris", "kale", "lily", "moss", "oak", "pea", "rice", "vine"]
TOOLS = ["axe", "bolt", "cart", "drum", "file", "hook", "lamp", "nail", "pump", "rope", "saw", "wire"]
WORDS = ANIMALS + PLANTS + TOOLS
TRAIN_ROWS, TEST_ROWS = 400, 64


def _two_words(rng: random.Random) -> list[str]:
    return rng.sample(WORDS, 2)


def _of_two_words(answer: Callable[[list[str]], str]) -> Callable[[random.Random], tuple[str, str]]:
    """A task whose input is two words."""

    def make(rng: random.Random) -> tuple[str, str]:
        words = _two_words(rng)
        return " ".join(words), answer(words)

    return make


def _next(rng: random.Random) -> tuple[str, str]:
    number = rng.randrange(1000)
    return str(number), str(number + 1)


def _larger(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(100), 2)
    return f"{numbers[0]} {numbers[1]}", str(max(numbers))


def _lookup(rng: random.Random) -> tuple[str, str]:
    words, numbers = _two_words(rng), rng.sample(range(10), 2)
    pairs = ", ".join(f"{word} {number}" for word, number in zip(words, numbers, strict=True))
    asked = rng.randrange(2)
    return f"{pairs}: {words[asked]}", str(numbers[asked])


# Name, instruction, and a function that makes an input and its answer.
TASKS: dict[str, tuple[str, Callable[[random.Random], tuple[str, str]]]] = {
    "Swap": ("Swap the words.", _of_two_words(lambda words: " ".join(reversed(words)))),
    "Larger": ("Which number is larger?", _larger),
    "First": ("Give the first word.", _of_two_words(lambda words: words[0])),
    "Kind": (
        "What is the first word? A. animal, B. plant, C. tool. Choose one.",
        _of_two_words(lambda words: "ABC"[WORDS.index(words[0]) // len(ANIMALS)]),
    ),
    "List": ("Write the words as a list.", _of_two_words(lambda words: f"[{', '.join(words)}]")),
    "Next": ("Give the next number.", _next),
    "Lookup": ("Give the number of the last word.", _lookup),
    "Last": ("Give the last word.", _of_two_words(lambda words: words[1])),
}
METRICS = {name: "choice" if name == "Kind" else "accuracy" for name in TASKS}


def rows_of_task(task: str, count: int) -> list[dict[str, str]]:
    """That many different rows of a task, always the same ones."""
    instruction, make = TASKS[task]
    rng, made = random.Random(task), {}
    while len(made) < count:
        text, answer = make(rng)
        made[f"{instruction}\n{text}\nAnswer:"] = answer
    return [{"prompt": prompt, "answer": answer} for prompt, answer in made.items()]


def write_tasks(folder: str | Path) -> dict[str, int]:
    """Write `TASK/{train,test}.json` below a folder; returns the number of rows of each file."""
    counts = {}
    for task in TASKS:
        rows = rows_of_task(task, TRAIN_ROWS + TEST_ROWS)
        (Path(folder) / task).mkdir(parents=True, exist_ok=True)
        for split, part in (("train", rows[:TRAIN_ROWS]), ("test", rows[TRAIN_ROWS:])):
            (Path(folder) / task / f"{split}.json").write_text(json.dumps(part, indent=0) + "\n", encoding="utf-8")
            counts[f"{task}/{split}.json"] = len(part)
    return counts
