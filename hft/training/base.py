"""What every trainer here does with its manifest: check a checkpoint against it before resuming; and log memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hft.machine import peak_memory
from hft.record.checkpoints import last_checkpoint
from hft.record.manifest import Manifest

if TYPE_CHECKING:
    from hft.methods.callback import ScheduleCallback


class ManifestMixin:
    """Mixin of a TRL trainer with a `manifest` of what trains, and the `schedule` that changes it, if there is one."""

    manifest: Manifest
    schedule: ScheduleCallback | None = None
    resumed_from: str | None = None

    def notes(self) -> list[str]:
        """What is worth knowing about the trainer before it starts, one sentence each."""
        return []

    def manifest_so_far(self) -> Manifest:
        """The manifest as it is now."""
        return self.manifest

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train, from a checkpoint if one is given; `True` takes the last complete one of the output folder.

        Raises:
            HFTError: the checkpoint was trained with another selection or base.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        self.check_resumable(resume_from_checkpoint)
        self.resumed_from = resume_from_checkpoint or None
        return super().train(resume_from_checkpoint=self.resumed_from, **kwargs)

    def check_resumable(self, checkpoint: str | None) -> None:
        """Refuse a checkpoint that was trained with another selection or base (`Manifest.check_resumable`)."""
        if checkpoint and self.is_world_process_zero():
            self.manifest.check_resumable(checkpoint)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the peak memory so far."""
        logs["peak_memory_gb"] = round(peak_memory() / 1e9, 2)
        super().log(logs, start_time)
