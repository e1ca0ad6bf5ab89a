"""Ends a run that gets SIGTERM or Ctrl-C: a checkpoint after the step it is in, in all processes the same one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from hft.errors import Interrupted, Stopped
from hft.machine import leave_process_group, say, world_size
from hft.record.checkpoints import last_checkpoint


@contextmanager
def saved_on_signal(trainer: Trainer) -> Iterator[None]:
    """While it lasts, SIGTERM and Ctrl-C make a trainer save a checkpoint after its step and raise `Stopped`.

    transformers' `enable_jit_checkpoint` lets every process choose its own step, and ends as a finished run does.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone can catch signals
        yield
        return
    callback = StopAfterStep()
    trainer.add_callback(callback)
    before = {number: signal.signal(number, callback.ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        trainer.remove_callback(callback)


class StopAfterStep(TrainerCallback):
    """Saves a checkpoint after the step in which any process was asked to stop, and stops there."""

    def __init__(self):
        self.signal = self.stopped_by = 0  # what this process got; what all of them stop for
        self.group = self.strategy = None

    def ask(self, number: int, frame: Any) -> None:
        self.signal = number
        if number == signal.SIGINT:
            say("finishing the step and saving; Ctrl-C again ends the run at once")
            signal.signal(number, signal.default_int_handler)

    def on_train_begin(self, args, state, control, **kwargs):
        # A flag on the CPU never waits for the device; NCCL's own group could not send it.
        self.group = dist.new_group(backend="gloo") if world_size() > 1 else None

    def on_step_end(self, args, state, control, **kwargs):
        number = torch.tensor(self.signal)
        if self.group is not None:  # the largest that any process got, the same in every one of them
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
        self.stopped_by = int(number)
        if self.stopped_by:
            control.should_save = True
            if args.save_strategy == SaveStrategy.BEST:  # which saves nothing but what an evaluation finds better
                args.save_strategy, self.strategy = SaveStrategy.STEPS, args.save_strategy

    def on_save(self, args, state, control, **kwargs):
        if not self.stopped_by:
            return
        args.save_strategy = self.strategy or args.save_strategy
        leave_process_group()  # after the others have saved too
        # A checkpoint that the command names would be taken again.
        named = args.resume_from_checkpoint not in (None, "auto", "true", "none", "false")
        flag = " with --resume_from_checkpoint auto" if named else ""
        error = Interrupted if self.stopped_by == signal.SIGINT else Stopped
        name, last = signal.Signals(self.stopped_by).name, last_checkpoint(args.output_dir)
        raise error(
            f"stopped by {name} after step {state.global_step}; run the same command again{flag} to resume from {last}"
        )
