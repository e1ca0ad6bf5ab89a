"""Small tasks that a small model learns in seconds: eight in TRACE's form, and three as conversations."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from hft.demo.data import as_messages
from hft.jsonl import write_jsonl

ANIMALS = ["ant", "bee", "cat", "dog", "elk", "fox", "goat", "hen", "owl", "pig", "rat", "seal"]
PLANTS = ["ash", "bean", "corn", "fern", "iris", "kale", "lily", "moss", "oak", "pea", "rice", "vine"]
TOOLS = ["axe", "bolt", "cart", "drum", "file", "hook", "lamp", "nail", "pump", "rope", "saw", "wire"]
WORDS = ANIMALS + PLANTS + TOOLS
TRAIN_ROWS, TEST_ROWS = 400, 64

Make = Callable[[random.Random], tuple[str, str]]  # draws an input and its answer


def _of_two_words(answer: Callable[[list[str]], str]) -> Make:
    def make(rng: random.Random) -> tuple[str, str]:
        words = rng.sample(WORDS, 2)
        return " ".join(words), answer(words)

    return make


def _next(rng: random.Random) -> tuple[str, str]:
    number = rng.randrange(1000)
    return str(number), str(number + 1)


def _larger(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(100), 2)
    return f"{numbers[0]} {numbers[1]}", str(max(numbers))


def _lookup(rng: random.Random) -> tuple[str, str]:
    words, numbers = rng.sample(WORDS, 2), rng.sample(range(10), 2)
    pairs = ", ".join(f"{word} {number}" for word, number in zip(words, numbers, strict=True))
    asked = rng.randrange(2)
    return f"{pairs}: {words[asked]}", str(numbers[asked])


def _sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randrange(100), rng.randrange(100)
    return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."


def _reverse(rng: random.Random) -> tuple[str, str]:
    word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))
    return f"Write {' '.join(word)} backwards.", " ".join(reversed(word))


def _sort(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(10, 100), k=5)
    return f"Sort these numbers: {' '.join(map(str, numbers))}", " ".join(map(str, sorted(numbers)))


# The instruction, and what makes its inputs and answers.
TASKS: dict[str, tuple[str, Make]] = {
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
CHAT_TASKS: dict[str, Make] = {"sum": _sum, "reverse": _reverse, "sort": _sort}


def _splits(task: str, make: Make) -> dict[str, list[tuple[str, str]]]:
    """Different inputs of a task with their answers, always the same ones."""
    rng, made = random.Random(task), {}
    while len(made) < TRAIN_ROWS + TEST_ROWS:
        question, answer = make(rng)
        made[question] = answer
    rows = list(made.items())
    return {"train": rows[:TRAIN_ROWS], "test": rows[TRAIN_ROWS:]}


def write_tasks(folder: str | Path) -> dict[str, int]:
    """Write `TASK/{train,test}` of `TASKS` as .json and of `CHAT_TASKS` as .jsonl; returns the rows of each file."""
    counts = {}
    for task, (instruction, make) in TASKS.items():
        for split, pairs in _splits(task, make).items():
            rows = [{"prompt": f"{instruction}\n{text}\nAnswer:", "answer": answer} for text, answer in pairs]
            path = Path(folder) / task / f"{split}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")
            counts[f"{task}/{split}.json"] = len(rows)
    for task, make in CHAT_TASKS.items():
        for split, pairs in _splits(task, make).items():
            name = f"{task}/{split}.jsonl"
            counts[name] = write_jsonl(Path(folder, name), (as_messages(*pair) for pair in pairs))
    return counts
