"""The benchmarks of each suite, and which of lm-eval's results is their score."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Metrics that are not percentages; of these, less is better.
METRIC_UNITS = {"loss": "nats/token", "kl": "nats/token", "choice_loss": "nats/question"}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of a suite."""

    name: str  # under which its scores are saved
    task: str  # the lm-eval task or group
    metrics: Mapping[str, str]  # by name lm-eval's key, `metric,filter`; the first is the benchmark's score
    folders: tuple[str, ...] = ()  # below `lm_eval/tasks`, those that hold the task; none for a task of ours
    num_fewshot: int | None = None  # examples in the prompt; None for the task's own number
    paper_rows: int | None = None  # rows of each subtask where the HFT paper's evaluation takes a subset
    parts: Mapping[str, str] = field(default_factory=dict)  # subtasks whose scores are saved too, by our name
    runs_code: bool = False
    spec: dict[str, Any] | None = None  # its config as lm-eval takes it, where it differs from the task's
    digest: str | None = None  # SHA-256 of its rows, where a change of them means to score again


LOSS = {"loss": "loss,none"}
CLOSED_BOOK = {"exact_match": "exact_match,remove_whitespace"}
BBH = ("bbh/cot_fewshot",)

# Quick's last three read rows that depend on the model and the run (hft.evaluation.rows).
SUITES: dict[str, tuple[Benchmark, ...]] = {
    "quick": (
        Benchmark(
            "facts",
            "hft_facts",
            {"acc": "acc,none", "acc_centered": "acc_centered,none", "choice_loss": "choice_loss,none"},
            parts={f"facts_{kind}": f"hft_facts_{kind}" for kind in ("capitals", "currencies", "elements")},
        ),
        Benchmark("drift", "hft_drift", LOSS),
        Benchmark("task", "hft_task", LOSS),
        Benchmark("kl", "hft_kl", {"kl": "kl,none"}),
    ),
    # A.3.2. On 200 rows of GSM8K, 40 of each BBH task and 100 of each TyDiQA language, as in open-instruct's scripts,
    # which the paper follows.
    "general": (
        Benchmark("mmlu_0shot", "mmlu", {"acc": "acc,none"}, ("mmlu/default",), num_fewshot=0),
        Benchmark("mmlu_5shot", "mmlu", {"acc": "acc,none"}, ("mmlu/default",), num_fewshot=5),
        Benchmark(
            "gsm8k",
            "gsm8k_cot",
            {"exact_match": "exact_match,flexible-extract", "exact_match_strict": "exact_match,strict-match"},
            ("gsm8k",),
            paper_rows=200,
        ),
        Benchmark("bbh", "bbh_cot_fewshot", {"exact_match": "exact_match,get-answer"}, BBH, paper_rows=40),
        Benchmark(
            "tydiqa",
            "hft_tydiqa",
            {"f1": "f1,none", "exact_match": "exact_match,none"},
            ("tydiqa",),
            num_fewshot=1,
            paper_rows=100,
        ),
        Benchmark("truthfulqa", "truthfulqa_mc2", {"acc": "acc,none"}, ("truthfulqa",)),
        Benchmark("humaneval", "hft_humaneval", {"pass@10": "pass@10,code", "pass@1": "pass@1,code"}, runs_code=True),
    ),
    "knowledge": (
        Benchmark("nq_open", "nq_open", CLOSED_BOOK, ("nq_open",), num_fewshot=0),
        Benchmark("triviaqa", "triviaqa", CLOSED_BOOK, ("triviaqa",), num_fewshot=0),
        Benchmark("hotpotqa", "hft_hotpotqa", CLOSED_BOOK, num_fewshot=0),
    ),
    # A.4.9, Tables 16-21.
    "recent": (
        Benchmark(
            "ifeval",
            "ifeval",
            {
                "prompt_strict": "prompt_level_strict_acc,none",
                "inst_strict": "inst_level_strict_acc,none",
                "prompt_loose": "prompt_level_loose_acc,none",
                "inst_loose": "inst_level_loose_acc,none",
            },
            ("ifeval",),
        ),
        Benchmark("mbpp", "hft_mbpp", {"pass@1": "pass@1,code"}, runs_code=True),
        Benchmark(
            "math",
            "minerva_math",
            {"exact_match": "exact_match,none", "math_verify": "math_verify,none"},
            ("minerva_math",),
        ),
        Benchmark("hellaswag", "hellaswag", {"acc_norm": "acc_norm,none", "acc": "acc,none"}, ("hellaswag",)),
    ),
}
