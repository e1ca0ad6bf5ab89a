"""QLoRA (arXiv 2305.14314; paper Table 5): LoRA on a base in 4 bits, nf4 with double quantization.

The base's matrices in the layers are quantized; what the adapter adds is not.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import TrainingArguments

from hft.errors import HFTError
from hft.methods.lora import LoRA


@dataclass
class QLoRA(LoRA):
    name: ClassVar[str] = "qlora"
    # 4 bits per element, 8 bits per block of 64, and fp32 per 256 blocks.
    matrix_bytes: ClassVar[float] = 0.5 + 1 / 64 + 4 / (64 * 256)

    def check_args(self, args: TrainingArguments, *, has_reference: bool = False) -> None:
        from transformers.utils import is_bitsandbytes_available

        super().check_args(args, has_reference=has_reference)
        if not is_bitsandbytes_available():
            raise HFTError("qlora needs bitsandbytes: pip install bitsandbytes")

    def load_kwargs(self, args: TrainingArguments) -> dict[str, Any]:
        import torch
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
        )
        return {"quantization_config": quantization, "device_map": {"": args.device}}
