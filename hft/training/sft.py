"""Half fine-tuning on demonstrations."""

from trl import SFTTrainer

from hft.training.mixin import HalfFineTuning


class HFTSFTTrainer(HalfFineTuning, SFTTrainer):
    """TRL's `SFTTrainer` with a `selection` (paper section 4.1)."""

    _tag_names = ["trl", "sft", "hft"]
