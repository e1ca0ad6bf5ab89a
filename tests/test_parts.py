"""Tensors that train in part compute and move as a plain loop that masks gradients and puts frozen elements back."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from hft.freezing import HALF_PRECISION, autocast_experts
from hft.parts import index_bytes, join, parts_of, split
from hft.selection import Mask
from tests.conftest import identical

MASKS = {  # shape of the mask, shape of the trained elements where `half` of what it varies along trains
    "experts": ((4, 1, 1), (12, 8)),
    "rows": ((1, 6, 1), (4, 3, 8)),
    "columns": ((1, 1, 8), (4, 6, 4)),
    "rows of experts": ((4, 6, 1), (12, 8)),
    "elements": ((4, 6, 8), (96, 1)),
    "columns of experts": ((4, 1, 8), (96, 1)),
}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, weight_decay=0.1),
}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return torch.einsum("eoi,bi->beo", self.weight, x.to(self.weight.dtype))


def half(shape):
    """A mask that freezes half of what it varies along."""
    order = torch.randperm(torch.Size(shape).numel(), generator=torch.Generator().manual_seed(1))
    return (order < len(order) / 2).view(shape)


@pytest.mark.parametrize("kind", MASKS)
def test_the_trained_elements_move_as_in_a_loop_that_masks(kind):
    frozen = half(MASKS[kind][0])
    for name, optimizer in OPTIMIZERS.items():
        masked, compact = Experts(), Experts()
        split(compact, {"weight": Mask.of(frozen)})
        part = parts_of(compact)["weight"]
        assert part.original1.shape == MASKS[kind][1]
        is_whole = kind in ("columns", "elements", "columns of experts")
        assert part.original0.shape == ((4, 6, 8) if is_whole else MASKS[kind][1])
        index = sum(buffer.nbytes for buffer in part.buffers())
        assert (index, is_whole) == index_bytes(Mask.of(frozen), torch.Size((4, 6, 8)))
        where, before = frozen.expand(4, 6, 8), masked.weight.detach().clone()
        steps = [optimizer([p for p in model.parameters() if p.requires_grad]) for model in (masked, compact)]
        generator = torch.Generator().manual_seed(2)
        for _ in range(4):
            for x in torch.randn(2, 3, 8, generator=generator):  # two micro-batches
                for model in (masked, compact):
                    model(x).square().sum().backward()
            masked.weight.grad[where] = 0
            for step in steps:
                step.step()
                step.zero_grad()
            with torch.no_grad():
                masked.weight[where] = before[where]
            assert identical(compact.weight.detach(), masked.weight.detach()), name
        assert identical(compact.state_dict()["weight"], masked.weight.detach())
        assert not torch.equal(compact.weight, before)
        kept = before if is_whole else part[0].keep(before)
        assert identical(part.original0.detach(), kept)  # never written


def test_a_masked_weight_in_half_precision_has_wide_masters_and_comes_back_whole():
    model = Experts().to(torch.bfloat16)
    start = copy.deepcopy(model)
    frozen = half((4, 6, 8))
    split(model, {"weight": Mask.of(frozen)})
    part = parts_of(model)["weight"]
    part.original1.data = part.original1.data.float()
    with torch.no_grad():
        part.original1.add_(1e-4)
    assert model.weight.dtype in HALF_PRECISION
    state = model.state_dict()
    assert state["weight"].dtype == torch.float32
    assert identical(state["weight"][frozen], start.weight.detach()[frozen].float())
    other = copy.deepcopy(start)
    split(other, {"weight": Mask.of(frozen)})
    parts_of(other)["weight"].original1.data = parts_of(other)["weight"].original1.data.float()
    other.load_state_dict(state)
    assert identical(other.state_dict()["weight"], state["weight"])
    assert identical(parts_of(other)["weight"].original0.detach(), start.weight.detach())
    join(model)
    assert not is_parametrized(model)
    assert identical(model.weight.detach(), state["weight"])
    assert list(model.state_dict()) == ["weight"]


def test_tied_weights_that_train_in_part_stay_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    split(model, {"embed.weight": Mask.of(half((9, 4)))})
    assert len(list(model.parameters())) == 2
    model["head"](model["embed"](torch.tensor([1, 2]))).sum().backward()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1)
    assert identical(model["head"].weight.detach(), model["embed"].weight.detach())
    state = model.state_dict()
    assert state.keys() == {"embed.weight", "head.weight"}
    model.load_state_dict(state)
    join(model)
    assert identical(model["head"].weight.detach(), state["head.weight"])


def test_a_compiled_model_may_train_in_part():
    for kind in ("experts", "elements"):
        model = Experts()
        split(model, {"weight": Mask.of(half(MASKS[kind][0]))})
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
        grads = []
        for run in (model, torch.compile(model, backend="eager")):
            run(x).square().sum().backward()
            grads.append(parts_of(model)["weight"].original1.grad.clone())
            model.zero_grad()
        assert identical(*grads)


def test_stacked_experts_compute_in_half_precision_under_autocast_round_after_round():
    model = Experts()
    for trains_in_part in (False, True, False):
        autocast_experts(model)
        if trains_in_part:
            split(model, {"weight": Mask.of(half((4, 1, 1)))})
            parts_of(model)["weight"].original0.data = parts_of(model)["weight"].original0.data.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            assert model.weight.dtype == torch.bfloat16
            model(torch.randn(3, 8)).sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        assert model.state_dict()["weight"].dtype == torch.float32
        join(model)
        assert model.weight.dtype == torch.float32
