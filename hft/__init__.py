"""Half Fine-Tuning (arXiv 2404.18466) on TRL.

Half-freeze a model in any training loop, and prove afterwards that it held:

    selection = hft.select(model)
    frozen = hft.freeze(model, selection)
    ...
    assert hft.verify(model, frozen).ok
"""

import importlib

# Public names, imported on first use, so that `import hft` loads no torch.
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


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'hft' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
