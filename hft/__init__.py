"""Half Fine-Tuning (arXiv 2404.18466) on TRL.

Half-freeze a model in any training loop, and prove afterwards that it held:

    selection = hft.select(model)
    frozen = hft.freeze(model, selection)
    ...
    assert hft.verify(model, frozen).ok
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hft.errors import HFTError as HFTError
    from hft.loop import freeze as freeze
    from hft.loop import select as select
    from hft.loop import verify as verify
    from hft.model.anatomy import Anatomy as Anatomy
    from hft.model.anatomy import anatomy_of as anatomy_of
    from hft.record.manifest import Manifest as Manifest
    from hft.runs.config import Config as Config
    from hft.runs.config import load_config as load_config
    from hft.runs.plan import RunPlan as RunPlan
    from hft.runs.plan import make_plan as make_plan
    from hft.runs.result import RunResult as RunResult
    from hft.runs.train import train as train
    from hft.selection import Selection as Selection
    from hft.selection import SelectionConfig as SelectionConfig
    from hft.training import HalfFineTuning as HalfFineTuning
    from hft.training import HFTDPOTrainer as HFTDPOTrainer
    from hft.training import HFTSFTTrainer as HFTSFTTrainer
    from hft.training import half as half

__version__ = "0.1.0"

# The same names, imported on first use, so that `import hft` loads no torch.
_HOME = {
    "Anatomy": "hft.model.anatomy",
    "Config": "hft.runs.config",
    "HFTDPOTrainer": "hft.training",
    "HFTError": "hft.errors",
    "HFTSFTTrainer": "hft.training",
    "HalfFineTuning": "hft.training",
    "Manifest": "hft.record.manifest",
    "RunPlan": "hft.runs.plan",
    "RunResult": "hft.runs.result",
    "Selection": "hft.selection",
    "SelectionConfig": "hft.selection",
    "anatomy_of": "hft.model.anatomy",
    "freeze": "hft.loop",
    "half": "hft.training",
    "load_config": "hft.runs.config",
    "make_plan": "hft.runs.plan",
    "select": "hft.loop",
    "train": "hft.runs.train",
    "verify": "hft.loop",
}
__all__ = list(_HOME)


if not TYPE_CHECKING:  # else every name would pass

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module 'hft' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
