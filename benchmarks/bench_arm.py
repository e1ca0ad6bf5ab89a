"""One arm of `make bench`: a trainer's steps, timed in their parts, with its memory and its FLOPs."""

import copy
import ctypes
import gc
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback
from trl import DPOTrainer


@dataclass
class Measured:
    """What some steps of one arm took; the first step, which allocates the optimizer's state, is not in the times.

    Attributes:
        forward, backward, optimizer, step: seconds of each step. What a step takes beside its three parts are
            clipping, the batch and the callbacks.
        losses: of every step.
        peak: bytes at the peak while it trained; on a CPU those of the process beyond what it held before the arm.
        weights, gradients, states, reference: bytes of the tensors.
        flops: of the forward and the backward pass of one step, and of DPO's reference.
        tokens: that go through the model in one step; in DPO those of both answers.
    """

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int = 0
    weights: int = 0
    gradients: int = 0
    states: int = 0
    reference: int = 0
    flops: int = 0
    tokens: int = 0

    @property
    def state(self) -> int:
        """Bytes of all that is held between two steps, and of the gradients."""
        return self.weights + self.gradients + self.states + self.reference


class Watch(TrainerCallback):
    """Measures a trainer while it trains.

    Args:
        trainer: whose steps to measure, without gradient accumulation.
        rows, length: of a batch; in DPO a row is two sequences of that length.
        held: bytes that the process held before the arm.
        count: whether to count FLOPs.
    """

    def __init__(self, trainer: Trainer, rows: int, length: int, held: int, count: bool) -> None:
        self.trainer, self.held, self.count, self.pairs = trainer, held, count, isinstance(trainer, DPOTrainer)
        self.sequences, self.length = rows * (2 if self.pairs else 1), length
        self.measured = Measured(tokens=self.sequences * length)
        self.parts = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        trainer.compute_loss = self._timed("forward", trainer.compute_loss)
        trainer.accelerator.backward = self._timed("backward", trainer.accelerator.backward)

    def _timed(self, part: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            start = now()
            result = function(*args, **kwargs)
            self.parts[part] += now() - start
            return result

        return run

    def on_train_begin(self, args, state, control, **kwargs):
        reset_peak()

    def on_step_begin(self, args, state, control, **kwargs):
        self.parts, self.start = dict.fromkeys(self.parts, 0.0), now()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.measured.gradients:  # here, where a schedule's layers are those of this step
            self.measured.gradients = size(p.grad for p in model.parameters() if p.grad is not None)
        if self.count and not self.measured.flops:
            self.measured.flops = step_flops(model, self.sequences, self.length, reference=self.pairs)
        self.before_optimizer = now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.parts["optimizer"] = now() - self.before_optimizer

    def on_step_end(self, args, state, control, **kwargs):
        took = now() - self.start
        if state.global_step > 1:
            for part, seconds in (self.parts | {"step": took}).items():
                getattr(self.measured, part).append(seconds)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.measured.losses += [logs["loss"]] if "loss" in logs else []

    def on_train_end(self, args, state, control, model=None, **kwargs):
        measured, trainer = self.measured, self.trainer
        measured.peak = peak() - self.held
        measured.weights = size(model.parameters())
        states = trainer.optimizer.state.values()
        measured.states = size(t for one in states for t in one.values() if isinstance(t, torch.Tensor) and t.dim())
        if getattr(trainer, "ref_model", None) is not None:
            measured.reference = size([*model.parameters(), *trainer.ref_model.parameters()]) - measured.weights


def measure(make: Callable[[], Trainer], rows: int, length: int, *, count: bool = True) -> Measured:
    """Make a trainer, train, and free it.

    Args:
        make: makes it.
        rows, length: of a batch.
        count: whether to count FLOPs, which are not known of every model.
    """
    release()
    held = resident()
    trainer = make()
    watch = Watch(trainer, rows, length, held, count)
    trainer.add_callback(watch)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return watch.measured


def step_flops(model: PreTrainedModel, sequences: int, length: int, *, reference: bool = False) -> int:
    """FLOPs of the forward and the backward pass over one batch, with the model's frozen parameters and checkpointing.

    Counted on a copy without weights, with eager attention, the whole square. TRL's head keeps no logits and projects
    once more in the backward pass, which is added. A reference adds another forward pass.
    """
    parameters = {
        id(p): nn.Parameter(torch.empty(p.shape, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    copied = copy.deepcopy(base, parameters).to("meta")
    copied.set_attn_implementation("eager")
    ids = torch.zeros(sequences, length, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, length, length, device="meta")
    with FlopCounterMode(display=False) as counter:
        # The class's own forward pass: what accelerate and TRL have put in its place still refers to the model.
        forward = partial(type(base).forward, copied, input_ids=ids, attention_mask=mask, use_cache=False)
        forward(labels=ids).loss.backward()
        if reference:
            with torch.no_grad():
                forward()
    return counter.get_total_flops() + 2 * sequences * length * copied.get_output_embeddings().weight.numel()


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors; what several share counts once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def release() -> None:
    """Give freed memory back: to the GPU's driver or, from glibc, to the kernel."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident() -> int:
    """Bytes that the process has resident on a CPU; 0 on a GPU, where the allocator knows what is used."""
    return 0 if torch.cuda.is_available() else _status("VmRSS")


def reset_peak() -> None:
    """Reset the peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes at the peak since it was reset: allocated on the GPU, or resident in the process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
