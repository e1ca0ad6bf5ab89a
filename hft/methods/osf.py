"""OSF (arXiv 2504.07097): the smaller singular directions of each matrix train, orthogonally to the larger ones.

Its factors are taken from the weights as they are stored, and taken again when it is loaded.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hft.config import option
from hft.methods.adapter import Adapter


@dataclass
class OSF(Adapter):
    name: ClassVar[str] = "osf"
    peft_class: ClassVar[str] = "OSFConfig"
    peft_names: ClassVar[dict[str, str | None]] = {"preserved_fraction": "effective_rank"}
    upcasts_base: ClassVar[bool] = False

    preserved_fraction: float | None = option("Fraction of each matrix's singular directions that OSF keeps.")
    target_modules: Literal["all-linear"] | list[str] | None = option(
        "Modules with an adapter: kinds such as q_proj v_proj, or all-linear."
    )
