"""Scores of a model on the tasks of a sequence, by lm-evaluation-harness."""

from pathlib import Path

from hft.continual.metrics import METRICS
from hft.evaluation.evaluate import Settings, evaluate
from hft.evaluation.local import as_dataset
from hft.evaluation.suites import Benchmark
from hft.methods.strategy import Row
from hft.record.scores import Scores

SUITE = "trace"


def score_tasks(
    model: str, tests: dict[str, list[Row]], metrics: dict[str, str], *, longest_answer: int, batch_size: int, out: Path
) -> Scores:
    """Score a model on test rows by task, in percent, unless `out` has them; complete in the first process only."""
    benchmarks = [benchmark_of(task, rows, metrics[task], longest_answer) for task, rows in tests.items()]
    return evaluate(model, SUITE, Settings(chat=False, batch_size=batch_size), out, benchmarks)


def benchmark_of(task: str, rows: list[Row], metric: str, longest_answer: int) -> Benchmark:
    """A task of a sequence, whose first metric is its score."""
    metrics = METRICS[metric]

    def results(row: Row, answers: list[str]) -> dict[str, float]:
        return {name: of(answers[0], row["completion"], row["prompt"]) for name, of in metrics.items()}

    spec = {
        "task": f"{SUITE}_{task}",
        "custom_dataset": as_dataset(test=rows),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "context",
        "doc_to_target": "completion",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": longest_answer},
        "process_results": results,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        "metadata": {"version": 1.0},
    }
    return Benchmark(task, f"{SUITE}_{task}", {name: f"{name},none" for name in metrics}, spec=spec, rendered=True)
