"""The largest entries of a tensor: exactly as many as asked for, the same ones on any machine."""

from __future__ import annotations

import torch


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` largest scores; of equal ones those with the lowest flat index.

    `torch.topk` leaves open which of equal scores it takes, and sorts what need not be sorted.

    Returns:
        A bool tensor of the shape of `scores`, with exactly `count` entries True.
    """
    flat = scores.reshape(-1)
    if count <= 0 or count >= flat.numel():
        return torch.full(scores.shape, count > 0, device=scores.device)
    least = flat.kthvalue(flat.numel() - count + 1).values
    mask = flat > least
    ties = (flat == least).nonzero().squeeze(1)
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view(scores.shape)
