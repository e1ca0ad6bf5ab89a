"""pass@k of generated programs."""

import math
import os
from concurrent.futures import ThreadPoolExecutor

from hft.evaluation.sandbox import passes


def keep_all(resps, docs):
    """Every sample of a row, where lm-eval would keep the first."""
    return resps


def humaneval(doc, results) -> dict[str, float]:
    tests = f"\n{doc['test']}\ncheck({doc['entry_point']})"
    return pass_at([doc["prompt"] + sample + tests for sample in results[0]], (1, 10))


def mbpp(doc, results) -> dict[str, float]:
    tests = "\n".join(doc["test_list"])
    return pass_at([f"{sample.strip()}\n{tests}" for sample in results[0]], (1,))


def mbpp_shots(dataset):
    """The three rows that the MBPP paper (arXiv 2108.07732, section 4) shows: 2, 3 and 4 of the prompt split."""
    return dataset.filter(lambda row: row["task_id"] in (2, 3, 4))


def pass_at(programs: list[str], ks: tuple[int, ...]) -> dict[str, float]:
    """The unbiased estimate of pass@k (arXiv 2107.03374, equation 1) from n samples, for each k <= n."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        correct = sum(pool.map(passes, programs))
    n = len(programs)
    return {f"pass@{k}": 1 - math.comb(n - correct, k) / math.comb(n, k) for k in ks if k <= n}
