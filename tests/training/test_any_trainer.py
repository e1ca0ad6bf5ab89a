"""Any TRL trainer, half fine-tuned: the frozen half stays, a resume is exact, with nothing frozen it is TRL's."""

import inspect
import shutil

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

import hft
from hft.data import load_split
from hft.errors import HFTError
from hft.record.manifest import Manifest
from hft.training.reference import reference_bytes
from tests.conftest import identical, tensors


class PositiveLoss(trl.SFTTrainer):
    """Somebody's own trainer."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return 2 * loss


def longer_is_better(completions, **kwargs) -> list[float]:
    return [float(len(set(str(completion)))) for completion in completions]


# Of each trainer its config, and settings that keep it small; those that resume exactly.
GENERATES = {"num_generations": 2, "max_completion_length": 4}
TRAINERS = {
    trl.SFTTrainer: (trl.SFTConfig, {"max_length": 64}),
    PositiveLoss: (trl.SFTConfig, {"max_length": 64}),
    trl.DPOTrainer: (trl.DPOConfig, {"max_length": 64}),
    trl.KTOTrainer: (trl.KTOConfig, {"max_length": 64}),
    trl.RewardTrainer: (trl.RewardConfig, {"max_length": 64}),
    trl.GRPOTrainer: (trl.GRPOConfig, GENERATES | {"beta": 0.1}),
    trl.RLOOTrainer: (trl.RLOOConfig, GENERATES | {"beta": 0.1}),
    trl.DistillationTrainer: (trl.DistillationConfig, {"max_completion_length": 4}),
    SDFTTrainer: (SDFTConfig, {"max_completion_length": 8, "num_loss_tokens_to_skip": 0}),
}
FAST = (trl.KTOTrainer, trl.RewardTrainer, trl.GRPOTrainer, trl.DistillationTrainer)
WITH_REFERENCE = (trl.DPOTrainer, trl.KTOTrainer, trl.GRPOTrainer, trl.RLOOTrainer)
