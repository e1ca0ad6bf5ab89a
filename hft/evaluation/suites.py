"""The benchmarks of each suite, and which of lm-eval's results is their score."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hft.evaluation.drawn import prepare_tydiqa

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
    chat_task: str | None = None  # the task under a chat template, where its prompt is another
    turns: bool = False  # under a chat template the examples are turns, not one user message
    instruction: str | None = None  # what the prompt starts with, before what the task says
    prepare: Callable[..., None] | None = None  # changes the rows of the tasks, for a tokenizer and a random generator
    runs_code: bool = False
    spec: dict[str, Any] | None = None  # its config as lm-eval takes it, where it differs from the task's
    rendered: bool = False  # whether its prompts are rendered by a chat template already

    @property
    def is_ours(self) -> bool:
        """Whether it says itself which of lm-eval's results are its metrics."""
        return bool(self.metrics) and all("," in key for key in self.metrics.values())


LOSS = {"loss": "loss,none"}
ACC = {"acc": "acc,none"}
EXACT = {"exact_match": "exact_match,none"}
CONTAINS = {"contains": "contains,none"}
PASS = {"pass@1": "pass@1,code"}
CLOSED_BOOK = {"exact_match": "exact_match,remove_whitespace"}
MMLU, BBH = ("mmlu/default",), ("bbh/cot_fewshot",)
MMLU_OPEN_INSTRUCT = ("hft_mmlu_open_instruct", ACC, MMLU)
FOLLOW_EXAMPLES = "Follow the given examples and answer the question.\n"

# Whose prompts and rules a suite has; docs/evaluation.md says for each table of the HFT paper what is exact.
PROTOCOLS = {"quick": "hft", "general": "open-instruct", "knowledge": "lm-eval", "recent": "opencompass"}

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
        Benchmark("mmlu_0shot", *MMLU_OPEN_INSTRUCT, num_fewshot=0, chat_task="hft_mmlu_open_instruct_chat"),
        Benchmark("mmlu_5shot", *MMLU_OPEN_INSTRUCT, num_fewshot=5, chat_task="hft_mmlu_open_instruct_chat"),
        Benchmark(
            "gsm8k",
            "hft_gsm8k_open_instruct",
            EXACT,
            ("gsm8k",),
            paper_rows=200,
            chat_task="hft_gsm8k_open_instruct_chat",
        ),
        Benchmark("bbh", "hft_bbh_open_instruct", EXACT, BBH, paper_rows=40),
        Benchmark(
            "tydiqa",
            "hft_tydiqa_open_instruct",
            {"f1": "f1,none", "exact_match": "exact_match,none"},
            ("tydiqa",),
            num_fewshot=1,
            paper_rows=100,
            chat_task="hft_tydiqa_open_instruct_chat",
            prepare=prepare_tydiqa,
        ),
        Benchmark("truthfulqa", "hft_truthfulqa_open_instruct", ACC, ("truthfulqa",)),
        Benchmark(
            "humaneval",
            "hft_humaneval_open_instruct",
            {"pass@10": "pass@10,code", "pass@1": "pass@1,code"},
            chat_task="hft_humaneval_open_instruct_chat",
            runs_code=True,
        ),
    ),
    "knowledge": (
        Benchmark("nq_open", "nq_open", CLOSED_BOOK, ("nq_open",), num_fewshot=0),
        Benchmark("triviaqa", "triviaqa", CLOSED_BOOK, ("triviaqa",), num_fewshot=0),
        Benchmark("hotpotqa", "hft_hotpotqa", CLOSED_BOOK, num_fewshot=0),
    ),
    # A.4.9 to A.4.12, Tables 16 to 23.
    "recent": (
        Benchmark("mmlu", "hft_mmlu_opencompass", ACC, MMLU, num_fewshot=5, turns=True),
        Benchmark("hellaswag", "hft_hellaswag_opencompass", ACC, ("hellaswag",)),
        Benchmark("gsm8k", "hft_gsm8k_opencompass", EXACT, turns=True),
        Benchmark("bbh", "hft_bbh_opencompass", EXACT, BBH, instruction=FOLLOW_EXAMPLES),
        Benchmark("nq", "hft_nq_opencompass", CONTAINS),
        Benchmark("triviaqa", "hft_triviaqa_opencompass", CONTAINS, chat_task="hft_triviaqa_opencompass_chat"),
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
        Benchmark("humaneval_greedy", "hft_humaneval_opencompass", PASS, runs_code=True),
        Benchmark(
            "mbpp", "hft_mbpp_opencompass", PASS, chat_task="hft_mbpp_opencompass_chat", turns=True, runs_code=True
        ),
        Benchmark("livecodebench", "hft_execution_opencompass", {"pass@1": "pass@1,none"}),
        Benchmark("math", "hft_math_opencompass", EXACT, ("minerva_math",), turns=True),
    ),
}
