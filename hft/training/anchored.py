"""SFT that holds the model to its base: TRL's loss plus a KL term."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import NonNegativeFloat
from torch.nn.functional import kl_div, nll_loss
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from hft.config import option
from hft.errors import HFTError
from hft.machine import is_sharded

IGNORED = -100  # label of a token that is not trained on


@dataclass
class AnchoredSFTConfig(SFTConfig):
    """TRL's config of SFT with the weight of a KL term."""

    kl_to_base: NonNegativeFloat = option(
        "Weight of KL(base || model), per trained token, in the loss of SFT; 0: TRL's own loss.", 0.0
    )

    def __post_init__(self):
        super().__post_init__()
        others = {
            f"loss_type {self.loss_type}": self.loss_type != "nll",
            "label smoothing": self.label_smoothing_factor,
            "Liger's kernels": self.use_liger_kernel,
            "a sharded model": is_sharded(self),
        }
        if given := next((name for name, is_on in others.items() if self.kl_to_base and is_on), None):
            raise HFTError(f"kl_to_base does not go with {given}; remove one")


class AnchoredSFTTrainer(SFTTrainer):
    """`SFTTrainer` whose loss is, with p0 the base and p the model,

        sum over trained tokens of (-log p(token) + kl_to_base * KL(p0 || p)) / number of trained tokens.

    This is the forward KL over the whole vocabulary, in nats. Held-out losses are without it, and comparable with those
    of other runs. With `kl_to_base` 0 the trainer is TRL's. `ref_model` is the base; `half` makes one that shares the
    frozen half, and with an adapter it is the model without it.
    """

    def __init__(self, *args: Any, ref_model: PreTrainedModel | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.ref_model = ref_model
        if self.args.kl_to_base and self.aux_loss_enabled:
            raise HFTError("kl_to_base does not go with the routers' auxiliary loss; give router_aux_loss_coef 0")
        if ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, and in training the KL term."""
        if not self.args.kl_to_base or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        features = {key: value for key, value in inputs.items() if key != "labels"} | {"use_cache": False}
        trained = (labels := inputs["labels"][:, 1:]) != IGNORED
        now = model(**features).logits[:, :-1][trained].log_softmax(-1, dtype=torch.float32)
        reference, without_adapter = self.ref_model, nullcontext()
        if reference is None:
            reference, without_adapter = model.eval(), self.accelerator.unwrap_model(model).disable_adapter()
        with torch.no_grad(), without_adapter:
            before = reference(**features).logits[:, :-1][trained].log_softmax(-1, dtype=torch.float32)
        model.train()  # which is the reference under an adapter, and no dropout is part of that
        divergence = kl_div(now, before, log_target=True, reduction="sum")
        total = nll_loss(now, labels[trained], reduction="sum") + self.args.kl_to_base * divergence
        loss = total / torch.as_tensor(trained.sum() if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # as in Trainer, since DDP averages the gradients
        return loss
