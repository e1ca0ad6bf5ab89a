"""LoRA (arXiv 2106.09685; paper Table 5): a low-rank update of each targeted matrix."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hft.config import option
from hft.methods.adapter import Adapter


@dataclass
class LoRA(Adapter):
    name: ClassVar[str] = "lora"
    peft_class: ClassVar[str] = "LoraConfig"
    peft_names: ClassVar[dict[str, str | None]] = {"rank": "r"}

    rank: int | None = option("Rank of LoRA; the mean rank that AdaLoRA ends with.")
    lora_alpha: int | None = option("The update is scaled by lora_alpha / rank.")
    lora_dropout: float | None = option("Dropout before the adapter.")
    target_modules: Literal["all-linear"] | list[str] | None = option(
        "Modules with an adapter: kinds such as q_proj v_proj, or all-linear."
    )
