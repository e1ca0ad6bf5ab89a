"""Rows of earlier tasks as batches for a trainer, and the gradients of the loss on them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from hft.methods.strategy import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

Gradient = list[torch.Tensor]
BLOCK_NUMEL = 2**24  # elements of each gradient that are copied at a time
TokenizedRow = dict[str, list[int]]  # `input_ids` and `labels`


def tokenized(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> TokenizedRow:
    """`input_ids` and `labels` of a row, as TRL's `SFTTrainer` makes them: the loss is on the completion."""
    prompt = [{"role": "user", "content": row["prompt"]}]
    whole = [*prompt, {"role": "assistant", "content": row["completion"]}]
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True)["input_ids"]
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before["input_ids"], ids, strict=False)))
    return {"input_ids": ids[:max_length], "labels": ([-100] * start + ids[start:])[:max_length]}


def micro_batches(trainer: Trainer, rows: list[TokenizedRow]) -> Iterator[dict[str, torch.Tensor]]:
    """This process's micro-batches of some rows; a row that trains nothing fills up a share that is smaller."""
    args, size = trainer.args, trainer.args.per_device_train_batch_size
    filler = {"input_ids": rows[0]["input_ids"], "labels": [-100] * len(rows[0]["labels"])}
    padded = rows + [filler] * (-len(rows) % args.world_size)
    mine = padded[args.process_index :: args.world_size]
    for start in range(0, len(mine), size):
        batch = trainer.data_collator(mine[start : start + size])
        yield {key: value.to(args.device) for key, value in batch.items() if torch.is_tensor(value)}


def trained_tokens(rows: list[TokenizedRow]) -> int:
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def take_gradient(parameters: list[torch.nn.Parameter]) -> Gradient:
    """The gradients of some parameters, which have none afterwards."""
    taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return taken


def loss_gradient(trainer: Trainer, rows: list[TokenizedRow], parameters: list[torch.nn.Parameter]) -> Gradient:
    """The gradient of the mean loss over all trained tokens of some rows, of which each process has a part."""
    tokens = trained_tokens(rows)
    for batch in micro_batches(trainer, rows):
        logits, labels = next_token_logits(trainer.model_wrapped, batch)
        loss = cross_entropy(logits, labels, reduction="sum") / tokens
        (loss * trainer.args.world_size).backward()
    return take_gradient(parameters)


def next_token_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 logits of the trained tokens of a batch, of shape (tokens, vocabulary), and these tokens."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"][:, 1:]
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return logits[labels != -100].float(), labels[labels != -100]


def dot_products(gradients: list[Gradient], device: torch.device) -> torch.Tensor:
    """The Gram matrix of some gradients, in float64 on the CPU; identical in every process."""
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=device)
    for tensors in zip(*gradients, strict=True):
        shards = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
        for blocks in zip(*(shard.flatten().split(BLOCK_NUMEL) for shard in shards), strict=True):
            local = torch.stack([block.float() for block in blocks])
            gram += (local @ local.T).double()
    if any(isinstance(tensor, DTensor) for tensor in gradients[0]):
        dist.all_reduce(gram)
    return gram.cpu()
