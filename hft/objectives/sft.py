"""Supervised fine-tuning on demonstrations (paper, section 4.1)."""

from hft.objectives import Objective

OBJECTIVE = Objective(
    name="sft",
    description="fine-tune on demonstrations: --config RECIPE.yaml [METHOD.yaml] [--key value]",
    trainer_name="SFTTrainer",
    reader="sft_rows",
)
