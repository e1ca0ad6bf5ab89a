"""Methods that change how the trained weights move: mixout, L2-SP, MoFO and GMT, as callbacks of any trainer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from transformers import TrainerCallback, TrainingArguments

from hft.errors import HFTError
from hft.machine import is_sharded
from hft.model.anatomy import Anatomy
from hft.selection import Selection
from hft.selection.importance import check_linear
from hft.selection.ranking import largest

KEYS = {"mixout": "mixout_p", "l2sp": "l2sp_strength", "mofo": "top_fraction", "gmt": "top_fraction"}

# Optimizers that keep a plain tensor of each parameter's momentum.
MOMENTUM = ("adamw_torch", "adamw_torch_fused")


@dataclass
class UpdateConfig:
    """How the trained weights move, as a method YAML or the command line gives it."""

    update: Literal["plain", "mixout", "l2sp", "mofo", "gmt"] = field(
        default="plain",
        metadata={
            "help": "plain: as the optimizer says; mixout: with input columns put back to the start at random in each "
            "forward pass; l2sp: with a pull towards the start after each step; mofo, gmt: only the entries of each "
            "tensor with the largest momentum, or gradient."
        },
    )
    mixout_p: float | None = field(
        default=None, metadata={"help": "Probability that an input column is put back to the start (mixout)."}
    )
    l2sp_strength: float | None = field(
        default=None, metadata={"help": "Each step takes learning rate x this of the way back to the start (l2sp)."}
    )
    top_fraction: float | None = field(
        default=None, metadata={"help": "Fraction of the entries of each tensor that move in a step (mofo, gmt)."}
    )

    def __post_init__(self):
        own = KEYS.get(self.update)
        for key in dict.fromkeys(KEYS.values()):
            given = getattr(self, key) is not None
            if given and key != own:
                owners = " and ".join(update for update, needed in KEYS.items() if needed == key)
                raise HFTError(f"{key} belongs to update {owners}, not to {self.update!r}; remove it")
            if key == own and not given:
                raise HFTError(f"update {self.update!r} needs {key}; give it")
        if self.mixout_p is not None and not 0 < self.mixout_p < 1:
            raise HFTError(f"mixout_p must lie between 0 and 1, got {self.mixout_p}")
        if self.l2sp_strength is not None and self.l2sp_strength <= 0:
            raise HFTError(f"l2sp_strength must be above 0, got {self.l2sp_strength}")
        if self.top_fraction is not None and not 0 < self.top_fraction <= 1:
            raise HFTError(f"top_fraction must lie in 0..1 and above 0, got {self.top_fraction}")

    def record(self) -> dict[str, Any]:
        """What a manifest keeps: the update and its own key."""
        return {key: value for key, value in vars(self).items() if value is not None}

    def memory(self, selection: Selection) -> int:
        """Bytes that it takes beside weights, gradients and optimizer state: a copy of what moves, and GMT's mask."""
        each = {"plain": 0, "mixout": 2, "l2sp": 2, "mofo": 4, "gmt": 5}[self.update]
        return each * (
            selection.num_trained_in_layers if self.update == "mixout" else selection.num_with_optimizer_state
        )

    def check(self, args: TrainingArguments) -> None:
        """Refuse what would change the method in silence.

        Raises:
            HFTError: FSDP; an optimizer that keeps no momentum, or not as a plain tensor, for MoFO; or checkpointing
                that draws other columns when it computes a layer again.
        """
        if self.update == "plain":
            return
        if args.fp16 and self.update == "gmt":
            raise HFTError("gmt would hide infinite gradients from fp16's loss scaler; set bf16")
        if is_sharded(args):
            raise HFTError(
                f"update {self.update!r} has not been tried on the shards of FSDP; run on one GPU, or on several with "
                "recipes/accelerate/ddp.yaml"
            )
        if self.update == "mofo" and args.optim not in MOMENTUM:
            raise HFTError(
                f"mofo ranks by AdamW's momentum; set optim to {' or '.join(MOMENTUM)}, not {args.optim.value}"
            )
        if self.update == "mixout" and (args.gradient_checkpointing_kwargs or {}).get("preserve_rng_state") is False:
            raise HFTError("mixout must draw the same columns when a layer is computed again; drop preserve_rng_state")


def starting_weights(model: nn.Module, anatomy: Anatomy, config: UpdateConfig) -> dict[str, torch.Tensor]:
    """The weights that mixout and L2-SP go back to: of this run's base, so to be taken before a checkpoint is loaded.

    They keep the dtype that the base was loaded in. Llama-2-7B's take 13.5 GB beside the masters for L2-SP, and
    13.0 GB for mixout, which mixes only the linear layers; about half of that where half is frozen.

    Returns:
        A copy of each trained parameter that the method needs, by name.

    Raises:
        HFTError: mixout, and a matrix of a layer is no linear layer of its own.
    """
    if config.update not in ("mixout", "l2sp"):
        return {}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if config.update == "mixout":
        inside = {name for unit in anatomy.units for name in unit.parameters}
        check_linear(model, anatomy)
        trained = {name: p for name, p in trained.items() if name in inside and p.ndim > 1}
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


def callbacks_of(config: UpdateConfig, start: dict[str, torch.Tensor]) -> list[TrainerCallback]:
    """What a trainer needs to move weights by a config, given its `starting_weights`."""
    match config.update:
        case "mixout":
            return [Mixout(start, config.mixout_p)]
        case "l2sp":
            return [L2SP(start, config.l2sp_strength)]
        case "mofo" | "gmt":
            return [TopK(config.top_fraction, by_gradient=config.update == "gmt")]
    return []


class Mixout(TrainerCallback):
    """In training, each linear layer computes with some of its input columns put back to the start (1909.11299).

    Names and `state_dict` of the model stay what they are, and evaluation uses the weights as they are. Processes of
    one run draw different columns, as they do for dropout. Embeddings, head, norms, biases and frozen matrices are not
    mixed. The mixed matrices are kept for the backward pass: another copy of the weights in the dtype that matmuls
    compute in, or of one layer's under gradient checkpointing.
    """

    def __init__(self, start: dict[str, torch.Tensor], p: float):
        self.start, self.p = start, p

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        to_device(self.start, model)
        for module, start in self._modules(model):
            module.forward = functools.partial(mixed_forward, module, start, self.p)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        for module, _ in self._modules(model):
            del module.forward

    def _modules(self, model: nn.Module) -> Iterator[tuple[nn.Linear, torch.Tensor]]:
        return ((model.get_submodule(name.removesuffix(".weight")), start) for name, start in self.start.items())


def mixed_forward(module: nn.Linear, start: torch.Tensor, p: float, x: torch.Tensor) -> torch.Tensor:
    """A linear layer's output, in training with mixed weights. The mask comes from torch's global generator."""
    weight = module.weight
    if module.training:
        kept = torch.rand(weight.shape[1], device=weight.device) >= p
        weight = mix(weight, start, p, kept)
    return functional.linear(x, weight, module.bias)


def mix(weight: torch.Tensor, start: torch.Tensor, p: float, kept: torch.Tensor) -> torch.Tensor:
    """Mixout's weight, [(1-m) W0 + m W - p W0] / (1-p), which is W0 + m (W - W0) / (1-p) and on average W.

    Its gradient is what autograd finds, m / (1-p). The official code leaves the constant 1 / (1-p) out of it, against
    its own comment; AdamW's step does not depend on it but for epsilon and clipping.

    Args:
        weight: W, (out, in).
        start: W0, (out, in), in any dtype.
        p: probability of W0.
        kept: m, (in,), bool: the input columns that stay W.
    """
    start = start.to(weight.dtype)
    return start + (weight - start) * (kept / (1 - p)).to(weight.dtype)


class L2SP(TrainerCallback):
    """After each step every trained weight goes back towards the start: W <- W - lr * strength * (W - W0).

    L2-SP (1802.01483), decoupled from the gradient as AdamW decouples weight decay.
    """

    def __init__(self, start: dict[str, torch.Tensor], strength: float):
        self.start, self.strength = start, strength

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        to_device(self.start, model)

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if was_skipped(optimizer):
            return
        names = {parameter: name for name, parameter in model.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:  # a schedule has frozen it for now
                    continue
                start = self.start[names[parameter]]
                parameter.sub_(group["lr"] * self.strength * (parameter - start))


class TopK(TrainerCallback):
    """In each step only the entries of each tensor with the largest momentum (MoFO) or gradient (GMT) move.

    The others keep their bits, whatever the optimizer does with its momentum and weight decay. That takes a copy of
    the trained weights during the step: 4 bytes an entry of an fp32 master.

    MoFO (2407.20999): the moments see the whole gradient, and the momentum is that after this step's gradient. The
    official optimizer decays all weights in each step, we only those that move. GMT (2406.15330): ranked is the
    gradient accumulated over the global batch and clipped; clipping scales it as a whole, so it ranks as before, but
    the norm is that of the whole gradient. The moments see the masked gradient.
    """

    def __init__(self, fraction: float, *, by_gradient: bool):
        self.fraction, self.by_gradient = fraction, by_gradient
        self._before: dict[nn.Parameter, torch.Tensor] = {}
        self._moving: dict[nn.Parameter, torch.Tensor] = {}

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if parameter.grad is None:
                continue
            self._before[parameter] = parameter.clone()
            if self.by_gradient:
                moving = self._moving[parameter] = self._largest(parameter.grad)
                parameter.grad.masked_fill_(~moving, 0)

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for parameter, before in () if was_skipped(optimizer) else self._before.items():
            moving = self._moving[parameter] if self.by_gradient else self._largest(momentum(optimizer, parameter))
            parameter.copy_(torch.where(moving, parameter, before))
        self._before.clear()
        self._moving.clear()

    def _largest(self, values: torch.Tensor) -> torch.Tensor:
        return largest(values.abs(), max(1, round(self.fraction * values.numel())))


def to_device(start: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Bring each starting weight to where the parameter of its name is by now."""
    for name, parameter in model.named_parameters():
        if name in start:
            start[name] = start[name].to(parameter.device)


def was_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the gradient scaler of fp16 training skipped the last step, since a gradient was infinite."""
    return getattr(optimizer, "step_was_skipped", False)


def momentum(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.Tensor:
    """The running mean of a parameter's gradients, as AdamW keeps it, or SGD."""
    state = optimizer.state[parameter]
    return state["exp_avg" if "exp_avg" in state else "momentum_buffer"]
