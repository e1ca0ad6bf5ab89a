"""Supervised fine-tuning on demonstrations (paper, section 4.1), on request with a KL term to the base."""

from hft.objectives import Objective

OBJECTIVE = Objective(
    name="sft",
    description="fine-tune on demonstrations: --config RECIPE.yaml [METHOD.yaml] [--key value]",
    module="hft.training.anchored",
    trainer_name="AnchoredSFTTrainer",
    reader="sft_rows",
    reference_sequences=1,
    reference_key="kl_to_base",
)
