"""Metrics of TRACE's tasks: an answer, a reference and the prompt in, 0 to 1 out; and a task as lm-eval's benchmark.

TRACE scores the raw text that the model generates (A.3.2 of the HFT paper; inference code of BeyonderXX/TRACE). An
empty answer scores 0.
"""

import re
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

from hft.errors import HFTError
from hft.evaluation.rows import as_dataset
from hft.evaluation.suites import Benchmark
from hft.methods.strategy import Row

SUITE = "trace"
# A capital letter that stands alone; no Latin letter may touch it, a Chinese one may.
OPTION = re.compile(r"(?<![A-Za-z])[A-E](?![A-Za-z])")
# Py150 writes literals as <STR_LIT>, <NUM_LIT>, or with a frequent value: <STR_LIT:utf-8>.
VALUE_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>")


def accuracy(answer: str, reference: str, prompt: str = "") -> float:
    """Whether the answer is the reference, character by character: a leading space counts."""
    return float(answer == reference)


def first_character(answer: str, reference: str, prompt: str = "") -> float:
    """Whether the first characters agree: TRACE's accuracy on ScienceQA, whose references give a reason too."""
    return float(answer[:1] == reference[:1] != "")


def first_letter(answer: str, reference: str, prompt: str = "") -> float:
    """Whether the first option letter of the answer is that of the reference, whatever stands around it."""
    found, wanted = OPTION.search(answer), OPTION.search(reference)
    return float(bool(found and wanted) and found[0] == wanted[0])


def rouge_l(answer: str, reference: str, prompt: str = "") -> float:
    """ROUGE-L F1 (rouge-score) over lowercase words of any alphabet; on English those of rouge-score itself."""
    from rouge_score.rouge_scorer import RougeScorer

    # Its own tokenizer drops every letter but a to z, and with it German umlauts.
    scorer = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=words))
    return scorer.score(reference, answer)["rougeL"].fmeasure


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def edit_similarity(answer: str, reference: str, prompt: str = "") -> float:
    """Similarity of two lines of code (rapidfuzz's `ratio`), literals normalized as in CodeXGLUE's Py150.

    A string becomes nothing, a number 0, and both their value where the token has one.
    """
    from rapidfuzz.fuzz import ratio

    def normalized(code: str) -> str:
        code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
        return VALUE_LITERAL.sub(r"\1", code)

    return ratio(normalized(answer), normalized(reference)) / 100 if answer else 0.0


def sari(answer: str, reference: str, prompt: str) -> float:
    """SARI (Xu et al. 2016, TACL) as Hugging Face's metric computes it, averaged over n-grams of 1 to 4 words.

    For each n the mean of F1 of what is kept, F1 of what is added, and precision of what is deleted. What is to be
    simplified is the prompt without its first and its last line, which instruct.
    """
    source = "\n".join(prompt.split("\n")[1:-1]) or prompt
    texts = [words(text) for text in (source, answer, reference)]
    total = 0.0
    for n in range(1, 5) if texts[1] else ():
        before, now, wanted = (Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in texts)
        kept, deleted, added = before & now, before - now, now.keys() - before.keys()
        right, should_add = kept & wanted, wanted.keys() - before.keys()
        keep = _f1(_mean_share(right, kept), _share(right.total(), (before & wanted).total()))
        add = _f1(_share(len(added & should_add), len(added)), _share(len(added & should_add), len(should_add)))
        total += (keep + _mean_share(deleted - wanted, deleted) + add) / 3
    return total / 4


def _mean_share(part: Counter, whole: Counter) -> float:
    return _share(sum(part[ngram] / whole[ngram] for ngram in part), len(whole))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


# What a task may be scored by; the first one is its score.
METRICS: dict[str, dict[str, Callable[[str, str, str], float]]] = {
    "accuracy": {"accuracy": accuracy},
    "choice": {"accuracy": accuracy, "first_letter": first_letter},
    "choice_and_reason": {"accuracy": first_character, "first_letter": first_letter},
    "rouge_l": {"rouge_l": rouge_l},
    "edit_similarity": {"edit_similarity": edit_similarity},
    "sari": {"sari": sari, "rouge_l": rouge_l},
}
TRACE = {  # the metric of each of its tasks (A.3.2)
    "C-STANCE": "choice",
    "FOMC": "choice",
    "MeetingBank": "rouge_l",
    "Py150": "edit_similarity",
    "ScienceQA": "choice_and_reason",
    "NumGLUE-cm": "accuracy",
    "NumGLUE-ds": "accuracy",
    "20Minuten": "rouge_l",
}


def metrics_of(tasks: list[str], given: dict[str, str]) -> dict[str, str]:
    """The key of `METRICS` that each task is scored by: the one that was given, or TRACE's."""
    chosen = {task: given.get(task) or TRACE.get(task) for task in tasks}
    for task, metric in chosen.items():
        if metric not in METRICS:
            known = f"unknown metric {metric!r} of {task}" if metric else f"{task} is not in TRACE and has no metric"
            raise HFTError(f"{known}; give one of {', '.join(METRICS)}, as --metrics '{{{task}: accuracy}}'")
    return chosen


def benchmark_of(task: str, rows: list[Row], metric: str, longest_answer: int) -> Benchmark:
    """A task of a sequence, whose first metric is its score."""
    metrics = METRICS[metric]

    def results(row: Row, answers: list[str]) -> dict[str, float]:
        return {name: of(answers[0], row["completion"], row["prompt"]) for name, of in metrics.items()}

    spec = {
        "task": f"{SUITE}_{task}",
        "custom_dataset": as_dataset(test=rows),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "context",
        "doc_to_target": "completion",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": longest_answer},
        "process_results": results,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        "metadata": {"version": 1.0},
    }
    return Benchmark(task, f"{SUITE}_{task}", {name: f"{name},none" for name in metrics}, spec=spec, rendered=True)
