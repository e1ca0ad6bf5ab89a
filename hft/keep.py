"""`hft keep`: how far to go from a base to what was tuned from it, by a budget for what may be lost on the way."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch
from tqdm import tqdm

from hft.config import Keys, PositiveInt, fill, option, read_arguments, to_yaml
from hft.errors import HFTError
from hft.evaluation.evaluate import check_installed, evaluate, resolved
from hft.evaluation.rows import spec_of
from hft.evaluation.subject import subject_of
from hft.evaluation.suites import SUITES, Dtype, Settings
from hft.machine import indented, say
from hft.merging.checkpoint import Checkpoint, new_folder, open_base
from hft.merging.config import MergeConfig
from hft.merging.merge import blocks_of, merge, on_the_line
from hft.record.manifest import write_json
from hft.record.verification import verify_folder
from hft.reporting.collect import run_config, run_manifest, run_method
from hft.runs.result import CONFIG_NAME
from hft.selection.masks import MASKS_NAME
from hft.text import aligned

ALPHAS = [tenths / 10 for tenths in range(11)]
LEARNED = "task/loss"
LOST = {"drift": ("drift/loss", 1), "kl": ("kl/kl", 1), "facts": ("facts/acc", -1)}  # metric, and the way that loses

Alpha = float | dict[str, float]  # of the whole model, or by block
Values = dict[str, float]  # by task and metric


@dataclass(frozen=True)
class KeepConfig:
    """What `hft keep` takes."""

    budget: list[str] = option("Most to lose against the base: drift=0.05, kl=0.1 (nats/token), facts=2 (points).", [])
    out: str | None = option("Folder for the result.")
    base: str | None = option("What the model was tuned from; default: by manifest.")
    by_block: bool = option("Then go further block by block, as long as that lowers the task loss.", False)
    limit: PositiveInt | None = option("Rows of each task; default: all.")
    task_data: str | None = option("A run with held-out rows, for models without any.")
    dtype: Dtype | None = option("To score in; default: bfloat16 on GPUs, else float32.")
    batch_size: PositiveInt = option("Rows per forward pass.", 8)


def main(arguments: Sequence[str]) -> int:
    """Score models on the line from a base to a tuned model, and write the furthest one that keeps the budget."""
    words = list(takewhile(lambda word: not word.startswith("-"), arguments))
    groups = {"keep": (KeepConfig,)}
    given = read_arguments(arguments[len(words) :], "hft keep RUN", "Go part of the way to RUN.", groups)
    config = fill(KeepConfig, given.resolve(Keys((KeepConfig,)))[0])
    if len(words) != 1 or not config.out:
        raise HFTError("give one run and a new folder: hft keep RUN --budget drift=0.05 --out FOLDER")
    [run], most = words, limits_of(config.budget)
    tuned, manifest = Checkpoint.open(run), run_manifest(Path(run))
    base = open_base(run, config.base, *((manifest.base, manifest.revision) if manifest else (None, None)))
    merging = MergeConfig(method="wise-ft", models=[run], base=str(base.folder), out=config.out)
    write = merge(merging)  # refuses what cannot be merged before anything is scored
    points, merging.alpha = search(scorer(config, tuned, base), most, blocks_of(base) if config.by_block else {})
    say("", table(points, merging.alpha), "")
    with new_folder(Path(config.out)) as folder:
        say(write(folder))
        recipe = {"method": "wise-ft", "models": [run], "base": merging.base, "alpha": merging.alpha}
        (folder / CONFIG_NAME).write_text(to_yaml(recipe))
        content = {"method": run_method(run_config(tuned.folder), manifest), "budget": most}
        content |= {"alpha": merging.alpha, "points": [{"alpha": one, "scores": found} for one, found in points]}
        write_json(folder / "keep.json", content)
        if manifest:
            update = manifest.update | {"interpolated": merging.alpha}
            replace(manifest, tuned=None, update=update).save(folder)
            if manifest.masks:
                shutil.copyfile(tuned.folder / MASKS_NAME, folder / MASKS_NAME)
    if not manifest:
        return 0
    found = verify_folder(config.out, config.base)
    say("verify", indented(found.report()), "", config.out)
    return 0 if found.ok else 1


def limits_of(budget: Sequence[str]) -> dict[str, float]:
    try:
        most = {name: float(number) for name, _, number in (word.partition("=") for word in budget)}
    except ValueError:
        most = {}
    if not most or most.keys() - LOST.keys() or not all(number >= 0 for number in most.values()):
        raise HFTError(f"--budget takes NAME=NUMBER, NAME one of {', '.join(LOST)}; got {' '.join(budget) or 'none'}")
    return most


def scorer(config: KeepConfig, tuned: Checkpoint, base: Checkpoint) -> Callable[[Alpha], Values]:
    """What scores a model between the two on the quick suite; its weights are set in place."""
    check_installed()
    from hft.evaluation.engine import engine_of

    subject, engines = subject_of(tuned.name, config.base), {}
    settings = resolved("quick", subject, fill(Settings, vars(config)))
    benchmarks = [replace(one, spec=spec_of(one, subject, settings)) for one in SUITES["quick"]]
    if not all(one.spec for one in benchmarks):
        has_none = "has no held-out rows to say what it learned; name a run that has with --task_data"
        raise HFTError(f"{tuned.name} {has_none}")
    parameters = dict(engine_of(subject, settings, engines).model.named_parameters())

    @torch.no_grad()
    def score(alpha: Alpha) -> Values:
        tensor_of = on_the_line(base, tuned, alpha)
        for name in tuned.parameters:
            parameters[name].copy_(tensor_of(name).to(tuned.specs[name].dtype))
        found = evaluate(tuned.name, "quick", settings, benchmarks=benchmarks, engines=engines)
        return {f"{one.task}/{one.metric}": one.value for one in found.scores}

    return score


def search(
    score: Callable[[Alpha], Values], most: Mapping[str, float], blocks: Mapping[str, str]
) -> tuple[list[tuple[Alpha, Values]], Alpha]:
    """What was scored, and the alpha that goes furthest within the budget; then block by block, if there are any."""
    points = [(alpha, score(alpha)) for alpha in tqdm(ALPHAS, desc="from the base to the tuned model", unit="model")]
    start = points[0][1]

    def fits(values: Values) -> bool:
        return all(way * (values[key] - start[key]) <= most[name] for name, (key, way) in LOST.items() if name in most)

    chosen, values = [point for point in points if fits(point[1])][-1]
    if chosen == 0:
        raise HFTError("every step from the base loses more than the budget allows; give a larger one")
    if not blocks:
        return points, chosen
    by_block = dict.fromkeys(sorted(set(blocks.values())), chosen)
    while further := [by_block | {block: round(alpha + 0.1, 1)} for block, alpha in by_block.items() if alpha < 1]:
        tried = [(one, score(one)) for one in tqdm(further, desc="one block further", unit="model")]
        within = [point for point in tried if fits(point[1]) and point[1][LEARNED] < values[LEARNED]]
        if not within:
            break
        by_block, values = min(within, key=lambda point: point[1][LEARNED])
    return [*points, (by_block, values)], by_block


def table(points: Sequence[tuple[Alpha, Mapping[str, float]]], chosen: Alpha) -> str:
    keys = [key for key in (LEARNED, *(key for key, _ in LOST.values())) if key in points[0][1]]
    rows = [["", "alpha", *keys]]
    for alpha, values in points:
        name = ", ".join(f"{k} {a}" for k, a in alpha.items()) if isinstance(alpha, dict) else f"{alpha}"
        rows.append(["->" if alpha == chosen else "", name, *(f"{values[key]:.4f}" for key in keys)])
    return aligned(rows, left=2)
