"""Scores, saved beside the model that was scored: a file for each benchmark under each choice of settings."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft.errors import HFTError, reason
from hft.jsonl import read_jsonl
from hft.record.identity import digest
from hft.record.manifest import write_json

if TYPE_CHECKING:
    from pandas import DataFrame

SCORES_FOLDER = "scores"
ANSWERS_NAME = "answers.jsonl"  # in that folder, by `hft generate`
ROWS = ".rows.jsonl.gz"  # ends the file with the rows behind the scores


@dataclass(frozen=True)
class Score:
    """One number of one task, such as `exact_match` of `gsm8k`."""

    task: str
    metric: str
    value: float  # the mean over `n` rows
    stderr: float | None  # its standard error; None if the metric has none
    n: int
    unit: str = "%"  # of both: `%`, `nats/token`, or as the benchmark has it
    higher_is_better: bool = True


@dataclass
class Scores:
    """The scores of one model on benchmarks of one suite, with what they depend on."""

    suite: str
    model: str  # folder or Hub id
    model_sha256: str  # of the weights' files; for a Hub id the commit
    dtype: str  # in which the model ran
    settings: dict[str, Any] = field(default_factory=dict)  # limit, subsets, chat template, backend, files of rows
    data: dict[str, str] = field(default_factory=dict)  # SHA-256 of the rows by benchmark
    versions: dict[str, str] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)  # SHA-256 of all else: config, tokenizer, template, bases
    truncated: dict[str, int] = field(default_factory=dict)  # prompts that did not fit into the context, by benchmark

    def save(self, folder: str | Path) -> Path:
        """Write the scores of one benchmark to `FOLDER/scores/SUITE/BENCHMARK-SETTINGS.json`."""
        path = self.path(folder, next(iter(self.data), self.scores[0].task))
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_json(path, asdict(self))

    def path(self, folder: str | Path, benchmark: str) -> Path:
        """Where they are saved; other settings have another file, so that a quick look replaces nothing."""
        return Path(folder, SCORES_FOLDER, self.suite, f"{benchmark}-{digest([self.dtype, self.settings])[:8]}.json")

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**content | {"scores": [Score(**score) for score in content["scores"]]})
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise HFTError(f"{path} holds no valid scores: {reason(error)}") from error

    def find(self, task: str, metric: str | None = None) -> Score | None:
        """The score of a task, by default that of its first metric."""
        return next((one for one in self.scores if one.task == task and metric in (None, one.metric)), None)


class SuiteScores(list[Scores]):
    """All that is saved of one model on one suite; of what was scored under several settings the best comes first."""

    @property
    def scores(self) -> list[Score]:
        """Each task and metric once."""
        found: dict[tuple[str, str], Score] = {}
        for score in (score for each in self for score in each.scores):
            found.setdefault((score.task, score.metric), score)
        return list(found.values())

    def of(self, task: str, metric: str | None = None) -> Scores | None:
        """The scores of a task with what they depend on."""
        return next((each for each in self if each.find(task, metric)), None)

    def find(self, task: str, metric: str | None = None) -> Score | None:
        return next(filter(None, (each.find(task, metric) for each in self)), None)


def scores_of(folder: str | Path) -> dict[str, SuiteScores]:
    """All scores that are saved in a model's folder, by suite: of the weights that were scored last."""
    return {suite: SuiteScores(scores for _, scores in found) for suite, found in _files_of(folder).items()}


def rows_of(folder: str | Path, suite: str, task: str) -> DataFrame | None:
    """The rows behind a model's scores on a task; None if they were not kept.

    Columns: `row`, the same for the same question to every model; `task`, which part of the benchmark it belongs to;
    one for each metric, in the unit of its score; and `answer`, what the model wrote or chose.
    """
    import pandas as pd

    for path, scores in _files_of(folder).get(suite, ()):
        if task not in scores.data and not scores.find(task):
            continue
        if not (rows := path.with_suffix(ROWS)).exists():
            return None
        found = pd.read_json(rows, lines=True, dtype={"row": str, "answer": object}, convert_dates=False)
        return found if task in scores.data else found[found["task"] == task].reset_index(drop=True)
    return None


def answers_of(folder: str | Path) -> list[dict[str, Any]]:
    """What a model answered to `hft generate`: `prompt`, its last message; `answer`, `base_answer` and `reference`."""
    path = Path(folder, SCORES_FOLDER, ANSWERS_NAME)
    try:
        rows = read_jsonl(path) if path.exists() else []
        return [row | {"prompt": row["prompt"][-1]["content"], "answer": str(row["answer"])} for row in rows]
    except (KeyError, IndexError, TypeError) as error:
        raise HFTError(f"{path} holds no valid answers: {reason(error)}") from error


def save_rows(rows: DataFrame, path: Path) -> None:
    """Write the rows behind scores beside their file, in one step."""
    target = path.with_suffix(ROWS)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    rows.to_json(temporary, orient="records", lines=True, double_precision=15, compression="gzip")
    temporary.replace(target)


def _files_of(folder: str | Path) -> dict[str, list[tuple[Path, Scores]]]:
    """The files of each suite, those on all rows first, then the newest, and none of weights that are gone."""
    newest = sorted(Path(folder, SCORES_FOLDER).glob("*/*.json"), key=lambda path: -path.stat().st_mtime)
    found = [(path, Scores.load(path)) for path in newest]
    found = [(path, scores) for path, scores in found if scores.model_sha256 == found[0][1].model_sha256]
    found.sort(key=lambda each: -(each[1].settings.get("limit") or float("inf")))
    return {suite: [each for each in found if each[1].suite == suite] for suite in sorted({s.suite for _, s in found})}
