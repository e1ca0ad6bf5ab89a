"""The command of each objective, such as `hft sft`: a command line in, an exit status out."""

import sys
from collections.abc import Sequence
from pathlib import Path

from hft.config import to_yaml
from hft.machine import indented, leave_process_group, say
from hft.record.card import CARD_NAME
from hft.record.manifest import Manifest
from hft.record.verification import ADAPTER_NAME
from hft.runs.config import parse_config
from hft.runs.plan import make_plan
from hft.runs.result import CONFIG_NAME, PICTURE_NAME, RESULTS_NAME, RunResult
from hft.runs.train import train
from hft.selection.selection import DRAWN


def main(objective: str, arguments: Sequence[str]) -> int:
    """Plan, print the plan, and train."""
    config = parse_config(objective, arguments)
    say("resolved config", indented(to_yaml(config.values)))
    plan = make_plan(config)
    say(plan.report())
    if config.run.dry_run:
        say(f"stopped here: no weights were loaded, nothing was written to {plan.out}")
        return 0
    result = train(plan)
    say("", summary(result, plan.out))
    leave_process_group()
    return 0 if result.ok else 1


def summary(result: RunResult, out: Path) -> str:
    """What a run prints at its end: results, files, commands to try next."""
    losses = [result.first_loss, result.last_loss]
    metrics = [("training loss", losses)] if None not in losses else []
    metrics += [(f"held-out {name}", values) for name, values in result.held_out.items()]
    changes = "\n".join(f"  {name:28} {' -> '.join(f'{value:.4f}' for value in values)}" for name, values in metrics)
    cost = f"{result.tokens_per_second:,.0f} tokens/s, " if result.tokens_per_second else ""
    cost += f"peak memory {result.peak_memory_gb} GB" + (f" of the {of}" if (of := result.peak_memory_of) else "")
    hft = sys.argv[0] if Path(sys.argv[0]).name == "hft" else "hft"  # as it was called, to be called again
    again = f"{hft} {result.objective} --config {out}/{CONFIG_NAME}"
    model = "model.safetensors       the model; loads in plain transformers"
    picture = f"  {PICTURE_NAME}           the selection as a picture\n"
    manifest, scores = Manifest.load(out), f"{hft} eval {out}"
    others = f"\n  {again} fft --output_dir NEW  # everything trains"
    if manifest.selection.get("policy") in DRAWN:
        others = f"\n  {again} --output_dir NEW --selection_seed 1  # another half{others}"
    if manifest.only_trained:
        model = "model.safetensors       only the tensors that trained"
        merge = f"{hft} merge --method delta --models {out} --base {manifest.base} --out NEW"
        scores = f"{merge}  # the whole model\n  {hft} eval NEW"
    if (out / ADAPTER_NAME).exists():
        model, picture = f"{ADAPTER_NAME}  the adapter; loads in plain peft", ""
        others += f"\n  {hft} merge --method adapter --models {out} --out NEW  # a plain model"
    return f"""\
result
  {result.steps} steps
{changes}
  {cost}

{out}/
  {model}
  hft_manifest.json       what was frozen, with checksums
{picture}  {CONFIG_NAME}             the resolved config
  {RESULTS_NAME}            the numbers above
  {CARD_NAME}               the model card

try next
  {hft} verify {out}
  {scores}  # what it learned and what it forgot
  {again} --output_dir NEW  # the same run again{others}"""
