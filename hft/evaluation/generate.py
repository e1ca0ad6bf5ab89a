"""`hft generate`: a base and runs answer the same prompts, side by side."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from hft.config import Keys, PositiveInt, fill, option, read_arguments
from hft.errors import HFTError, reason
from hft.evaluation.evaluate import check_installed, resolved
from hft.evaluation.rows import held_out_rows, prompt_and_answer
from hft.evaluation.subject import Subject, folder_of, load_tokenizer, subject_of
from hft.evaluation.suites import Dtype, Settings
from hft.jsonl import write_jsonl
from hft.machine import say
from hft.record.scores import ANSWERS_NAME, SCORES_FOLDER
from hft.runs.result import RESULTS_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = list[dict[str, Any]]  # of messages
NARROWEST = 24  # characters of a column


@dataclass(frozen=True)
class GenerateCommand:
    """What `hft generate` takes besides models."""

    prompt: list[str] = option("What to ask; default: held-out rows of the first run.", [])
    rows: PositiveInt = option("How many held-out rows.", 3)
    base: bool = option("Ask the bases too.", True)
    max_new_tokens: PositiveInt = option("Longest answer.", 128)
    batch_size: PositiveInt = option("Prompts per forward pass.", 8)
    dtype: Dtype | None = option("Of the models; default: bfloat16 on GPUs, else float32.")


def main(arguments: Sequence[str]) -> int:
    """Ask models the same, print their answers side by side, and save each run's beside its scores."""
    models = list(takewhile(lambda word: not word.startswith("-"), arguments))
    usage = "hft generate RUN [RUN ...]"
    about = "Greedy answers of runs and their bases to the same prompts, each with the chat template it was trained on."
    given = read_arguments(arguments[len(models) :], usage, about, {"generation": (GenerateCommand,)})
    asked = fill(GenerateCommand, given.resolve(Keys((GenerateCommand,)))[0])
    if not models:
        raise HFTError(f"name who is to answer: {usage}")
    check_installed()
    settings = Settings(max_gen_toks=asked.max_new_tokens, batch_size=asked.batch_size, dtype=asked.dtype)
    subjects = {model: subject_of(model) for model in models}
    chats, references = _questions(asked, models[0])
    tuned = [subject for subject in subjects.values() if asked.base and subject.base]
    everyone = {subject.base: subject.base_subject() for subject in tuned} | subjects
    first = load_tokenizer(subjects[models[0]].tokenizer)
    answers = {}
    for name, subject in everyone.items():
        say(f"{name} answers")
        templates = (load_tokenizer(subject.tokenizer), first)
        template = next((tokenizer for tokenizer in templates if tokenizer.chat_template), None)
        answers[name] = answers_to(chats, subject, template, resolved("quick", subject, settings))
    for number, (chat, reference) in enumerate(zip(chats, references, strict=True)):
        columns = {name: texts[number] for name, texts in answers.items()}
        say("", f"{number + 1}. {chat[-1]['content']}", "")
        say(side_by_side(columns | ({"(reference)": reference} if reference else {})))
    for model, subject in subjects.items():
        columns = zip(chats, references, answers[model], answers.get(subject.base, [None] * len(chats)), strict=True)
        rows = [{"prompt": c, "reference": r, "answer": a, "base_answer": b} for c, r, a, b in columns]
        about = {"model": model, "base": subject.base, "max_new_tokens": asked.max_new_tokens}
        path = folder_of(model) / SCORES_FOLDER / ANSWERS_NAME
        write_jsonl(path, [row | about for row in rows])
        say("", f"saved in {path}")
    return 0


def answers_to(
    chats: Sequence[Chat], subject: Subject, template: PreTrainedTokenizerBase | None, settings: Settings
) -> list[str]:
    """Greedy answers of a model, prompts split over the processes; without a `template` they stay as they are."""
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from lm_eval.api.instance import Instance

    from hft.evaluation.engine import open_lm

    def rendered(chat: Chat) -> str:
        if template is None:
            return "\n\n".join(message["content"] for message in chat)
        return template.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    lm = open_lm(subject, settings)
    lm.add_bos_token = None if template is None else False  # a chat template writes the special tokens itself
    keywords = {"until": [], "do_sample": False, "max_gen_toks": settings.max_gen_toks}
    requests = [Instance("generate_until", {}, (rendered(chat), keywords), n) for n, chat in enumerate(chats)]
    try:
        with PartialState().split_between_processes(requests) as own:
            answers = lm.generate_until(own)
    except AssertionError as error:  # more tokens than the model's context has
        raise HFTError(f"{subject.name} cannot answer: {reason(error)}") from error
    return [answer.strip() for answer in gather_object(answers)]


def _questions(asked: GenerateCommand, run: str) -> tuple[list[Chat], list[str | None]]:
    if asked.prompt:
        return [[{"role": "user", "content": prompt}] for prompt in asked.prompt], [None] * len(asked.prompt)
    if not Path(run, RESULTS_NAME).exists():
        raise HFTError(f"{run} is not a finished run with held-out rows; say what to ask with --prompt")
    rows = held_out_rows(Path(run))[: asked.rows]
    if any("text" in row or isinstance(row.get("prompt"), str) for row in rows):
        raise HFTError(f"{run} was trained without a chat template; say what to ask with --prompt")
    pairs = [prompt_and_answer(row) for row in rows]
    return [prompt for prompt, _ in pairs], [answer["content"] for _, answer in pairs]


def side_by_side(columns: dict[str, str]) -> str:
    """Texts in columns below their names; one below the other where the terminal is too narrow."""
    width = (shutil.get_terminal_size().columns - 3 * (len(columns) - 1)) // len(columns)
    if width < NARROWEST:
        return "\n\n".join(f"{name}:\n{text}" for name, text in columns.items())
    texts = []
    for name, text in columns.items():
        lines = [line for paragraph in text.splitlines() for line in wrap(paragraph, width) or [""]]
        texts.append([name[-width:], "-" * width, *lines])
    rows = zip_longest(*texts, fillvalue="")
    return "\n".join(" | ".join(cell.ljust(width) for cell in row).rstrip() for row in rows)
