"""Self-generated replay (Marek et al. 2026, arXiv 2605.26097): the model is held to its own text. It needs no data.

Before a round the model samples text from the first token on, at temperature 1. Each step adds to the task's loss

    kl_weight * mean over sampled tokens of KL(p_before || p_now),

where p_before is the model before the round: the cross entropy on its own text up to a constant, with less variance.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from accelerate.utils import gather_object
from pydantic import Field, PositiveInt
from torch.nn.functional import kl_div
from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback

from hft.config import option
from hft.continual.gradients import micro_batches, next_token_logits, trained_tokens
from hft.errors import HFTError
from hft.machine import is_main
from hft.methods.strategy import ExtraRows, Strategy
from hft.model.load import load_base, plain_generation
from hft.training.reference import share_frozen

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

TEXTS_NAME = "self_replay.json"
BATCH = 16  # texts that are sampled at once


@dataclass
class SelfReplay(Strategy):
    """Keep the model's predictions on text that it wrote before the round."""

    name: ClassVar[str] = "self-replay"
    acts_on_steps: ClassVar[bool] = True
    shardable: ClassVar[bool] = False

    replay_texts: PositiveInt = option("Texts that the model generates before a round (our value).", 512)
    replay_tokens: Annotated[int, Field(ge=2)] = option("Longest of these texts, in tokens (our value).", 128)
    replay_batch: PositiveInt = option("Texts per step (our value).", 32)
    kl_weight: float = option("Weight of the KL term (our value).", 1.0)
    replay_seed: int = option("Seed of the texts.", 0)

    def callbacks(self, trainer: Trainer) -> list[TrainerCallback]:
        return [*super().callbacks(trainer), HoldToOwnText(trainer, reference_of(trainer), self)]

    def check_args(self, args: TrainingArguments, *, has_reference: bool = False) -> None:
        if args.fp16:
            raise HFTError("self-replay adds a gradient that fp16 would have to scale; train in bf16 or fp32")

    def extra_rows(self) -> ExtraRows:
        return ExtraRows(self.replay_batch, self.replay_tokens, reference=True, sampled=self.replay_texts)


def reference_of(trainer: Trainer) -> PreTrainedModel:
    """The model as it is before the round, which shares its frozen tensors with the one that trains."""
    reference, dtypes = load_base(trainer.manifest.base, trainer.args)
    share_frozen(reference, trainer.model, dtypes, autocast=trainer.args.bf16)
    return reference.requires_grad_(False).to(trainer.args.device).eval()


class HoldToOwnText(TrainerCallback):
    """Adds the gradient of the KL term to each step, before that of the task."""

    def __init__(self, trainer: Trainer, reference: PreTrainedModel, strategy: SelfReplay):
        self.trainer, self.reference, self.strategy = trainer, reference, strategy

    def on_train_begin(self, args, state, control, **kwargs):
        path = Path(args.output_dir) / TEXTS_NAME
        if state.global_step and path.exists():  # a resume
            self.texts = json.loads(path.read_text())
        else:
            self.texts = sample_texts(self.reference, self.trainer, self.strategy)
            if is_main():
                path.write_text(json.dumps(self.texts))

    def on_step_begin(self, args, state, control, **kwargs):
        drawn = random.Random(f"{self.strategy.replay_seed} {state.global_step}")
        texts = drawn.sample(self.texts, min(self.strategy.replay_batch, len(self.texts)))
        rows = [{"input_ids": text, "labels": text} for text in texts]
        tokens = trained_tokens(rows)
        self.trainer.model_wrapped.train()  # as the task's pass is, also before the first step and after an evaluation
        for batch in micro_batches(self.trainer, rows):
            with torch.no_grad(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                before, _ = next_token_logits(self.reference, batch)
            now, _ = next_token_logits(self.trainer.model_wrapped, batch)
            divergence = kl_div(now.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="sum")
            (self.strategy.kl_weight * divergence / tokens * args.world_size).backward()


def sample_texts(model: PreTrainedModel, trainer: Trainer, strategy: SelfReplay) -> list[list[int]]:
    """Texts as token ids, the same for any number of processes, each of which samples some of the batches."""
    args, tokenizer = trainer.args, trainer.processing_class
    start, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = eos if start is None else start
    if start is None:
        raise HFTError("self-replay starts texts with the tokenizer's BOS or EOS, and it has neither")
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_length": strategy.replay_tokens}
    settings |= {"bos_token_id": start, "eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = plain_generation(model, **settings)
    prompt = torch.full((BATCH, 1), start, device=args.device)
    mine = range(args.process_index, -(-strategy.replay_texts // BATCH), args.world_size)
    sampled, devices = [], [args.device] if args.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
        for batch in tqdm(mine, desc="sampling texts", disable=not is_main(), leave=False):
            torch.manual_seed(1_000_000 * strategy.replay_seed + batch)
            ids = model.generate(prompt, attention_mask=torch.ones_like(prompt)).tolist()
            sampled.append((batch, [text[: text.index(eos, 1) + 1] if eos in text[1:] else text for text in ids]))
    batches = sorted(gather_object(sampled)) if args.world_size > 1 else sampled
    return [text for _, texts in batches for text in texts if len(text) > 1][: strategy.replay_texts]
