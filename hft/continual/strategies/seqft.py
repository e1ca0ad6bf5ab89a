"""SeqFT: the tasks one after another, and nothing against forgetting (paper section 4.2)."""

from dataclasses import dataclass
from typing import ClassVar

from hft.methods.strategy import Strategy


@dataclass
class SeqFT(Strategy):
    """Each round trains on its task alone."""

    name: ClassVar[str] = "seqft"
