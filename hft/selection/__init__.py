"""Policies, selections, schedules and manifests: pure data, no trainer and no weights."""

from hft.selection.manifest import Manifest
from hft.selection.masks import Mask
from hft.selection.policies import Selection, SelectionConfig, select
from hft.selection.schedules import ScheduleConfig

__all__ = ["Manifest", "Mask", "ScheduleConfig", "Selection", "SelectionConfig", "select"]
