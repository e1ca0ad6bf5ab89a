"""Scores, saved beside the model that was scored."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hft.errors import HFTError, reason
from hft.record.manifest import write_json

SCORES_FOLDER = "scores"


@dataclass(frozen=True)
class Score:
    """One number of one task, such as `exact_match` of `gsm8k`."""

    task: str
    metric: str
    value: float  # the mean over `n` rows
    stderr: float | None  # its standard error; None if the metric has none
    n: int
    unit: str = "%"  # of both, `%` or `nats/token`
    higher_is_better: bool = True


@dataclass
class Scores:
    """The scores of one model on one suite, with what they depend on."""

    suite: str
    model: str  # folder or Hub id
    model_sha256: str  # of the weights' tensors; for a Hub id the commit
    dtype: str  # in which the model ran
    settings: dict[str, Any] = field(default_factory=dict)  # limit, subsets, chat template, backend, batch size, seeds
    data: dict[str, str] = field(default_factory=dict)  # SHA-256 of the rows by task
    versions: dict[str, str] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)

    def save(self, folder: str | Path) -> Path:
        """Write `FOLDER/scores/SUITE.json`."""
        path = Path(folder) / SCORES_FOLDER / f"{self.suite}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**content | {"scores": [Score(**score) for score in content["scores"]]})
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise HFTError(f"{path} holds no valid scores: {reason(error)}") from error

    def find(self, task: str, metric: str | None = None) -> Score | None:
        """The score of a task, by default that of its first metric."""
        found = (score for score in self.scores if score.task == task and metric in (None, score.metric))
        return next(found, None)


def scores_of(folder: str | Path) -> dict[str, Scores]:
    """All scores that are saved in a model's folder, by suite."""
    return {path.stem: Scores.load(path) for path in sorted((Path(folder) / SCORES_FOLDER).glob("*.json"))}
