"""Policies, masks and selections: pure data, no trainer and no weights."""

from hft.selection.masks import Mask
from hft.selection.policies import select
from hft.selection.selection import Selection, SelectionConfig

__all__ = ["Mask", "Selection", "SelectionConfig", "select"]
