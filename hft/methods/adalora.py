"""AdaLoRA (arXiv 2303.10512; paper Table 5): LoRA whose ranks are pruned by importance.

Adds what TRL leaves out: the orthogonality loss, and pruning after each step over the run's real length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import TrainerCallback

from hft.config import option
from hft.errors import HFTError
from hft.methods.lora import LoRA

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@dataclass
class AdaLoRA(LoRA):
    name: ClassVar[str] = "adalora"
    acts_around_step: ClassVar[bool] = True
    peft_class: ClassVar[str] = "AdaLoraConfig"
    reloads: ClassVar[bool] = False  # the ranks at the end would cut it
    peft_names: ClassVar[dict[str, str | None]] = {
        "rank": "target_r",
        "start_rank": "init_r",
        "orthogonality_weight": "orth_reg_weight",
        "pruning_from": None,
        "pruning_until": None,
    }

    start_rank: int | None = option("Rank that AdaLoRA starts with.")
    orthogonality_weight: float | None = option("Weight of AdaLoRA's orthogonality loss.")
    pruning_from: float | None = option("Fraction of the steps after which AdaLoRA starts to prune ranks.")
    pruning_until: float | None = option("Fraction of the steps after which AdaLoRA's ranks are final.")

    def __post_init__(self):
        if None in (self.rank, self.start_rank, self.pruning_from, self.pruning_until):
            raise HFTError("adalora needs rank, start_rank, pruning_from and pruning_until")
        if not (0 <= self.pruning_from < self.pruning_until <= 1 and 0 < self.rank < self.start_rank):
            raise HFTError("adalora needs 0 <= pruning_from < pruning_until <= 1 and rank below start_rank")

    def peft_config(self, **more: Any) -> PeftConfig:
        return super().peft_config(total_step=2**62, **more)  # until the trainer knows it

    def extra_loss(self, model: PeftModel) -> torch.Tensor:
        return _peft_config(model).orth_reg_weight * orthogonality(model)

    def callbacks(self, model: PeftModel) -> list[TrainerCallback]:
        return [Pruning(self, model)]

    @contextmanager
    def saving_checkpoint(self, model: PeftModel) -> Iterator[None]:
        config = _peft_config(model)
        pattern, config.rank_pattern = config.rank_pattern, None  # or PEFT cuts off rows that have optimizer state
        yield
        config.rank_pattern = pattern

    def state(self, model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
        for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc"):  # PEFT's importance scores
            for name, scores in getattr(model.base_model.rankallocator, kind).items():
                yield f"{kind}|{name}", scores
        for name, kept in (_peft_config(model).rank_pattern or {}).items():
            yield f"rank_pattern|{name}", torch.tensor(kept)

    def restore(self, model: PeftModel, saved: Mapping[str, torch.Tensor]) -> None:
        pattern = {}
        for key, tensor in saved.items():
            kind, name = key.split("|")
            if kind == "rank_pattern":
                pattern[name] = tensor.tolist()
            else:
                getattr(model.base_model.rankallocator, kind)[name] = tensor.to(model.device)
        _peft_config(model).rank_pattern = pattern or None


class Pruning(TrainerCallback):
    """Plans the pruning over the steps of the run, which only the trainer knows, and prunes after each."""

    def __init__(self, adapter: AdaLoRA, model: PeftModel):
        self.adapter, self.model = adapter, model

    def on_train_begin(self, args, state, control, **kwargs):
        config, steps = _peft_config(self.model), state.max_steps
        if steps < 2:
            raise HFTError("adalora needs 2 steps or more, to score ranks and then prune them; raise --max_steps")
        end = max(2, int(self.adapter.pruning_until * steps))
        start = min(int(self.adapter.pruning_from * steps), end - 1)
        config.total_step, config.tinit, config.tfinal = steps, start, steps - end
        config.deltaT = max(1, steps // 500)

    def on_optimizer_step(self, args, state, control, **kwargs):
        # The gradients, by which ranks are scored, are still there.
        self.model.base_model.update_and_allocate(state.global_step + 1)


def _peft_config(model: PeftModel) -> Any:
    return model.peft_config[model.active_adapter]


def orthogonality(model: PeftModel) -> torch.Tensor:
    """AdaLoRA's regularizer, as PEFT takes it: the mean of ||P^T P - I|| over all P and Q (arXiv 2303.10512)."""
    norms = []
    for name, p in model.named_parameters():
        if p.requires_grad and ("lora_A" in name or "lora_B" in name):
            gram = p @ p.T if "lora_A" in name else p.T @ p
            norms.append(torch.linalg.norm(gram - torch.eye(len(gram), device=p.device)))
    return torch.stack(norms).mean()
