"""An lm-eval model that scores the tokens of answers, on the ids that a trainer trains."""

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from torch.nn.functional import kl_div
from tqdm import tqdm

from hft.errors import HFTError


class AnswerTokens(LM):
    """The mean loss of the tokens of an answer, or their mean KL divergence from a base, in nats.

    KL is KL(base || tuned) over the whole vocabulary. On the new task's prompts this predicts forgetting better than
    how far the weights moved (RL's Razor, arXiv 2509.04259). Contexts are rendered by a chat template, which writes the
    special tokens itself.
    """

    def __init__(self, lm: HFLM, base: HFLM | None = None) -> None:
        super().__init__()
        self.lm, self.base = lm, base
        self._rank, self._world_size = lm.rank, lm.world_size
        if self._world_size > 1:
            self.accelerator = lm.accelerator

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        what = "KL to the base" if self.base else "loss of answers"
        return [(self._of(request), False) for request in tqdm(requests, desc=what, disable=self.rank != 0)]

    def _of(self, request: Instance) -> float:
        context, answer = request.args
        special = request.doc.get("is_plain", False)  # text without a chat template gets special tokens, as in training
        encoded = self.lm.tokenizer(context + answer, add_special_tokens=special, return_offsets_mapping=True)
        ids = encoded["input_ids"][-self.lm.max_length :]
        first = sum(end <= len(context) for _, end in encoded["offset_mapping"])  # a token may begin in the context
        answered = min(len(encoded["input_ids"]) - max(first, 1), len(ids) - 1)
        if answered < 1:
            raise HFTError(f"the answer {answer!r:.60} has no token to score")
        q, targets = self._log_probabilities(self.lm, ids, answered), torch.tensor(ids[-answered:])
        if self.base is None:
            return -q.gather(1, targets[:, None].to(q.device)).mean().item()
        p = self._log_probabilities(self.base, ids, answered)
        if p.shape != q.shape:
            raise HFTError("the base has another vocabulary; KL needs the same one")
        return kl_div(q, p, log_target=True, reduction="sum").item() / answered

    @staticmethod
    def _log_probabilities(lm: HFLM, ids: list[int], last: int) -> torch.Tensor:
        """Of each of the last tokens, shape (last, vocabulary)."""
        return lm.model(torch.tensor([ids], device=lm.device)).logits[0, -last - 1 : -1].float().log_softmax(-1)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError("an answer has a context")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("an answer is given")
