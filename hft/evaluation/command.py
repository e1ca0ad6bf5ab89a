"""`hft eval`: a command line in, an exit status out."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

from hft.config import Keys, fill, option, read_arguments
from hft.errors import HFTError
from hft.evaluation.alpaca import ALPACA, score_alpaca
from hft.evaluation.evaluate import evaluate, suites_of
from hft.evaluation.subject import folder_of, subject_of
from hft.evaluation.suites import SUITES, Settings
from hft.machine import is_main, leave_process_group, say
from hft.runs.result import RESULTS_NAME, RunResult
from hft.text import aligned

DESCRIPTION = "Score models with lm-evaluation-harness; scores are saved beside each model."
MODELS = "MODEL is a run, a model's folder, an adapter or a Hub id"


@dataclass(frozen=True)
class EvalCommand:
    """What `hft eval` takes besides models and `Settings`."""

    suite: Literal[(*SUITES, ALPACA)] | None = option(
        f"One of {', '.join(SUITES)}, {ALPACA}; default: quick, or those of --tasks."
    )


def main(arguments: Sequence[str]) -> int:
    """Score models, print the scores, and save each model's beside it; 1 if a model has no weights."""
    models = list(takewhile(lambda word: not word.startswith("-"), arguments))
    groups = {"evaluation": (EvalCommand, Settings)}
    given = read_arguments(arguments[len(models) :], "hft eval MODEL [MODEL ...]", f"{DESCRIPTION} {MODELS}.", groups)
    values, _ = given.resolve(Keys((EvalCommand, Settings)))
    if not models:
        raise HFTError(f"name what to score: hft eval MODEL [MODEL ...]; {MODELS}")
    settings = fill(Settings, values)
    suites = suites_of(settings.tasks, fill(EvalCommand, values).suite)
    skipped = []
    for model in models:
        try:
            subject_of(model, settings.base)
        except HFTError as error:
            if len(models) == 1:
                raise
            say(f"{model} is skipped: {error}")
            skipped.append(model)
            continue
        for suite, tasks in suites.items():
            _score(model, suite, replace(settings, tasks=tasks))
    if skipped:
        say("", f"not scored: {', '.join(skipped)}")
    leave_process_group()
    return 1 if skipped else 0


def _score(model: str, suite: str, settings: Settings) -> None:
    """Score a model; a run's scores are also in its model card and its wandb run."""
    out = folder_of(model)
    scores = score_alpaca(model, settings, out) if suite == ALPACA else evaluate(model, suite, settings, out)
    if not scores.scores:
        return
    rows = []
    for one in scores.scores:
        error = "" if one.stderr is None else f"+- {one.stderr:.3f}"
        rows.append((f"  {one.task}", one.metric, f"{one.value:.3f}", error, one.unit, f"n = {one.n:,}"))
    say("", aligned([f"{scores.model}, {suite}, {scores.dtype}", *rows], left=2), "", f"saved in {out}/scores/{suite}")
    if not is_main() or not (out / RESULTS_NAME).exists():
        return
    result = RunResult.load(out)
    result.write_card(out)
    if result.wandb and os.environ.get("WANDB_MODE") != "disabled":
        from hft.runs.tracking import log_scores

        named = {f"{suite}/{score.task}/{score.metric}": score.value for score in scores.scores}
        log_scores(result.wandb, named)
