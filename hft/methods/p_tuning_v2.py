"""P-tuning v2 (arXiv 2110.07602; paper Table 5): trained keys and values before those of each layer.

They reach the layers as a cache, which activation checkpointing would drop.
"""

from dataclasses import dataclass
from typing import ClassVar

from hft.config import option
from hft.methods.adapter import Adapter


@dataclass
class PTuningV2(Adapter):
    name: ClassVar[str] = "p-tuning-v2"
    peft_class: ClassVar[str] = "PrefixTuningConfig"
    learns_prompt: ClassVar[bool] = True
    keeps_checkpointing: ClassVar[bool] = False

    num_virtual_tokens: int | None = option("Length of the prompt or prefix.")
