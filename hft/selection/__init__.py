"""Policies, masks and selections: pure data, no trainer and no weights."""

from hft.selection.masks import Mask
from hft.selection.policies import Selection, SelectionConfig, select

__all__ = ["Mask", "Selection", "SelectionConfig", "select"]
