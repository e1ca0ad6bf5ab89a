"""An lm-eval model that scores how far a tuned model has moved from its base."""

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from torch.nn.functional import kl_div
from tqdm import tqdm

from hft.errors import HFTError


class Divergence(LM):
    """Minus the KL divergence of a tuned model from its base, instead of a log-likelihood.

    It is the sum over the answer's tokens of KL(base || tuned) in nats, over the whole vocabulary. On the new task's
    prompts this predicts forgetting better than how far the weights moved (RL's Razor, arXiv 2509.04259).
    """

    def __init__(self, tuned: HFLM, base: HFLM) -> None:
        super().__init__()
        self.tuned, self.base = tuned, base
        self._rank, self._world_size = tuned.rank, tuned.world_size
        if self._world_size > 1:
            self.accelerator = tuned.accelerator

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        results = []
        for request in tqdm(requests, desc="KL to the base", disable=self.rank != 0):
            context, answer = request.args
            start = len(self.tuned.tok_encode(context)) if context else 0
            ids = torch.tensor([self.tuned.tok_encode(context + answer)])
            p, q = (self._log_probabilities(lm, ids)[max(start, 1) - 1 : -1] for lm in (self.base, self.tuned))
            if p.shape != q.shape:
                raise HFTError("the base has another vocabulary; KL needs the same one")
            results.append((-kl_div(q, p, log_target=True, reduction="sum").item(), False))
        return results

    @staticmethod
    def _log_probabilities(lm: HFLM, ids: torch.Tensor) -> torch.Tensor:
        """Of each next token, shape (positions, vocabulary)."""
        return lm.model(ids.to(lm.device)).logits[0].float().log_softmax(-1)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError("KL needs a context and an answer")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("KL needs a context and an answer")
