"""Scores a base for the importance policy: by `hft importance`, or at the start of a run that names no folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from hft.config import option
from hft.data import fingerprint, load_split
from hft.errors import HFTError
from hft.machine import broadcast, indented, is_main, reset_peak_memory, say
from hft.model.anatomy import anatomy_of
from hft.model.load import load_base
from hft.model.weights import local_folder, weights_fingerprint
from hft.objectives import OBJECTIVES
from hft.record.identity import companions_of
from hft.record.manifest import PACKAGES
from hft.runs.arguments import machine_settings, training_arguments
from hft.runs.config import Config, comparable, read_command_line, resolve_config
from hft.runs.plan import RunPlan, check_template, load_model_config, load_tokenizer, plan_selection
from hft.selection import select
from hft.selection.importance import save_scored, select_by_importance, token_ids
from hft.selection.masks import MASKS_NAME
from hft.selection.selection import READ_TEXT
from hft.selection.stored import IMPORTANCE_NAME, SCORED, load_scores


@dataclass
class Scoring:
    """What `hft importance` takes beside the keys of a run."""

    out: str | None = option("Folder to write.")


def main(arguments: Sequence[str]) -> int:
    """`hft importance`: score the base of a run, and write what its importance policy freezes into a folder."""
    objective, *words = arguments if arguments and arguments[0] in OBJECTIVES else ["sft", *arguments]
    scoring, given = read_command_line(objective, words, importance=(Scoring,)).take(Scoring)
    given.flags["policy"] = "importance"
    config, out = resolve_config(objective, given), scoring.out
    if not out:
        raise HFTError("out is needed: give --out FOLDER")
    say("selection", indented(plan_selection(config, load_model_config(config)).summary()), "")
    if not config.run.dry_run:
        args, _ = training_arguments(config, machine_settings(config.values))
        check_template(config, tokenizer := load_tokenizer(config))
        score_base(config, args, tokenizer, Path(out))
        say(f"a run reads it with --policy importance --importance {out}")
    return 0


def with_scored_selection(plan: RunPlan) -> RunPlan:
    """A plan whose selection is known: where it names no folder of scores, the base is scored into OUT/importance."""
    chosen, folder = plan.config.method.selection, plan.out / "importance"
    if chosen.policy != "importance" or chosen.importance:
        return plan
    if is_main():
        score_base(plan.config, plan.args, plan.tokenizer, folder)
    broadcast(None)
    selection = select(plan.selection.anatomy, replace(chosen, importance=str(folder)))
    # The record of a run is the same wherever its folder is.
    return replace(plan, selection=replace(selection, config=chosen))


def score_base(config: Config, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Score a run's base and write what is frozen of it into a folder; one that was made from the same stays."""
    chosen = config.method.selection
    reads_text = chosen.score in READ_TEXT
    rows = load_split(chosen.importance_data, "train") if reads_text else []
    made_from = sources(config, args)
    with suppress(HFTError):  # no scores there, or not all
        if made_from.items() <= load_scores(folder).items():
            say(f"importance: read from {folder}", "")
            return
    theirs = [path.name for path in folder.glob("*") if path.name not in (IMPORTANCE_NAME, MASKS_NAME)]
    if theirs:
        raise HFTError(f"{folder} holds {theirs[0]} beside scores; name another folder")
    by = f" on {chosen.importance_rows} rows of {chosen.importance_data}" if reads_text else ""
    say(f"scoring the base by {chosen.score}{by}")
    model, _ = load_base(config.run.model_name_or_path, args)
    texts = list(token_ids(tokenizer, rows, args.max_length, chosen.importance_rows or 0))
    selection = select_by_importance(model.to(args.device), anatomy_of(model), chosen, texts)
    save_scored(folder, selection, made_from | {"versions": {name: version(name) for name in PACKAGES}})
    del model
    reset_peak_memory()
    say(f"importance: written to {folder}", "")


def sources(config: Config, args: TrainingArguments) -> dict[str, Any]:
    """What the scores of a run's base depend on."""
    chosen, folder = config.method.selection, local_folder(config.run.model_name_or_path, config.revision)
    found = {"base": config.base, "weights": weights_fingerprint(folder), "max_length": args.max_length}
    found["selection"] = {key: value for key, value in asdict(chosen).items() if key in SCORED}
    if chosen.score in READ_TEXT:
        template = comparable(config.values).get("chat_template_path")
        found |= {"data": fingerprint(chosen.importance_data), "tokens": companions_of(folder), "template": template}
    return found
