"""What a run measured, and the end of a run in words."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hft.freezing import Verification
from hft.machine import indented, say
from hft.planning.memory import peak_memory
from hft.record.manifest import NAME as MANIFEST_NAME
from hft.record.manifest import Manifest
from hft.runs import tracking
from hft.runs.folder import ADAPTER_NAME, CONFIG_NAME, PICTURE_NAME, RESULTS_NAME, verify_folder
from hft.runs.stages import Stage
from hft.selection.policies import DRAWN
from hft.training.recorded import Recorded

# Metrics whose held-out values a run ends with, before and after, where its stage logs them.
HELD_OUT = ("loss", "rewards/accuracies", "rewards/margins")


def evaluated_at_the_end(trainer: Recorded) -> bool:
    """Whether the model as it is has been evaluated."""
    return any("eval_loss" in row and row["step"] == trainer.state.global_step for row in trainer.state.log_history)


def measured(stage: Stage, trainer: Recorded) -> dict[str, Any]:
    """What a run measured: steps, losses, speed, memory, and of each held-out metric the first and last value."""
    history = trainer.state.log_history

    def logged(key: str) -> list[float]:
        return [row[key] for row in history if key in row]

    losses, speeds = logged("loss"), logged("train_tokens_per_second")
    evals = {name: logged(f"eval_{name}") for name in HELD_OUT}
    return {
        "stage": stage.name,
        "steps": trainer.state.global_step,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "held_out": {name: values[:1] + values[1:][-1:] for name, values in evals.items() if values},
        "tokens_per_second": speeds[-1] if speeds else None,
        "peak_memory_gb": round(peak_memory() / 1e9, 2),
        "trainable_fraction": trainer.manifest.trainable_fraction,
        "versions": trainer.manifest.versions,
        **({"schedule_fractions": trainer.manifest_so_far().schedule["shares"]} if trainer.schedule else {}),
    }


def conclude(results: dict[str, Any], out: Path, *, tracked: bool = False) -> int:
    """Verify, write the results, end the wandb run, and say where everything is.

    Returns:
        The exit status.
    """
    found = verify_folder(out)
    results["verify"] = {name: len(value) for name, value in asdict(found).items() if name != "against"}
    (out / RESULTS_NAME).write_text(json.dumps(results, indent=1) + "\n")
    if tracked:
        tracking.finish(out / MANIFEST_NAME, results)
    say("", summary(results, found, out))
    return 0 if found.ok else 1


def summary(results: dict[str, Any], found: Verification, out: Path) -> str:
    """The end of a run in words: what came out, where it is, what to try next."""
    losses = [results["first_loss"], results["last_loss"]]
    metrics = [("training loss", losses)] if None not in losses else []
    metrics += [(f"held-out {name}", values) for name, values in results["held_out"].items()]
    changes = "\n".join(f"  {name:28} {' -> '.join(f'{value:.4f}' for value in values)}" for name, values in metrics)
    hft = sys.argv[0] if Path(sys.argv[0]).name == "hft" else "hft"  # as it was called, to be called again
    again = f"{hft} {results['stage']} --config {out}/{CONFIG_NAME}"
    model = "model.safetensors       the model; loads in plain transformers"
    picture = f"  {PICTURE_NAME}           the selection as a picture\n"
    others = f"\n  {again} recipes/methods/fft.yaml --output_dir NEW  # everything trains"
    if Manifest.load(out).selection.get("policy") in DRAWN:
        others = f"\n  {again} --output_dir NEW --selection_seed 1  # another half{others}"
    if (out / ADAPTER_NAME).exists():
        model, picture = f"{ADAPTER_NAME}  the adapter; loads in plain peft", ""
        others += f"\n  {hft} merge --method adapter --models {out} --out NEW  # a plain model"
    return f"""\
verify
{indented(found.report())}

result
  {results["steps"]} steps
{changes}
  {results["tokens_per_second"] or 0:,.0f} tokens/s, peak memory {results["peak_memory_gb"]} GB

{out}/
  {model}
  {MANIFEST_NAME}       what was frozen, with checksums
{picture}  {CONFIG_NAME}             the resolved config
  {RESULTS_NAME}            the numbers above

try next
  {hft} verify {out}
  {again} --output_dir NEW  # the same run again{others}"""
