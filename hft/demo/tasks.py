"""Small tasks that a small model learns in seconds: eight in TRACE's form, and three as conversations."""

import json
import random
from pathlib import Path

from hft.demo.data import as_messages
from hft.jsonl import write_jsonl

ANIMALS = ["ant", "bee", "cat", "dog", "elk", "fox", "goat", "hen", "owl", "pig", "rat", "seal"]
PLANTS = ["ash", "bean", "corn", "fern", "iris", "kale", "lily", "moss", "oak", "pea", "rice", "vine"]
TOOLS = ["axe", "bolt", "cart", "drum", "file", "hook", "lamp", "nail", "pump", "rope", "saw", "wire"]
WORDS = ANIMALS + PLANTS + TOOLS
TRAIN_ROWS, TEST_ROWS = 400, 64

INSTRUCTIONS = {
    "Swap": "Swap the words.",
    "Larger": "Which number is larger?",
    "First": "Give the first word.",
    "Kind": "What is the first word? A. animal, B. plant, C. tool. Choose one.",
    "List": "Write the words as a list.",
    "Next": "Give the next number.",
    "Lookup": "Give the number of the last word.",
    "Last": "Give the last word.",
}
CHAT_TASKS = ("sum", "reverse", "sort")


def draw(task: str, rng: random.Random) -> tuple[str, str]:
    """An input of a task, and its answer."""
    match task:
        case "Next":
            number = rng.randrange(1000)
            return str(number), str(number + 1)
        case "Larger":
            a, b = rng.sample(range(100), 2)
            return f"{a} {b}", str(max(a, b))
        case "Lookup":
            (one, two), (a, b) = rng.sample(WORDS, 2), rng.sample(range(10), 2)
            asked, answer = rng.choice([(one, a), (two, b)])
            return f"{one} {a}, {two} {b}: {asked}", str(answer)
        case "sum":
            a, b = rng.randrange(100), rng.randrange(100)
            return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."
        case "reverse":
            word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))
            return f"Write {' '.join(word)} backwards.", " ".join(reversed(word))
        case "sort":
            numbers = rng.sample(range(10, 100), k=5)
            return f"Sort these numbers: {' '.join(map(str, numbers))}", " ".join(map(str, sorted(numbers)))
    first, last = rng.sample(WORDS, 2)
    answers = {"Swap": f"{last} {first}", "First": first, "Last": last, "List": f"[{first}, {last}]"}
    answers["Kind"] = "ABC"[WORDS.index(first) // len(ANIMALS)]
    return f"{first} {last}", answers[task]


def write_tasks(folder: str | Path) -> None:
    """Write `TASK/{train,test}`, as .json in TRACE's form or as .jsonl of conversations."""
    for task in (*INSTRUCTIONS, *CHAT_TASKS):
        rng, drawn = random.Random(task), {}
        while len(drawn) < TRAIN_ROWS + TEST_ROWS:  # different inputs
            question, answer = draw(task, rng)
            drawn[question] = answer
        pairs = list(drawn.items())
        for split, some in (("train", pairs[:TRAIN_ROWS]), ("test", pairs[TRAIN_ROWS:])):
            path = Path(folder, task, split)
            if task in CHAT_TASKS:
                write_jsonl(path.with_suffix(".jsonl"), (as_messages(*pair) for pair in some))
            else:
                rows = [{"prompt": f"{INSTRUCTIONS[task]}\n{text}\nAnswer:", "answer": answer} for text, answer in some]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_suffix(".json").write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")
