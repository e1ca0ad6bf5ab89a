"""What open-instruct (commit f342459) draws: a benchmark's rows, and TyDiQA's examples, whose passages it cuts."""

from collections.abc import Mapping
from random import Random
from typing import Any

DRAWING_SEED = 42
CONTEXT_TOKENS = 512


def draw_rows(sizes: Mapping[str, int], rows: int, random: Random) -> dict[str, list[int]]:
    """The rows of each task, which are drawn one task after the other, in alphabetical order."""
    return {name: random.sample(range(n), rows) if n > rows else list(range(n)) for name, n in sorted(sizes.items())}


def draw_examples(tasks: Mapping[str, Any], tokenizer: Any, random: Random) -> None:
    """Draw one example for each language, after the rows, and cut all passages.

    A passage that is cut starts with the tokenizer's BOS token, as in the original.
    """

    def cut(row: dict) -> dict:
        ids = tokenizer.encode(row["context"])
        return row | {"context": tokenizer.decode(ids[:CONTEXT_TOKENS])} if len(ids) > CONTEXT_TOKENS else row

    for _, task in sorted(tasks.items()):
        task.dataset[task.config.validation_split] = task.dataset[task.config.validation_split].map(cut)
        task.sampler.replace_df([cut(row) for row in random.sample(task.sampler.df, 1)])
