"""The score matrix of a sequence, and how much was learned and forgotten by it (paper A.3.2, eq. 5)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hft.record.manifest import write_json
from hft.record.scores import Score, Scores
from hft.text import markdown

MATRIX_NAME = "matrix.json"
BASE_ROW = "start"

# S[t][i]: the score of task i after round t, both counted from 0; None where it was not measured.
ScoreRows = Sequence[Sequence[float | None]]


def overall_performance(scores: ScoreRows, t: int) -> float:
    """OP of eq. 5: the mean score of the tasks seen, after round t (from 0)."""
    return sum(scores[t][: t + 1]) / (t + 1)


def backward_transfer(scores: ScoreRows, t: int) -> float:
    """BWT of eq. 5: the sum of the changes of earlier tasks since each was learned, over the t + 1 tasks seen.

    All of the paper's tables divide by the number of tasks; Lopez-Paz and Ranzato (2017) divide by one less.
    """
    return sum(changes(scores, t)) / (t + 1)


def changes(scores: ScoreRows, t: int) -> list[float]:
    return [scores[t][i] - scores[i][i] for i in range(t)]


def forgetting(scores: ScoreRows, t: int) -> list[float]:
    """For each earlier task its best score before round t minus that after it (Chaudhry et al. 2018)."""
    return [max(scores[j][i] for j in range(i, t)) - scores[t][i] for i in range(t)]


@dataclass
class Matrix:
    """The scores of a sequence so far, in percent, as `matrix.json` has them beside their summary."""

    tasks: list[str]  # in the order in which they are learned
    metrics: list[str]  # the metric of each task's score
    rounds: list[str] = field(default_factory=list)  # `start` if the base was scored, then the task of each round
    scores: list[list[float | None]] = field(default_factory=list)  # (rounds, tasks), None where not measured
    others: dict[str, list[list[float | None]]] = field(default_factory=dict)  # further metrics, in the same form
    counts: list[int] = field(default_factory=list)  # test rows of each task
    about: dict[str, Any] = field(default_factory=dict)  # what else the numbers depend on

    @property
    def after_rounds(self) -> list[list[float | None]]:
        """S: the rows without the start."""
        return self.scores[self.rounds[:1] == [BASE_ROW] :]

    def add(self, name: str, found: Scores) -> None:
        def row(metrics: Sequence[str]) -> list[float | None]:
            return [score and score.value for score in map(found.find, self.tasks, metrics)]

        self.rounds.append(name)
        self.scores.append(row(self.metrics))
        for metric, rows in self.others.items():
            rows.append(row([metric] * len(self.tasks)))
        self.about |= {"dtype": found.dtype, "versions": found.versions}

    def summary(self) -> dict[str, Any]:
        """OP and BWT after each round, and the other ways to count what was forgotten, after the last."""
        s, rounds = self.after_rounds, range(len(self.after_rounds))
        found = {"op": [overall_performance(s, t) for t in rounds], "bwt": [backward_transfer(s, t) for t in rounds]}
        if not s:
            return found
        *earlier, last = rounds
        return found | {
            # As Lopez-Paz and Ranzato (2017) have it; and as TreeLoRA's script (ZinYY/TreeLoRA), without gains.
            "bwt_earlier_tasks": found["bwt"][-1] * len(rounds) / len(earlier) if earlier else None,
            "bwt_clipped": sum(min(change, 0.0) for change in changes(s, last)) / len(rounds),
            "forgetting": dict(zip(self.tasks, forgetting(s, last), strict=False)),
        }

    def save(self, folder: str | Path) -> Path:
        return write_json(Path(folder) / MATRIX_NAME, asdict(self) | self.summary())

    def totals(self, last: Scores, limit: int | None) -> Scores:
        """OP and BWT after the last round as scores of the sequence; `last` are those of the last round's model."""
        found, n = self.summary(), sum(self.counts)
        scores = [Score(name, name, found[name][-1], None, n) for name in ("op", "bwt")]
        settings = {"tasks": self.tasks, "limit": limit}
        return replace(last, settings=settings, scores=scores, data={}, inputs={}, truncated={})

    @classmethod
    def load(cls, folder: str | Path) -> Matrix:
        content = json.loads((Path(folder) / MATRIX_NAME).read_text(encoding="utf-8"))
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})

    def report(self) -> str:
        found = self.summary()
        earlier = "-" if found["bwt_earlier_tasks"] is None else f"{found['bwt_earlier_tasks']:.2f}"
        lost = ", ".join(f"{task} {value:.1f}" for task, value in found["forgetting"].items()) or "-"
        return f"""\
OP {found["op"][-1]:.2f}, BWT {found["bwt"][-1]:.2f} (eq. 5, over all tasks)
BWT over earlier tasks only {earlier}; with gains counted as 0 {found["bwt_clipped"]:.2f}
forgotten since the best score: {lost}"""

    def table(self) -> str:
        """Markdown in the form of Table 29: a row per task, a column after each round; OP and BWT below."""
        summary, skip = self.summary(), [""] * (len(self.scores) - len(self.after_rounds))
        rows = [["", *self.rounds]]
        for task, *values in zip(self.tasks, *self.scores, strict=True):
            rows.append([task, *("-" if value is None else f"{value:.1f}" for value in values)])
        rows += [[name.upper(), *skip, *(f"{value:.1f}" for value in summary[name])] for name in ("op", "bwt")]
        return markdown(rows)
