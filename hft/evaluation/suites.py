"""The benchmarks of each suite, which of lm-eval's results is their score, and the settings that they run under."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hft.config import option
from hft.evaluation.drawn import prepare_tydiqa

# Metrics that are not percentages; of these, less is better.
METRIC_UNITS = {"loss": "nats/token", "kl": "nats/token", "choice_loss": "nats/question"}


@dataclass(frozen=True)
class Settings:
    """How a suite is run; the flags of `hft eval`."""

    limit: int | None = option("Rows of each task; default: all.")
    paper_subsets: bool = option("GSM8K 200, BBH 40 a task, TyDiQA 100 a language.", False)
    tasks: list[str] = field(
        default_factory=list, metadata={"help": "Benchmarks, lm-eval's tasks (NAME:METRIC) or YAML files."}
    )
    max_gen_toks: int | None = option("Most tokens of an answer; default: the task's.")
    chat: bool | None = option("Use the chat template; default: if any, not in quick.")
    dtype: Literal["bfloat16", "float16", "float32", "auto"] | None = option(
        "Of the model; default: bfloat16 on GPUs, else float32."
    )
    batch_size: int = option("Rows per forward pass.", 8)
    backend: str = option("lm-eval's engine, hf or vllm.", "hf")
    backend_args: dict[str, Any] = field(default_factory=dict, metadata={"help": "Further engine arguments, as JSON."})
    base: str | None = option("What the models were tuned from; default: by manifest.")
    task_data: str | None = option("A run with held-out rows, for models without any.")
    data: str | None = option("Folder of JSON Lines files to score on, not the Hub.")
    allow_code: bool = option("Run generated code (HumanEval, MBPP).", False)
    log_samples: bool = option("Keep each row's outcome, in scores/.", True)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of a suite."""

    name: str  # under which its scores are saved
    task: str  # the lm-eval task or group
    # By name lm-eval's key, `metric,filter`; the first is the benchmark's score. Empty: all that lm-eval computes.
    metrics: Mapping[str, str] = field(default_factory=dict)
    folders: tuple[str, ...] = ()  # below `lm_eval/tasks`, those that hold the task; none for a task of ours
    num_fewshot: int | None = None  # examples in the prompt; None for the task's own number
    paper_rows: int | None = None  # rows of each subtask where the HFT paper's evaluation takes a subset
    parts: Mapping[str, str] = field(default_factory=dict)  # subtasks whose scores are saved too, by our name
    has_chat_task: bool = False  # under a chat template its prompt is another: that of the task TASK_chat
    turns: bool = False  # under a chat template the examples are turns, not one user message
    instruction: str | None = None  # what the prompt starts with, before what the task says
    prepare: Callable[..., None] | None = None  # changes the rows of the tasks, for a tokenizer and a random generator
    runs_code: bool = False
    spec: dict[str, Any] | None = None  # its config as lm-eval takes it, where it differs from the task's
    rendered: bool = False  # whether its prompts are rendered by a chat template already
    only: str | None = None  # the metric that was asked for, of all that lm-eval computes


LOSS = {"loss": "loss,none"}
ACC = {"acc": "acc,none"}
EXACT = {"exact_match": "exact_match,none"}
CONTAINS = {"contains": "contains,none"}
PASS = {"pass@1": "pass@1,code"}
F1 = {"f1": "f1,none", "exact_match": "exact_match,none"}
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
        Benchmark("mmlu_0shot", *MMLU_OPEN_INSTRUCT, num_fewshot=0, has_chat_task=True),
        Benchmark("mmlu_5shot", *MMLU_OPEN_INSTRUCT, num_fewshot=5, has_chat_task=True),
        Benchmark("gsm8k", "hft_gsm8k_open_instruct", EXACT, ("gsm8k",), paper_rows=200, has_chat_task=True),
        Benchmark("bbh", "hft_bbh_open_instruct", EXACT, BBH, paper_rows=40),
        Benchmark(
            *("tydiqa", "hft_tydiqa_open_instruct", F1, ("tydiqa",)),
            num_fewshot=1,
            paper_rows=100,
            has_chat_task=True,
            prepare=prepare_tydiqa,
        ),
        Benchmark("truthfulqa", "hft_truthfulqa_open_instruct", ACC, ("truthfulqa",)),
        Benchmark(
            "humaneval",
            "hft_humaneval_open_instruct",
            {"pass@10": "pass@10,code", "pass@1": "pass@1,code"},
            has_chat_task=True,
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
        Benchmark("triviaqa", "hft_triviaqa_opencompass", CONTAINS, has_chat_task=True),
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
        Benchmark("mbpp", "hft_mbpp_opencompass", PASS, has_chat_task=True, turns=True, runs_code=True),
        Benchmark("livecodebench", "hft_execution_opencompass", {"pass@1": "pass@1,none"}),
        Benchmark("math", "hft_math_opencompass", EXACT, ("minerva_math",), turns=True),
    ),
}
