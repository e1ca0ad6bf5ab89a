"""lm-eval's engines, and what they decode, render and measure differently here."""

from copy import copy
from pathlib import Path

import torch
from lm_eval.api import registry
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from torch.nn.functional import kl_div
from tqdm import tqdm

from hft.errors import HFTError, reason
from hft.evaluation.subject import Subject
from hft.evaluation.suites import Settings
from hft.model.load import plain_generation


class Reader(HFLM):
    """HFLM with two differences for generation tasks."""

    def tok_decode(self, tokens, skip_special_tokens=True):
        """Text of tokens that follow others: SentencePiece's decoders drop a blank where a text begins."""
        if isinstance(tokens, int):
            return super().tok_decode(tokens, skip_special_tokens)
        before = self.tokenizer.encode("a", add_special_tokens=False)
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        text = self.tokenizer.decode([*before, *tokens], **options)
        return text.removeprefix(self.tokenizer.decode(before, **options))

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """The start of an answer as it is given, where templates strip it; open-instruct appends it in the same way."""
        if add_generation_prompt:
            return super().apply_chat_template(chat_history)
        prompt = super().apply_chat_template(chat_history[:-1])
        return prompt + ("" if prompt[-1].isspace() else " ") + chat_history[-1]["content"]


def engine_of(subject: Subject, settings: Settings, engines: dict[Path, LM]) -> LM:
    """The engine of a model among those that are open, which it joins."""
    if subject.tokenizer not in engines:
        engines[subject.tokenizer] = open_lm(subject, settings)
    return engines[subject.tokenizer]


def open_lm(subject: Subject, settings: Settings) -> LM:
    arguments = {"pretrained": str(subject.weights), "tokenizer": str(subject.tokenizer), "dtype": settings.dtype}
    arguments |= {"batch_size": settings.batch_size} | ({"peft": str(subject.adapter)} if subject.adapter else {})
    if settings.backend == "hf":
        arguments["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    elif subject.adapter:
        raise HFTError(f"{settings.backend} takes no adapter; make it a plain model with `hft merge --method adapter`")
    try:
        backend = Reader if settings.backend == "hf" else registry.get_model(settings.backend)
        lm = backend(**arguments, **settings.backend_args)
    except (OSError, ValueError, KeyError, ModuleNotFoundError) as error:
        raise HFTError(f"cannot open {subject.weights} with {settings.backend}: {reason(error)}") from error
    if settings.backend == "hf":
        # What a model without numbers answers would still get a score.
        floats = ((name, tensor) for name, tensor in lm.model.named_parameters() if tensor.is_floating_point())
        if wrong := [name for name, tensor in floats if not tensor.isfinite().all()]:
            what = f"{len(wrong):,} of its tensors hold NaN or infinity, {wrong[0]} first"
            raise HFTError(f"{subject.name} cannot be scored: {what}")
        lm.model.generation_config = plain_generation(lm.model)
    return lm


def without_system_turn(lm: LM) -> LM:
    """An engine in whose chat format the description of a task starts the user's message."""
    render, lm = lm.apply_chat_template, copy(lm)

    def apply_chat_template(chat: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if chat[0]["role"] == "system":
            system, user, *rest = chat
            chat = [user | {"content": system["content"] + user["content"]}, *rest]
        return render(chat, add_generation_prompt=add_generation_prompt)

    lm.apply_chat_template = apply_chat_template
    return lm


def scoring_tokens(lm: HFLM, base: HFLM | None) -> LM:
    """An engine whose log-likelihood is the mean loss of an answer's tokens, or their mean KL divergence from a base.

    In nats, on the ids that a trainer trains. KL is KL(base || tuned) over the whole vocabulary: on the new task's
    prompts it predicts forgetting better than how far the weights moved (RL's Razor, arXiv 2509.04259).
    """

    def log_probabilities(model: HFLM, ids: list[int], last: int) -> torch.Tensor:  # (last, vocabulary)
        logits = model.model(torch.tensor([ids], device=model.device)).logits
        return logits[0, -last - 1 : -1].float().log_softmax(-1)

    def measure(request: Instance) -> float:
        context, answer = request.args
        special = request.doc.get("is_plain", False)  # a chat template writes the special tokens itself
        encoded = lm.tokenizer(context + answer, add_special_tokens=special, return_offsets_mapping=True)
        ids = encoded["input_ids"][-lm.max_length :]
        first = sum(end <= len(context) for _, end in encoded["offset_mapping"])  # a token may begin in the context
        answered = min(len(encoded["input_ids"]) - max(first, 1), len(ids) - 1)
        if answered < 1:
            raise HFTError(f"the answer {answer!r:.60} has no token to score")
        q, targets = log_probabilities(lm, ids, answered), torch.tensor(ids[-answered:])
        if base is None:
            return -q.gather(1, targets[:, None].to(q.device)).mean().item()
        p = log_probabilities(base, ids, answered)
        if p.shape != q.shape:
            raise HFTError("the base has another vocabulary; KL needs the same one")
        return kl_div(q, p, log_target=True, reduction="sum").item() / answered

    @torch.no_grad()
    def loglikelihood(requests: list[Instance]) -> list[tuple[float, bool]]:
        what = "KL to the base" if base else "loss of answers"
        return [(measure(request), False) for request in tqdm(requests, desc=what, disable=lm.rank != 0 or None)]

    scoring = copy(lm)
    scoring.loglikelihood = loglikelihood
    return scoring
