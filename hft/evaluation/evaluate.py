"""Score models on a suite with lm-evaluation-harness."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hft import __version__
from hft.config import option
from hft.errors import HFTError, reason
from hft.evaluation.drawn import SEED as DRAWING_SEED
from hft.evaluation.drawn import drawn_rows
from hft.evaluation.local import GROUP, TASK_FOLDER, as_dataset, local_spec, on_rows
from hft.evaluation.rows import answer_rows, general_texts, held_out_rows, text_rows
from hft.evaluation.suites import LOSS, METRIC_UNITS, PROTOCOLS, SUITES, Benchmark
from hft.machine import is_main, say
from hft.record.scores import SCORES_FOLDER, Score, Scores
from hft.runs.result import RESULTS_NAME

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from transformers import PreTrainedTokenizerBase

Spec = str | dict[str, Any]  # what lm-eval runs: the name of a task or group, or the config of one
SEED = 1234  # lm-eval's default
SCORED_WITH = ("lm_eval", "torch", "transformers", "datasets")
# Settings that decide which benchmarks are run and how fast, not what comes out.
NEUTRAL = ("tasks", "batch_size", "dtype", "allow_code")


@dataclass(frozen=True)
class Settings:
    """How a suite is run; the flags of `hft eval`."""

    limit: int | None = option("Rows of each task; default: all.")
    paper_subsets: bool = option("GSM8K 200, BBH 40 a task, TyDiQA 100 a language.", False)
    tasks: list[str] = field(default_factory=list, metadata={"help": "Only these benchmarks of the suite."})
    max_gen_toks: int | None = option("Most tokens of an answer; default: the task's.")
    chat: bool | None = option("Use the chat template; default: if any, not in quick.")
    dtype: Literal["bfloat16", "float16", "float32", "auto"] | None = option(
        "Of the model; default: bfloat16 on GPUs, else float32."
    )
    batch_size: int = option("Rows per forward pass.", 8)
    backend: str = option("lm-eval's engine, hf or vllm.", "hf")
    backend_args: dict[str, Any] = field(default_factory=dict, metadata={"help": "Further engine arguments, as JSON."})
    base: str | None = option("What the models were tuned from; default: by manifest.")
    task_data: str | None = option("A run with held-out rows, for models without any.")
    data: str | None = option("Folder of JSON Lines files to score on, not the Hub.")
    allow_code: bool = option("Run generated code (HumanEval, MBPP).", False)


@dataclass(frozen=True)
class Subject:
    """A model to score."""

    name: str  # as it was given
    weights: Path  # folder of the model itself, or of the base under an adapter
    adapter: Path | None
    base: str | None  # what it was tuned from
    sha256: str  # of its weight files; for a model from the Hub the commit

    @property
    def tokenizer(self) -> Path:
        return self.adapter or self.weights


def subject_of(model: str, base: str | None = None) -> Subject:
    """Find a model, its adapter and what it was tuned from."""
    from hft.model.weights import local_folder
    from hft.record.manifest import MANIFEST_NAME, Manifest
    from hft.record.verification import ADAPTER_NAME

    folder = local_folder(model)
    if (folder / MANIFEST_NAME).exists():
        base = base or Manifest.load(folder).base
    if (folder / ADAPTER_NAME).exists():
        if base is None:
            raise HFTError(f"{model} is an adapter without a manifest; name its base with --base")
        return Subject(model, local_folder(base), folder, base, _weights_sha256(folder))
    sha256 = _weights_sha256(folder) if Path(model).is_dir() else folder.name
    return Subject(model, folder, None, base, sha256)


def _weights_sha256(folder: Path) -> str:
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if not files:
        raise HFTError(f"{folder} has no weights to score")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def evaluate(
    model: str,
    suite: str,
    settings: Settings | None = None,
    out: str | Path | None = None,
    benchmarks: Sequence[Benchmark] | None = None,
) -> Scores:
    """Score a model on a suite; under `accelerate launch` the scores are complete in the first process only.

    Args:
        model: a model, a run's folder, an adapter, a checkpoint, or a Hub id.
        suite: a key of `SUITES`, or a name for the benchmarks that are given.
        settings: how.
        out: folder whose `scores/SUITE.json` is written after each benchmark. Benchmarks that it already holds for the
            same weights and settings are not run again.
        benchmarks: others than those of `SUITES`.
    """
    if find_spec("lm_eval") is None:
        raise HFTError("evaluation needs lm-evaluation-harness: pip install 'half-fine-tuning[eval]'")
    settings = settings or Settings()
    subject = subject_of(model, settings.base)
    settings = _resolved(suite, subject, settings)
    scores, lm = _earlier(suite, subject, settings, out), None
    for benchmark in _chosen(suite, settings) if benchmarks is None else benchmarks:
        name, digest = benchmark.name, benchmark.digest
        known = scores.data.get(name) == digest if digest else scores.find(name)
        if known or (spec := benchmark.spec or _spec(benchmark, subject, settings)) is None:
            continue
        lm = lm or open_lm(subject, settings)
        results = _run_tasks(benchmark, spec, lm, subject, settings)
        if not is_main():
            continue
        scores.scores = [score for score in scores.scores if score.task != name] + _scores_of(benchmark, results)
        scores.data[name] = digest or _rows_sha256(results)
        if out is not None:
            scores.save(out)
    return scores


def losses_on(
    model: str,
    suite: str,
    rows: Mapping[str, Sequence[dict[str, Any]]],
    template: str | Path,
    out: str | Path | None = None,
) -> Scores:
    """Score a model by its loss on the last answer of conversations, task by task.

    `rows` has the conversations of each task as a trainer takes them; the run `template` has the chat template that
    renders them. Only tasks whose rows have changed are scored again.
    """
    from hft.model.weights import local_folder

    tokenizers, benchmarks = (_tokenizer(Path(template)), _tokenizer(local_folder(model))), []
    for task, conversations in rows.items():
        made = answer_rows(conversations, *tokenizers)
        digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()
        spec = on_rows({"hft_task": as_dataset(test=made)})
        benchmarks.append(Benchmark(task, "hft_task", LOSS, spec=spec, digest=digest))
    return evaluate(model, suite, Settings(chat=False), out, benchmarks)


def _chosen(suite: str, settings: Settings) -> list[Benchmark]:
    benchmarks = {benchmark.name: benchmark for benchmark in SUITES[suite]}
    if unknown := set(settings.tasks) - benchmarks.keys():
        raise HFTError(f"suite {suite} has no {', '.join(sorted(unknown))}, only {', '.join(benchmarks)}")
    chosen = [benchmarks[name] for name in settings.tasks or benchmarks]
    refused = [benchmark for benchmark in chosen if benchmark.runs_code and not settings.allow_code]
    for benchmark in refused:
        say(f"{benchmark.name} is skipped: it runs generated code, which needs --allow_code")
    chosen = [benchmark for benchmark in chosen if benchmark not in refused]
    return [replace(one, task=one.chat_task) if settings.chat and one.chat_task else one for one in chosen]


def _earlier(suite: str, subject: Subject, settings: Settings, out: str | Path | None) -> Scores:
    """The scores that a folder has for the same weights and settings, or none."""
    same = {key: value for key, value in asdict(settings).items() if key not in NEUTRAL}
    same["protocol"] = PROTOCOLS.get(suite, "hft")
    versions = {package: version(package) for package in SCORED_WITH} | {"hft": __version__}
    new = Scores(suite, subject.name, subject.sha256, settings.dtype, same, {}, versions)
    path = Path(out or "", SCORES_FOLDER, f"{suite}.json")
    if out is None or not path.exists():
        return new
    old = Scores.load(path)
    return old if replace(old, scores=[], data={}) == new else new


def _resolved(suite: str, subject: Subject, settings: Settings) -> Settings:
    """Settings whose chat format and dtype are decided."""
    import torch

    chat, dtype = settings.chat, settings.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    if chat is None:
        chat = suite != "quick" and _has_chat_format(_tokenizer(subject.tokenizer))
    return replace(settings, chat=chat, dtype=dtype)


def _has_chat_format(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether there is a chat template that puts words around a message; TRACE's puts none."""
    if not tokenizer.chat_template:
        return False
    text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token or "") != "?"


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise HFTError(f"cannot load the tokenizer of {folder}: {reason(error)}") from error


def open_lm(subject: Subject, settings: Settings) -> LM:
    import torch
    from lm_eval.api.registry import get_model

    from hft.evaluation.reader import Reader
    from hft.model.load import plain_generation

    arguments = {"pretrained": str(subject.weights), "tokenizer": str(subject.tokenizer), "dtype": settings.dtype}
    arguments |= {"batch_size": settings.batch_size} | ({"peft": str(subject.adapter)} if subject.adapter else {})
    if settings.backend == "hf":
        arguments |= {"device": "cuda" if torch.cuda.is_available() else "cpu", "max_batch_size": settings.batch_size}
    elif subject.adapter:
        raise HFTError(
            f"{settings.backend} takes no adapter here; make a plain model of it with `hft merge --method adapter`"
        )
    try:
        backend = Reader if settings.backend == "hf" else get_model(settings.backend)
        lm = backend(**arguments, **settings.backend_args)
    except (OSError, ValueError, KeyError, ModuleNotFoundError) as error:
        raise HFTError(f"cannot open {subject.weights} with {settings.backend}: {reason(error)}") from error
    if settings.backend == "hf":
        lm.model.generation_config = plain_generation(lm.model)
    return lm


def _spec(benchmark: Benchmark, subject: Subject, settings: Settings) -> Spec | None:
    """What lm-eval runs, on our rows where they are not the task's; None if there are none."""
    if benchmark.name in ("drift", "task", "kl"):
        made = _quick_rows(benchmark.name, subject, settings)
        return None if made is None else on_rows({benchmark.task: as_dataset(test=made)})
    if settings.data is None:
        return benchmark.task
    spec = local_spec(benchmark, Path(settings.data))
    if spec is None:
        say(f"{benchmark.name} is skipped: {settings.data} has no rows of it")
    return spec


def _quick_rows(name: str, subject: Subject, settings: Settings) -> list[dict[str, Any]] | None:
    tokenizer = _tokenizer(subject.tokenizer)
    if name == "drift":
        return text_rows(general_texts(), tokenizer)
    run = Path(settings.task_data or subject.name)
    if not (run / RESULTS_NAME).exists():
        say(f"{name} is skipped: {run} is not a finished run with held-out rows; name one with --task_data")
        return None
    if name == "kl" and subject.base is None:
        say(f"{name} is skipped: {subject.name} says no base; name it with --base")
        return None
    return answer_rows(held_out_rows(run), _tokenizer(run), tokenizer)


def _run_tasks(benchmark: Benchmark, spec: Spec, lm: LM, subject: Subject, settings: Settings) -> dict[str, Any]:
    """lm-eval's results of one benchmark; empty in all processes but the first.

    These are the steps of `lm_eval.simple_evaluate`, which also runs `pip list` each time, for a second or two.
    """
    import lm_eval
    import numpy as np
    import torch
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = [Path(lm_eval.__file__).parent / "tasks" / folder for folder in benchmark.folders]
    manager = TaskManager(include_path=[*folders, TASK_FOLDER], include_defaults=False)
    if benchmark.task == "hft_kl":
        from hft.evaluation.divergence import Divergence

        lm = Divergence(lm, open_lm(replace(subject, weights=Path(subject.base), adapter=None), settings))
    if settings.chat and not benchmark.turns:
        lm = _without_system_turn(lm)
    limit, samples, drawing = settings.limit, None, random.Random(DRAWING_SEED)
    say(f"{subject.name}: {benchmark.name}")
    random.seed(0)
    np.random.seed(SEED)  # noqa: NPY002  lm-eval's tasks draw from the global generator
    torch.manual_seed(SEED)
    try:
        loaded = manager.load([spec])
        for task in loaded["tasks"].values():
            if settings.max_gen_toks and task.get_config("output_type") == "generate_until":
                task.set_config("generation_kwargs", {"max_gen_toks": settings.max_gen_toks}, update=True)
            if task.get_config("num_fewshot") != 0:
                shots = task.get_config("num_fewshot") if benchmark.num_fewshot is None else benchmark.num_fewshot
                task.set_config("num_fewshot", shots or 0)
            task.set_fewshot_seed(seed=SEED)
        if settings.paper_subsets and benchmark.paper_rows:
            sizes = {name: len(task.eval_docs) for name, task in loaded["tasks"].items()}
            samples = {name: rows[:limit] for name, rows in drawn_rows(sizes, benchmark.paper_rows, drawing).items()}
            limit = None
        if benchmark.prepare:
            benchmark.prepare(loaded["tasks"], _tokenizer(subject.tokenizer), drawing)
        results = lm_eval.evaluate(
            lm=lm,
            task_dict=loaded,
            limit=limit,
            samples=samples,
            system_instruction=benchmark.instruction,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=benchmark.turns,
            bootstrap_iters=1000,
            confirm_run_unsafe_code=settings.allow_code,
        )
    except (DatasetsError, ImportError, LookupError, OSError, ValueError) as error:
        raise HFTError(f"{benchmark.name} cannot be run: {reason(error)}") from error
    return results or {}


def _without_system_turn(lm: LM) -> LM:
    """A model in whose chat format the description of a task starts the user's message."""
    render, lm = lm.apply_chat_template, copy(lm)

    def apply_chat_template(chat: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if chat[0]["role"] == "system":
            system, user, *rest = chat
            chat = [user | {"content": system["content"] + user["content"]}, *rest]
        return render(chat, add_generation_prompt=add_generation_prompt)

    lm.apply_chat_template = apply_chat_template
    return lm


def _scores_of(benchmark: Benchmark, results: dict[str, Any]) -> list[Score]:
    """lm-eval's numbers under our names, fractions as percentages."""
    scores = []
    counts = {name: n["effective"] for name, n in results["n-samples"].items()}
    for name, task in {benchmark.name: benchmark.task, **benchmark.parts}.items():
        where = next(name for name in (task, GROUP) if name in results["results"])
        leaves, values = results["group_subtasks"].get(where) or [where], results["results"][where]
        for metric, key in benchmark.metrics.items():
            base, _, kind = key.partition(",")
            unit, scale = (METRIC_UNITS[metric], 1) if metric in METRIC_UNITS else ("%", 100)
            error = values.get(f"{base}_stderr,{kind}")
            stderr = None if error in (None, "N/A") else scale * error
            n = sum(counts[leaf] for leaf in leaves)
            scores.append(Score(name, metric, scale * values[key], stderr, n, unit, metric not in METRIC_UNITS))
    return scores


def _rows_sha256(results: dict[str, Any]) -> str:
    """Of the rows that were scored, in order."""
    hashes = [sample["doc_hash"] for task in sorted(results["samples"]) for sample in results["samples"][task]]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
