"""Three small tasks as conversations, for recipes that need several: sums, words backwards, sorted numbers."""

from __future__ import annotations

import random
from pathlib import Path

from hft.jsonl import write_jsonl

ROWS_OF_SPLIT = {"train": 400, "test": 64}


def _sum(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randrange(100), draw.randrange(100)
    return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."


def _reverse(draw: random.Random) -> tuple[str, str]:
    word = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6))
    return f"Write {' '.join(word)} backwards.", " ".join(reversed(word))


def _sort(draw: random.Random) -> tuple[str, str]:
    numbers = draw.sample(range(10, 100), k=5)
    return f"Sort these numbers: {' '.join(map(str, numbers))}", " ".join(map(str, sorted(numbers)))


CHAT_TASKS = {"sum": _sum, "reverse": _reverse, "sort": _sort}


def write_conversations(folder: str | Path) -> dict[str, int]:
    """Write `tasks/TASK/{train,test}.jsonl` below a folder; returns the number of rows of each file."""
    counts = {}
    for task, make in CHAT_TASKS.items():
        draw, seen = random.Random(task), set()
        for split, count in ROWS_OF_SPLIT.items():
            rows = []
            while len(rows) < count:
                question, answer = make(draw)
                if question not in seen:
                    seen.add(question)
                    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                    rows.append({"messages": messages})
            name = f"tasks/{task}/{split}.jsonl"
            counts[name] = write_jsonl(Path(folder, name), rows)
    return counts
