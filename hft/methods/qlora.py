"""QLoRA (arXiv 2305.14314; paper Table 5): LoRA on a base in 4 bits, nf4 with double quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import TrainingArguments

from hft.errors import HFTError
from hft.methods.lora import LoRA
from hft.model.anatomy import Anatomy

# Bytes per element in nf4 with double quantization: 4 bits, and 8 bits per block of 64 with fp32 per 256 blocks.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass
class QLoRA(LoRA):
    """The base's matrices in the layers are quantized; what the adapter adds is not."""

    name: ClassVar[str] = "qlora"
    description: ClassVar[str] = "LoRA on a base in 4 bits"

    def check_args(self, args: TrainingArguments, *, has_reference: bool = False) -> None:
        from transformers.utils import is_bitsandbytes_available

        super().check_args(args, has_reference=has_reference)
        if not is_bitsandbytes_available():
            raise HFTError("qlora needs bitsandbytes: pip install bitsandbytes")

    def load_kwargs(self, args: TrainingArguments) -> dict[str, Any]:
        import torch
        from transformers import BitsAndBytesConfig

        compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
        return {"quantization_config": config, "device_map": {"": args.device}}

    def base_bytes(self, anatomy: Anatomy, held: int, bytes_per_element: float) -> float:
        quantized = sum(unit.numel for unit in anatomy.units if unit.block != "norm")
        return quantized * NF4_BYTES + (anatomy.numel - quantized) * bytes_per_element + 4 * held
