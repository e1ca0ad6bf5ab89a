"""`hft eval`: a command line in, an exit status out."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from hft.evaluation.evaluate import Settings, evaluate
from hft.evaluation.suites import SUITES
from hft.machine import is_main, leave_process_group, say
from hft.record.scores import Scores
from hft.runs.card import write_run_card
from hft.runs.result import RESULTS_NAME, RunResult


def main(arguments: Sequence[str]) -> int:
    """Score models, print the scores, and save each model's beside it."""
    parser = argparse.ArgumentParser(
        prog="hft eval", description="Score models with lm-evaluation-harness; scores are saved beside each model."
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help="a run, a model's folder, an adapter or a Hub id")
    parser.add_argument("--suite", choices=SUITES, default="quick", help="default: quick")
    parser.add_argument("--tasks", nargs="+", default=(), metavar="NAME", help="only these benchmarks of the suite")
    parser.add_argument("--limit", type=int, help="rows of each task")
    parser.add_argument("--max_gen_toks", type=int, help="most tokens of an answer; default: each task's own number")
    parser.add_argument("--paper_subsets", action="store_true", help="GSM8K 200, BBH 40 a task, TyDiQA 100 a language")
    parser.add_argument("--chat", choices=("true", "false"), help="use the chat template; default: if there is one")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per forward pass; default: 8")
    parser.add_argument("--backend", default="hf", help="lm-eval's engine, hf or vllm; default: hf")
    parser.add_argument(
        "--backend_args", default={}, type=json.loads, metavar="JSON", help="more arguments of the engine"
    )
    parser.add_argument("--base", help="what the models were tuned from; default: what their manifests say")
    parser.add_argument("--task_data", metavar="RUN", help="whose held-out rows a model that is not a run is scored on")
    parser.add_argument("--data", metavar="DIR", help="JSON Lines files of the benchmarks, instead of the Hub")
    parser.add_argument("--allow_code", action="store_true", help="run generated code (HumanEval, MBPP)")
    options = vars(parser.parse_args(arguments))
    models, suite = options.pop("models"), options.pop("suite")
    chat = options.pop("chat")
    settings = Settings(
        **options | {"tasks": tuple(options["tasks"]), "chat": None if chat is None else chat == "true"}
    )
    for model in models:
        out = folder_of(model)
        scores = evaluate(model, suite, settings, out)
        say("", table(scores), "", f"saved in {out}/scores/{suite}.json")
        if is_main():
            _record(scores, out)
    leave_process_group()
    return 0


def _record(scores: Scores, out: Path) -> None:
    """Add the scores to the model card and the wandb run of a run."""
    if not (out / RESULTS_NAME).exists():
        return
    result = RunResult.load(out)
    write_run_card(result, out)
    if result.wandb and os.environ.get("WANDB_MODE") != "disabled":
        from hft.runs.tracking import log_scores

        named = {f"{scores.suite}/{score.task}/{score.metric}": score.value for score in scores.scores}
        log_scores(result.wandb, named)


def folder_of(model: str) -> Path:
    """Where a model's scores are saved: its own folder; for a Hub id one of its name under runs/."""
    return Path(model) if Path(model).is_dir() else Path("runs", Path(model).name)


def table(scores: Scores) -> str:
    """The scores in columns."""
    lines = [f"{scores.model}, {scores.suite}, {scores.dtype}"]
    for score in scores.scores:
        error = "" if score.stderr is None else f"+- {score.stderr:.3f}"
        lines.append(
            f"  {score.task:18} {score.metric:18} {score.value:9.3f} {error:10} {score.unit:14} n = {score.n:,}"
        )
    return "\n".join(lines)
