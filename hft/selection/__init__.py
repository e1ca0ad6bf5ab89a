"""Policies, selections and manifests: pure data, no trainer and no weights."""

from hft.selection.manifest import Manifest
from hft.selection.masks import Mask
from hft.selection.policies import Selection, SelectionConfig, select

__all__ = ["Manifest", "Mask", "Selection", "SelectionConfig", "select"]
