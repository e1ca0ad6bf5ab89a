"""What schedules, updates, adapters and strategies have in common: a name, keys, and what they cannot work with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hft.selection import Selection


@dataclass
class MethodPart:
    """A part of a method. The fields of a subclass are its keys in a config.

    Attributes:
        kind: the key that names it: `schedule`, `update`, `adapter` or `strategy`.
        name: the value of that key.
        description: one line.
        shardable: whether it runs on the shards of FSDP2.
        acts_around_step: whether it reads or changes gradients or weights around `optimizer.step()`.
        package: where the built-in ones of its kind are.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    description: ClassVar[str] = ""
    shardable: ClassVar[bool] = True
    acts_around_step: ClassVar[bool] = True
    package: ClassVar[str] = __package__

    def check_args(self, args: TrainingArguments, *, has_reference: bool = False) -> None:
        """Raise an `HFTError` for settings of the trainer, or a reference, that would silently change the method."""

    def memory(self, selection: Selection) -> int:
        """Bytes beside weights, gradients and optimizer state."""
        return 0

    def record(self) -> dict[str, Any]:
        """The name and the keys, which the manifest keeps."""
        return {self.kind: self.name} | {key: value for key, value in asdict(self).items() if value is not None}
