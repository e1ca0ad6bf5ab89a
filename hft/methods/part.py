"""What schedules, updates, adapters and strategies have in common: a name, keys, and what they cannot work with."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hft.userfile import with_files

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hft.selection import Selection


@dataclass
class MethodPart:
    """A part of a method. The fields of a subclass are its keys in a config."""

    kind: ClassVar[str]  # the key that names it: `schedule`, `update`, `adapter` or `strategy`
    name: ClassVar[str]  # the value of that key
    shardable: ClassVar[bool] = True  # whether it runs on the shards of FSDP2
    acts_around_step: ClassVar[bool] = True  # whether it acts on gradients or weights around `optimizer.step()`

    @classmethod
    def description(cls) -> str:
        """One line: what the docstring of its file says after a name and a colon."""
        return (sys.modules[cls.__module__].__doc__ or "").partition("\n")[0].partition(": ")[2].rstrip(".")

    def check_args(self, args: TrainingArguments, *, has_reference: bool = False) -> None:
        """Raise an `HFTError` for settings of the trainer, or a reference, that would silently change the method."""

    def memory(self, selection: Selection) -> int:
        """Bytes in addition to weights, gradients and optimizer state."""
        return 0

    def given(self, but: Collection[str] = ()) -> dict[str, Any]:
        """Its keys that have a value, but for some."""
        return {key: value for key, value in asdict(self).items() if value is not None and key not in but}

    def record(self) -> dict[str, Any]:
        """The name and the keys, which the manifest keeps."""
        return with_files({self.kind: self.name} | self.given())
