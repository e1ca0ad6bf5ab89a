"""What a run measured, as a value that saves and loads itself."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft.errors import HFTError, neighbor, reason
from hft.machine import indented, on_gpu, peak_memory, say
from hft.objectives import Objective
from hft.record.manifest import Manifest, write_json

if TYPE_CHECKING:
    from hft.training.base import ManifestMixin

CONFIG_NAME = "config.yaml"
RESULTS_NAME = "results.json"
PICTURE_NAME = "selection.png"
WANDB_NAME = "wandb_run.json"  # the wandb run that a resume continues


@dataclass
class RunResult:
    """What came out of a run.

    Attributes:
        objective: what it trained on, such as `sft`.
        steps: optimizer steps taken.
        first_loss: training loss, first logged.
        last_loss: training loss, last logged.
        held_out: by metric, its value before training, if measured, and with the saved weights.
        tokens_per_second: over the whole run.
        peak_memory_gb: in the first process; `peak_memory_of` says whether of the GPU or the process.
        trainable_fraction: of the layers and of the whole model.
        versions: packages.
        machine: settings that the machine decided.
        verify: number of tensors per finding of `hft verify`.
        ok: whether verify passed.
        wandb: id, project and entity of its wandb run, if it has one.
        schedule_fractions: trainable fraction of the layers first, last and on average, under a schedule.
        peak_memory_of: the GPU or the process; None if an earlier version did not say.
    """

    objective: str
    steps: int
    first_loss: float | None
    last_loss: float | None
    held_out: dict[str, list[float]]
    tokens_per_second: float | None
    peak_memory_gb: float
    trainable_fraction: dict[str, float]
    versions: dict[str, str]
    machine: dict[str, Any] = field(default_factory=dict)
    verify: dict[str, int] = field(default_factory=dict)
    ok: bool = True
    schedule_fractions: dict[str, float] | None = None
    wandb: dict[str, str] | None = None
    peak_memory_of: str | None = None

    def save(self, folder: str | Path) -> Path:
        """Write it into a run's folder, in one step."""
        return write_json(Path(folder) / RESULTS_NAME, asdict(self))

    def conclude(self, out: Path) -> RunResult:
        """Verify the run's folder, and save the result and the model card with what was found."""
        self.verified(out).save(out)
        self.write_card(out)
        return self

    def verified(self, out: Path) -> RunResult:
        """Verify the run's folder, say what was found, and keep it."""
        from hft.record.verification import verify_folder

        found = verify_folder(out)
        self.verify, self.ok = found.counts(), found.ok
        say("verify", indented(found.report()))
        return self

    def write_card(self, out: Path, into: Path | None = None, model_id: str | None = None) -> None:
        """Write the run's model card, with the scores that are there by now; `into` a copy of its folder."""
        from hft.record.card import write_card
        from hft.runs.config import card_settings, read_saved_config

        config = read_saved_config(out / CONFIG_NAME)
        tags, model_id = ("trl", self.objective, "hft"), model_id or config.get("hub_model_id")
        settings = card_settings(config)
        write_card(into or out, Manifest.load(out), settings, tags, verified=self.verify, model_id=model_id)

    @classmethod
    def load(cls, folder: str | Path) -> RunResult:
        """Read the result in a run's folder, also of an earlier version.

        Raises:
            HFTError: the folder has none, or an invalid one.
        """
        path = Path(folder) / RESULTS_NAME
        try:
            content = json.loads(path.read_text())  # an earlier version wrote `planned`
            return cls(**{key: value for key, value in content.items() if key != "planned"})
        except FileNotFoundError:
            raise HFTError(f"{folder} has no {RESULTS_NAME}: its run has not finished{neighbor(path.parent)}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise HFTError(f"{path} is not a valid result: {reason(error)}") from error


def result_of(
    objective: Objective, trainer: ManifestMixin, machine: dict[str, Any], final: dict[str, float]
) -> RunResult:
    history = trainer.state.log_history

    def logged(key: str, rows: list[dict[str, Any]] = history) -> list[float]:
        return [row[key] for row in rows if row.get(key) is not None]

    held_out = {}
    for name in objective.held_out:  # before training, if it means something there, and of the saved weights
        key, before = f"eval_{name}", [row for row in history if row.get("step") == 0]
        values = [*logged(key, [] if name in objective.not_at_start else before)[:1], *logged(key, [final])]
        held_out |= {name: values} if values else {}
    losses, speeds = logged("loss"), list(filter(None, logged("train_tokens_per_second")))
    return RunResult(
        objective=objective.name,
        steps=trainer.state.global_step,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        held_out=held_out,
        tokens_per_second=speeds[-1] if speeds else None,
        peak_memory_gb=round(peak_memory() / 1e9, 2),
        peak_memory_of="GPU" if on_gpu() else "process",
        trainable_fraction=trainer.manifest.trainable_fraction,
        versions=trainer.manifest.versions,
        machine=machine,
        schedule_fractions=trainer.manifest_so_far().schedule.get("fractions"),
    )


def summary(result: RunResult, out: Path) -> str:
    """What a run prints at its end: results, and commands to try next."""
    from hft.selection.selection import DRAWN

    metrics = {f"held-out {name}": values for name, values in result.held_out.items()}
    if result.first_loss is not None and result.last_loss is not None:
        metrics = {"training loss": [result.first_loss, result.last_loss]} | metrics
    lines = ["result", f"  {result.steps} steps"]
    lines += [f"  {name:28} {' -> '.join(f'{value:.4f}' for value in values)}" for name, values in metrics.items()]
    cost = f"{result.tokens_per_second:,.0f} tokens/s, " if result.tokens_per_second else ""
    of = f" of the {result.peak_memory_of}" if result.peak_memory_of else ""
    lines += [f"  {cost}peak memory {result.peak_memory_gb} GB{of}", "", "try next"]
    hft = sys.argv[0] if Path(sys.argv[0]).name == "hft" else "hft"  # as it was called, to be called again
    manifest, again = Manifest.load(out), f"{result.objective} --config {out / CONFIG_NAME}"
    commands = [f"verify {out}"]
    if manifest.only_trained:
        commands += [f"merge --method delta --models {out} --base {manifest.base} --out NEW  # the whole model"]
    if manifest.is_adapter:
        commands += [f"merge --method adapter --models {out} --out NEW  # a plain model"]
    commands += [f"eval {'NEW' if manifest.only_trained else out}  # what it learned and what it forgot"]
    commands += [f"{again} --output_dir NEW  # the same run again"]
    if manifest.selection.get("policy") in DRAWN:
        commands += [f"{again} --output_dir NEW --selection_seed 1  # another half"]
    if manifest.selection.get("policy") != "all":
        commands += [f"{again} fft --output_dir NEW  # everything trains"]
    return "\n".join([*lines, *(f"  {hft} {command}" for command in commands)])
