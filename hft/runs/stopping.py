"""Ends a run that gets SIGTERM: a checkpoint after the step it is in, in all processes the same one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from hft.errors import Stopped
from hft.machine import leave_process_group, world_size
from hft.record.checkpoints import last_checkpoint

if TYPE_CHECKING:
    from transformers import Trainer


@contextmanager
def saved_on_sigterm(trainer: Trainer) -> Iterator[None]:
    """While it lasts, SIGTERM makes a trainer save a checkpoint after its step and raise `Stopped`.

    transformers' `enable_jit_checkpoint` waits three seconds before it asks for a checkpoint, lets every process choose
    its own step, and ends as a finished run does. Only the main thread can catch signals; in another one nothing
    changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    callback = StopAfterStep()
    trainer.add_callback(callback)
    before = signal.signal(signal.SIGTERM, callback.ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        trainer.remove_callback(callback)


class StopAfterStep(TrainerCallback):
    """Saves a checkpoint after the step in which any process was asked to stop, and stops there."""

    def __init__(self):
        self.is_asked = self.is_stopping = False
        self.group = None

    def ask(self, *_: Any) -> None:
        """The handler of a signal."""
        self.is_asked = True

    def on_train_begin(self, args, state, control, **kwargs):
        # A flag on the CPU never waits for the device; NCCL's own group could not send it.
        self.group = dist.new_group(backend="gloo") if world_size() > 1 else None

    def on_step_end(self, args, state, control, **kwargs):
        if self._any_asked():
            control.should_save = self.is_stopping = True

    def on_save(self, args, state, control, **kwargs):
        if not self.is_stopping:
            return
        leave_process_group()  # after the others have saved too
        # A checkpoint that the command names would be taken again.
        named = args.resume_from_checkpoint not in (None, "auto", "true", "none", "false")
        how = " with --resume_from_checkpoint auto" if named else ""
        raise Stopped(
            f"stopped by SIGTERM after step {state.global_step}; run the same command again{how} to go on from "
            f"{last_checkpoint(args.output_dir)}"
        )

    def _any_asked(self) -> bool:
        """Whether any process was asked, the same in every one of them."""
        if self.group is None:
            return self.is_asked
        asked = torch.tensor(int(self.is_asked))
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group)
        return bool(asked)
