"""Half fine-tuning in your own training loop: select, freeze, verify."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from hft import freezing
from hft.errors import HFTError
from hft.model.anatomy import Anatomy, anatomy_of, meta_model
from hft.model.weights import checksum
from hft.parts import TRAINED, checkpoint_name, is_part, join, parts_of, split
from hft.record import verification
from hft.record.verification import Verification
from hft.selection import Selection, SelectionConfig, policies
from hft.selection.masks import Mask, frozen_values

# What wrappers put before or into the names of parameters.
WRAPPERS = re.compile(r"^(module\.)+|_orig_mod\.(module\.)*")


@dataclass(frozen=True)
class Frozen:
    """What `freeze` froze, and what it takes to prove it."""

    selection: Selection  # which units train
    checksums: dict[str, str]  # SHA-256 of each wholly or partly frozen parameter, by name
    dtypes: dict[str, torch.dtype]  # of each of them when it was frozen
    others: dict[str, str | None]  # the state dict's other keys: tied ones with their parameter, buffers with None


def select(model: PreTrainedModel | Anatomy, config: SelectionConfig | None = None, **settings: Any) -> Selection:
    """Choose which units train in a round (paper Algorithm 1 by default).

    Args:
        model: a decoder-only transformers model, as it is or compiled or under DDP, or its anatomy.
        config: the policy, its fraction, seed and round; by default the paper's HFT.
        settings: fields of `SelectionConfig` that replace the config's, such as `selection_seed=1` or `round=2`.

    Raises:
        HFTError: the model has unknown modules, or the settings contradict each other.
    """
    if not isinstance(model, Anatomy):
        model = unwrapped(model)
        model = anatomy_of(meta_model(model.config) if parts_of(model) else model)
    return policies.select(model, replace(config or policies.SelectionConfig(), **settings))


def freeze(model: PreTrainedModel, selection: Selection) -> Frozen:
    """Set every parameter's `requires_grad` by a selection. Call it before the optimizer is built.

    A parameter that trains in part becomes two (`hft.parts`): the base's values, and the trained elements, which alone
    require a gradient. State dicts still contain the whole parameter. Gradients of frozen parameters are cleared. Pass
    the optimizer only parameters that require a gradient; torch's optimizers also skip the others by themselves. A
    model in half precision needs fp32 master weights as usual: in bf16 most updates at 2e-5 round to zero.

    Returns:
        What `verify` needs afterwards.

    Raises:
        HFTError: the selection was made for another model.
    """
    wrapped = any(isinstance(module, DistributedDataParallel | FSDPModule) for module in model.modules())
    if wrapped and selection.frozen_masks:
        raise HFTError("parts of tensors train, which makes other parameters: freeze the model first, then wrap it")
    model = unwrapped(model)
    join(model)  # what an earlier round has split
    freezing.freeze(model, selection)
    masks, parameters = selection.frozen_masks, dict(model.named_parameters())
    names = [*selection.frozen_parameters, *masks]
    checksums = {name: checksum(frozen_values(parameters[name], masks.get(name))) for name in names}
    dtypes = {name: parameters[name].dtype for name in names}
    first = {parameter: name for name, parameter in parameters.items()}
    others = {key: first.get(t) for key, t in model.state_dict(keep_vars=True).items() if key not in parameters}
    split(model, masks)
    return Frozen(selection, checksums, dtypes, others)


def verify(out: str | Path | nn.Module | Mapping[str, torch.Tensor], base: str | Frozen | None = None) -> Verification:
    """Check that everything frozen is bit-identical to the base.

    Args:
        out: the folder of a run or checkpoint of hft; or a model that `freeze` froze, or its full state dict.
        base: for a folder, its base, if it has moved since; for a model, what `freeze` returned.

    Returns:
        The result: `.ok` and `.report()`. A parameter that was added or untied after `freeze` counts as unlisted.

    Raises:
        HFTError: a folder cannot be read, or a model is given without the return value of `freeze`.
    """
    if isinstance(out, str | Path):
        return verification.verify_folder(out, base)
    if not isinstance(base, Frozen):
        raise HFTError("to verify a model in memory, give what hft.freeze returned: hft.verify(model, frozen)")
    state = dict(out.named_parameters()) if isinstance(out, nn.Module) else out
    state = {WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    state = {checkpoint_name(name): tensor for name, tensor in state.items() if not is_part(name, TRAINED)}
    masks, stored = base.selection.frozen_masks, {name: state[name] for name in base.dtypes if name in state}
    stored = {name: as_frozen(t.detach(), base.dtypes[name], masks.get(name)) for name, t in stored.items()}
    found = verification.verify_tensors(stored, base.checksums, (), None, masks=masks)
    others = {} if isinstance(out, nn.Module) else base.others
    found.lost = [name for name in base.selection.trained_parameters if name not in state]
    for name in sorted(state.keys() - base.selection.anatomy.numels.keys()):
        first = others.get(name)
        if name not in others or (first in state and not torch.equal(state[name], state[first])):
            found.unlisted.append(name)
    return found


def as_frozen(tensor: torch.Tensor, dtype: torch.dtype, mask: Mask | None) -> torch.Tensor:
    """A whole tensor in the dtype that it was frozen in, unless that would round what is frozen of it."""
    wide = freezing.whole(tensor)
    values = frozen_values(wide, mask)
    return wide.to(dtype) if torch.equal(values.to(dtype).to(values.dtype), values) else wide


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model that torch.compile, DDP or accelerate has wrapped."""
    while (inside := extract_model_from_parallel(model, keep_torch_compile=False)) is not model:
        model = inside
    return model
