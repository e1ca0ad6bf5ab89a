"""A policy of your own: the first and last layers train whole; of the layers between, only the norms train."""

from collections.abc import Iterable

from hft.errors import HFTError
from hft.model.anatomy import Anatomy, Unit
from hft.selection import SelectionConfig


def outer_layers(anatomy: Anatomy, config: SelectionConfig, norms: bool = True) -> Iterable[Unit]:
    """Train as many of the outermost layers as `fraction` allows.

    Args:
        anatomy: what the model is made of; no weights are needed.
        config: `fraction`, `selection_seed` and `round` are there to be used.
        norms: an option of this policy, from `policy_options`: whether the norms train everywhere.

    Returns:
        The units that train. For parts of tensors return also a dict: parameter name -> bool tensor that broadcasts
        to it, True where it trains.
    """
    count = round(config.fraction * anatomy.num_layers)
    if count == 0:
        raise HFTError(f"fraction {config.fraction} of {anatomy.num_layers} layers selects no layer; raise it")
    first, last = -(-count // 2), anatomy.num_layers - count // 2
    outer = {layer for layer in range(anatomy.num_layers) if layer < first or layer >= last}
    return [unit for unit in anatomy.units if unit.layer in outer or (norms and unit.block == "norm")]
