"""Direct preference optimization (arXiv 2305.18290; paper, section 4.1): both answers of a pair at once."""

from hft.objectives import Objective

OBJECTIVE = Objective(
    name="dpo",
    description="align with pairs of answers: --config RECIPE.yaml [METHOD.yaml] [--key value]",
    trainer_name="DPOTrainer",
    reader="preference_rows",
    unit="pairs",
    sequences=2,
    reference_sequences=2,
    pads=True,
    held_out=("loss", "rewards/accuracies", "rewards/margins"),
    not_at_start=("rewards/accuracies",),  # every margin is 0 then, and TRL counts none of them as won
    order=1,
    linestyle="--",
)
