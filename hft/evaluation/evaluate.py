"""Score models on a suite with lm-evaluation-harness."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hft import __version__
from hft.errors import HFTError, reason
from hft.evaluation.results import check_finite, count_truncated, read_results
from hft.evaluation.rows import DRAWING_SEED, TASK_FOLDER, Spec, answer_rows, draw_examples, draw_rows, on_rows, spec_of
from hft.evaluation.subject import Subject, load_tokenizer, subject_of
from hft.evaluation.suites import LM_EVAL, PROTOCOLS, SUITES, Benchmark, Settings, find_task, own_files
from hft.machine import is_main, say
from hft.record.identity import digest
from hft.record.scores import Scores, save_rows

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks.manager import TaskDict
    from transformers import PreTrainedTokenizerBase

SEED = 1234  # lm-eval's default
SCORED_WITH = ("lm_eval", "torch", "transformers", "datasets")
# Settings that decide which benchmarks are run and how fast, not what comes out.
NEUTRAL = ("tasks", "batch_size", "dtype", "allow_code", "log_samples")


def evaluate(
    model: str,
    suite: str,
    settings: Settings | None = None,
    out: str | Path | None = None,
    benchmarks: Sequence[Benchmark] | None = None,
    engines: dict[Path, LM] | None = None,
) -> Scores:
    """Score a model on a suite; under `accelerate launch` the scores are complete in the first process only.

    Args:
        model: a model, a run's folder, an adapter, a checkpoint, or a Hub id.
        suite: a key of `SUITES`, or a name for the benchmarks that are given.
        settings: how.
        out: folder in whose `scores/SUITE/` each benchmark's scores and rows are written. A benchmark that is there
            for the same settings, weights, tokenizer, rows and packages is not run again.
        benchmarks: others than those of `SUITES`.
        engines: open models by folder (`engine_of`), which are scored with the weights they have now and stay open.
    """
    check_installed()
    from hft.evaluation.engine import engine_of

    settings = settings or Settings()
    subject = subject_of(model, settings.base)
    settings = resolved(suite, subject, settings)
    scores, opened = unscored(suite, subject, settings, {}), engines or {}
    for benchmark in _chosen(suite, settings) if benchmarks is None else benchmarks:
        if (spec := benchmark.spec or spec_of(benchmark, subject, settings)) is None:
            continue
        tasks = _load(benchmark, spec, settings)
        one = unscored(suite, subject, settings, {benchmark.name: _rows_sha256(tasks)})
        one.inputs["benchmark"] = digest(asdict(replace(benchmark, spec=None)))
        one.inputs |= {"files": own} if (own := own_files(benchmark)) else {}
        if benchmark.task == "hft_kl":
            one.inputs["kl_base"] = subject.base_subject().inputs
        path = out and one.path(out, benchmark.name)
        saved = Scores.load(path) if path and path.exists() else None
        if saved and replace(saved, scores=[], truncated={}, model=one.model) == one:
            one = saved
        else:
            if not engines:
                say(f"{subject.name}: {benchmark.name}")
            results = _run_tasks(benchmark, tasks, opened, subject, settings)
            if not is_main():
                continue
            check_finite(benchmark.name, results)
            one.scores, rows = read_results(benchmark, results)
            if cut := count_truncated(engine_of(subject, settings, opened), results):
                one.truncated[benchmark.name] = cut
                n = one.scores[0].n
                say(f"{benchmark.name}: {cut:,} of {n:,} prompts were longer than the context, and cut from the left")
            if path and settings.log_samples:
                save_rows(rows, path)
            if path:
                one.save(out)
        scores.scores += one.scores
        scores.data |= one.data
    return scores


def loss_on(task: str, rows: Iterable[dict[str, Any]], template: Path) -> Benchmark:
    """The loss on the last answer of conversations, as a trainer takes them, that a run's chat template renders."""
    made = answer_rows(rows, load_tokenizer(template))
    return Benchmark(task, "hft_task", {"loss": "loss,none"}, spec=on_rows({"hft_task": {"test": made}}))


def suites_of(words: Sequence[str], suite: str | None = None) -> dict[str, list[str]]:
    """The suite of each of `--tasks`, where none is given the one that has it; else `LM_EVAL`, lm-eval's own tasks."""
    words = [name for word in words for name in word.split(",") if name]  # lm-eval's command takes commas
    if suite or not words:
        return {suite or "quick": words}
    found: dict[str, list[str]] = {}
    for word in words:
        owners = [name for name, benchmarks in SUITES.items() if word in {each.name for each in benchmarks}]
        if len(owners) > 1:
            raise HFTError(f"{word} is in the suites {' and '.join(owners)}; choose one with --suite")
        found.setdefault(owners[0] if owners else LM_EVAL, []).append(word)
    if LM_EVAL in found:
        check_installed()
        for word in found[LM_EVAL]:
            find_task(word)  # a mistake is known before the other suites are scored
    return found


def check_installed() -> None:
    if find_spec("lm_eval") is None:
        raise HFTError("evaluation needs lm-evaluation-harness: pip install 'half-fine-tuning[eval]'")


def _chosen(suite: str, settings: Settings) -> list[Benchmark]:
    if suite == LM_EVAL:
        return [find_task(word) for word in settings.tasks]
    benchmarks = {benchmark.name: benchmark for benchmark in SUITES[suite]}
    if unknown := sorted(set(settings.tasks) - benchmarks.keys()):
        hint = "; without --suite all suites and lm-eval's tasks are searched"
        raise HFTError(f"suite {suite} has no {', '.join(unknown)}, only {', '.join(benchmarks)}{hint}")
    chosen = []
    for benchmark in (benchmarks[name] for name in settings.tasks or benchmarks):
        if benchmark.runs_code and not settings.allow_code:
            say(f"{benchmark.name} is skipped: it runs generated code, which needs --allow_code")
        else:
            form = "_chat" if settings.chat and benchmark.has_chat_task else ""
            chosen.append(replace(benchmark, task=benchmark.task + form))
    return chosen


def unscored(suite: str, subject: Subject, settings: Settings, data: dict[str, str]) -> Scores:
    """No scores yet, of a model on rows under settings, with what every score depends on."""
    same = {key: value for key, value in asdict(settings).items() if key not in NEUTRAL}
    same["protocol"] = PROTOCOLS.get(suite, "hft")
    packages = [*SCORED_WITH, *(["peft"] if subject.adapter else []), *filter(find_spec, {settings.backend} - {"hf"})]
    versions = {package: version(package) for package in packages} | {"hft": __version__}
    own = subject.inputs["model"]
    about = (suite, subject.name, own.get("commit") or own["weights"], settings.dtype)
    return Scores(*about, same, data, versions, inputs=subject.inputs.copy())


def _rows_sha256(tasks: TaskDict) -> str:
    """Of all that lm-eval may read: the rows to score, and those that examples are taken from."""

    def rows(task: ConfigurableTask) -> list[str]:
        shots = task.fewshot_docs() if task.config.num_fewshot else ()
        return [json.dumps(row, default=str, sort_keys=True) for row in (*task.eval_docs, *shots)]

    return digest({name: digest(rows(task)) for name, task in tasks["tasks"].items()})


def resolved(suite: str, subject: Subject, settings: Settings) -> Settings:
    """Settings whose chat format and dtype are decided."""
    import torch

    chat, dtype = settings.chat, settings.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    if chat is None:
        chat = suite != "quick" and _has_chat_format(load_tokenizer(subject.tokenizer))
    return replace(settings, chat=chat, dtype=dtype)


def _has_chat_format(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether there is a chat template that puts words around a message; TRACE's puts none."""
    if not tokenizer.chat_template:
        return False
    text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token or "") != "?"


@contextmanager
def _refusals(benchmark: Benchmark) -> Iterator[None]:
    from datasets.exceptions import DatasetsError
    from yaml import YAMLError

    of_python = (AssertionError, ImportError, LookupError, OSError, TypeError, ValueError)
    try:
        yield
    except (*of_python, DatasetsError, YAMLError) as error:
        raise HFTError(f"{benchmark.name} cannot be run: {reason(error)}") from error


def _load(benchmark: Benchmark, spec: Spec, settings: Settings) -> TaskDict:
    """lm-eval's tasks with their rows."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    for name in ("lm_eval.api.task", "lm_eval.models.huggingface"):
        logging.getLogger(name).addFilter(_is_news)
    _seed()  # some tasks shuffle while they load
    folders = [Path(lm_eval.__file__).parent / "tasks" / folder for folder in benchmark.folders]
    with _refusals(benchmark):
        loaded = TaskManager(include_path=[*folders, TASK_FOLDER], include_defaults=False).load([spec])
    for task in loaded["tasks"].values():
        if settings.max_gen_toks and task.get_config("output_type") == "generate_until":
            task.set_config("generation_kwargs", {"max_gen_toks": settings.max_gen_toks}, update=True)
        if task.get_config("num_fewshot") != 0:
            shots = task.get_config("num_fewshot") if benchmark.num_fewshot is None else benchmark.num_fewshot
            task.set_config("num_fewshot", shots or 0)
        task.set_fewshot_seed(seed=SEED)
    return loaded


def _run_tasks(
    benchmark: Benchmark, tasks: TaskDict, engines: dict[Path, LM], subject: Subject, settings: Settings
) -> dict[str, Any]:
    """lm-eval's results of one benchmark; empty in all processes but the first.

    These are the steps of `lm_eval.simple_evaluate`, which also runs `pip list` each time, for a second or two.
    """
    import lm_eval

    from hft.evaluation.engine import engine_of, scoring_tokens, without_system_turn

    lm = engine_of(subject, settings, engines)
    # A chat template writes the special tokens itself: none is added, in training neither.
    rendered = settings.chat or benchmark.rendered
    lm.add_bos_token = settings.backend_args.get("add_bos_token", False if rendered else None)
    if benchmark.task in ("hft_task", "hft_kl"):
        is_kl = benchmark.task == "hft_kl"
        lm = scoring_tokens(lm, engine_of(subject.base_subject(), settings, engines) if is_kl else None)
    if settings.chat and not benchmark.turns:
        lm = without_system_turn(lm)
    limit, samples, drawing = settings.limit, None, random.Random(DRAWING_SEED)
    _seed()
    with _refusals(benchmark):
        if settings.paper_subsets and benchmark.paper_rows:
            sizes = {name: len(task.eval_docs) for name, task in tasks["tasks"].items()}
            samples = {name: rows[:limit] for name, rows in draw_rows(sizes, benchmark.paper_rows, drawing).items()}
            limit = None
        if benchmark.draws_example:
            draw_examples(tasks["tasks"], load_tokenizer(subject.tokenizer), drawing)
        results = lm_eval.evaluate(
            lm=lm,
            task_dict=tasks,
            limit=limit,
            samples=samples,
            system_instruction=benchmark.instruction,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=benchmark.turns,
            bootstrap_iters=1000,
            confirm_run_unsafe_code=settings.allow_code,
        )
    return results or {}


def _is_news(warning: logging.LogRecord) -> bool:
    """Of lm-eval's warnings those that are about nothing that is counted or meant here."""
    known = ("Custom kwargs can be passed", "Combined length of context", "Left truncation applied")
    return not any(text in warning.getMessage() for text in known)


def _seed() -> None:
    """As `lm_eval.simple_evaluate` does; its tasks draw from the global generators."""
    from transformers import set_seed

    set_seed(SEED)
    random.seed(0)
