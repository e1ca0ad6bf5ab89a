"""`hft generate`: a base and runs answer the same prompts, side by side."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile, zip_longest
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from hft.config import Keys, fill, option, read_arguments
from hft.errors import HFTError
from hft.evaluation.rows import held_out_rows, prompt_and_answer
from hft.evaluation.subject import Subject, check_weights, folder_of, load_tokenizer, subject_of
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

    prompt: list[str] = field(
        default_factory=list, metadata={"help": "What to ask; default: held-out rows of the first run."}
    )
    rows: int = option("How many held-out rows.", 3)
    base: bool = option("Ask the bases too.", True)
    max_new_tokens: int = option("Longest answer.", 128)
    batch_size: int = option("Prompts per forward pass.", 8)
    dtype: str | None = option("Of the models; default: bfloat16 on GPUs, else float32.")


def main(arguments: Sequence[str]) -> int:
    """Ask models the same, print their answers side by side, and save each run's beside its scores."""
    models = list(takewhile(lambda word: not word.startswith("-"), arguments))
    usage = "hft generate RUN [RUN ...]"
    about = "Greedy answers of runs and their bases to the same prompts, each with the chat template it was trained on."
    given = read_arguments(arguments[len(models) :], usage, about, {"generation": (GenerateCommand,)})
    asked = fill(GenerateCommand, given.resolve(Keys((GenerateCommand,)))[0])
    if not models:
        raise HFTError(f"name who is to answer: {usage}")
    subjects = {model: subject_of(model) for model in models}
    chats, references = _questions(asked, models[0])
    tuned = [subject for subject in subjects.values() if asked.base and subject.base]
    everyone = {subject.base: subject.base_subject() for subject in tuned} | subjects
    first = load_tokenizer(subjects[models[0]].tokenizer)
    answers = {}
    for name, subject in everyone.items():
        own = load_tokenizer(subject.tokenizer)
        say(f"{name} answers")
        template = own if own.chat_template else first if first.chat_template else None
        limits = (asked.max_new_tokens, asked.batch_size, asked.dtype)
        answers[name] = answers_to(chats, subject, template, *limits)
    for number, (chat, reference) in enumerate(zip(chats, references, strict=True)):
        columns = {name: texts[number] for name, texts in answers.items()}
        say("", f"{number + 1}. {chat[-1]['content']}", "")
        say(side_by_side(columns | ({"(reference)": reference} if reference else {})))
    for model, subject in subjects.items():
        rows = zip(chats, references, answers[model], answers.get(subject.base, [None] * len(chats)), strict=True)
        names = ("prompt", "reference", "answer", "base_answer")
        about = {"model": model, "base": subject.base, "max_new_tokens": asked.max_new_tokens}
        path = folder_of(model) / SCORES_FOLDER / ANSWERS_NAME
        write_jsonl(path, [dict(zip(names, row, strict=True)) | about for row in rows])
        say("", f"saved in {path}")
    return 0


def answers_to(
    chats: Sequence[Chat],
    subject: Subject,
    template: PreTrainedTokenizerBase | None,
    max_new_tokens: int,
    batch_size: int,
    dtype: str | None = None,
) -> list[str]:
    """Greedy answers of a model, prompts split over the processes; without a `template` they stay as they are."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    from hft.model.load import plain_generation

    state, tokenizer = PartialState(), load_tokenizer(subject.tokenizer)
    dtype = dtype or ("bfloat16" if state.device.type == "cuda" else "float32")
    model = AutoModelForCausalLM.from_pretrained(subject.weights, dtype=dtype)
    if subject.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, subject.adapter)
    check_weights(model, subject.name)
    model.to(state.device).eval()
    ends = [model.generation_config.eos_token_id, tokenizer.eos_token_id]
    ends = sorted({end for each in ends for end in (each if isinstance(each, list) else [each]) if end is not None})
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    special = {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    settings = plain_generation(model, max_new_tokens=max_new_tokens, do_sample=False, **special)
    texts, answers = [_rendered(chat, template) for chat in chats], []
    with state.split_between_processes(texts) as own:
        for start in tqdm(range(0, len(own), batch_size), desc="batches", disable=not state.is_main_process):
            part = own[start : start + batch_size]  # a chat template writes the special tokens itself
            batch = tokenizer(part, padding=True, add_special_tokens=template is None, return_tensors="pt")
            with torch.no_grad():
                ids = model.generate(**batch.to(state.device), generation_config=settings)
            answers += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in gather_object(answers)]


def _rendered(chat: Chat, template: PreTrainedTokenizerBase | None) -> str:
    if template is None:
        return "\n\n".join(message["content"] for message in chat)
    return template.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def _questions(asked: GenerateCommand, run: str) -> tuple[list[Chat], list[str | None]]:
    """What to ask, and the reference answers where they are known."""
    if asked.prompt:
        return [[{"role": "user", "content": prompt}] for prompt in asked.prompt], [None] * len(asked.prompt)
    if not Path(run, RESULTS_NAME).exists():
        raise HFTError(f"{run} is not a finished run with held-out rows; say what to ask with --prompt")
    rows = held_out_rows(Path(run))[: asked.rows]
    if any("text" in row or isinstance(row.get("prompt"), str) for row in rows):
        raise HFTError(f"{run} was trained without a chat template; say what to ask with --prompt")
    pairs = [prompt_and_answer(row) for row in rows]
    return [prompt for prompt, _ in pairs], [answer["content"] for _, answer in pairs]


def side_by_side(columns: dict[str, str], width: int | None = None) -> str:
    """Texts in columns below their names; one below the other where the terminal is too narrow."""
    width = ((width or shutil.get_terminal_size().columns) - 3 * (len(columns) - 1)) // len(columns)
    if width < NARROWEST:
        return "\n\n".join(f"{name}:\n{text}" for name, text in columns.items())
    texts = [[name[-width:], "-" * width, *_wrapped(text, width)] for name, text in columns.items()]
    rows = zip_longest(*texts, fillvalue="")
    return "\n".join(" | ".join(cell.ljust(width) for cell in row).rstrip() for row in rows)


def _wrapped(text: str, width: int) -> list[str]:
    return [line for paragraph in text.splitlines() for line in wrap(paragraph, width) or [""]]
