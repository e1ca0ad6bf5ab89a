"""What a run measured, as a value that saves and loads itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft.errors import HFTError, reason
from hft.machine import on_gpu, peak_memory
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
        held_out: by metric, its value before training, if it was measured, and of the saved weights.
        tokens_per_second: over the whole run.
        peak_memory_gb: of what `peak_memory_of` says, in the first process.
        trainable_fraction: of the layers and of the whole model.
        versions: packages.
        machine: settings that the machine decided.
        verify: by finding of `hft verify`, how many tensors it concerns.
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
        """Read what a run's folder holds, also from an earlier version.

        Raises:
            HFTError: the folder has none, or an invalid one.
        """
        path = Path(folder) / RESULTS_NAME
        try:
            content = json.loads(path.read_text())
            content.pop("planned", None)  # as an earlier version wrote it
            return cls(**content)
        except FileNotFoundError:
            raise HFTError(f"{folder} has no {RESULTS_NAME}: its run has not finished") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise HFTError(f"{path} is not a valid result: {reason(error)}") from error


def result_of(
    objective: Objective, trainer: ManifestMixin, machine: dict[str, Any], final: dict[str, float]
) -> RunResult:
    history = trainer.state.log_history

    def logged(key: str) -> list[float]:
        return [row[key] for row in history if key in row]

    losses, speeds = logged("loss"), [speed for speed in logged("train_tokens_per_second") if speed]
    schedule = trainer.manifest_so_far().schedule
    return RunResult(
        objective=objective.name,
        steps=trainer.state.global_step,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        held_out={n: v for n in objective.held_out if (v := before_and_after(objective, n, history, final))},
        tokens_per_second=speeds[-1] if speeds else None,
        peak_memory_gb=round(peak_memory() / 1e9, 2),
        peak_memory_of="GPU" if on_gpu() else "process",
        trainable_fraction=trainer.manifest.trainable_fraction,
        versions=trainer.manifest.versions,
        machine=machine,
        schedule_fractions=schedule.get("fractions"),
    )


def before_and_after(
    objective: Objective, name: str, history: list[dict[str, Any]], final: dict[str, float]
) -> list[float]:
    """A held-out metric before training, if it was measured and means something there, and of the saved weights."""
    key = f"eval_{name}"
    before = [row[key] for row in history if key in row and row.get("step") == 0]
    before = [] if name in objective.not_at_start else before
    return [*before[:1], *([final[key]] if key in final else [])]
