"""Kahneman-Tversky optimization (arXiv 2402.01306): each answer of a pair by itself, as desirable or undesirable."""

from hft.objectives import Objective

OBJECTIVE = Objective(
    name="kto",
    description="align with answers, each desirable or not: --config RECIPE.yaml [METHOD.yaml] [--key value]",
    trainer_name="KTOTrainer",
    reader="unpaired_rows",
    unit="answers",
    forward_sequences=1,  # the mismatched answer of the KL term
    reference_sequences=2,
    pads=True,
    held_out=("loss", "rewards/margins"),
    order=2,
    linestyle=":",
)
