"""What a model of single tokens scores: the line every text score is held against."""

from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from omniloom.errors import ConfigError
from omniloom.modality.text import TextTokenizer


class UnigramLM(TemplateLM):
    """log P(text) = Σ log p(token), p(token) = (count + 1) / (total + V) over the training targets."""

    def __init__(self, tokenizer: TextTokenizer, target_counts: list[int]) -> None:
        super().__init__()
        self._text = tokenizer
        counts = np.asarray(target_counts, np.float64) + 1
        self._logprob = np.log(counts / counts.sum())

    @property
    def eot_token_id(self) -> int:
        return self._text.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._text.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        best = int(self._logprob.argmax())
        return [(float(self._logprob[ids].sum()), all(i == best for i in ids)) for _, _, ids in requests]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return [float(self._logprob[self.tok_encode(request.args[0])].sum()) for request in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        raise ConfigError("a unigram baseline writes no text")
