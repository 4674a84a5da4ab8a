"""Our decoder as an lm-eval model: log-likelihoods of texts and of continuations after text and media."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from omniloom.errors import ConfigError, DataError
from omniloom.evaluation.media import PLACEHOLDERS, Control, PromptMedia, split_prompt
from omniloom.generate.prompt import Prompter
from omniloom.modality.batch import MODEL_INPUTS, stack_rows
from omniloom.modality.sequence import Document, Row, Segment, lay_row
from omniloom.model.load import Model


class OmniloomLM(TemplateLM):
    """lm-eval's view of a model.

    `control`: `removed` leaves every medium out of the prompts, `shuffled` gives each document another's.
    """

    MULTIMODAL = True

    def __init__(self, model: Model, batch_tokens: int, control: Control = "kept") -> None:
        super().__init__()
        self._decoder = model.decoder
        self._device = next(model.parameters()).device
        self._prompter = Prompter(model)
        self._text, self._modality = self._prompter.text, self._prompter.modality
        self._context_tokens = model.config.max_position_embeddings
        self._batch_tokens, self._control = batch_tokens, control
        self._media = PromptMedia(self._modality, control)

    @property
    def eot_token_id(self) -> int:
        return self._text.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._text.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._text.encode(string).tolist()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log P(continuation | context) and whether greedy decoding would give it; the context may hold media."""
        documents = []
        for request, media in zip(requests, self._media.of(requests), strict=True):
            context, continuation = request.args[:2]
            *shown, last = split_prompt(context)
            head: list[Segment] = []
            for text, placeholder, medium in zip(shown[::2], shown[1::2], media, strict=True):
                self._refuse_without_encoder(placeholder, request)
                head += [self._text.segment(text, is_target=False)] if text else []
                head += medium
            ids, target = self._encode_pair(last, continuation) if last else ([], self.tok_encode(continuation))
            if not target:
                raise DataError(
                    f"task {request.task_name}: the answer {continuation!r} adds no token to its question, so nothing "
                    "can be scored"
                )
            documents.append(self._document(head, ids, target))
        return self._score(documents, "score", disable_tqdm)

    def _refuse_without_encoder(self, placeholder: str, request: Instance) -> None:
        kind, _ = PLACEHOLDERS[placeholder]
        if getattr(self._decoder.media, kind) is None:
            raise DataError(f"task {request.task_name} shows {kind} and the model has no encoder for it")

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._document([], context, target) for _, context, target in requests]
        return self._score(pairs, "score", bool(kwargs.get("disable_tqdm")))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log P(text), in windows of the model's context that predict each token once."""
        pairs, owner = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._context_tokens - 2,  # bos and one token of context go before
                context_len=1,
            )
            for context, target in map(make_disjoint_window, windows):
                # The document starts with bos by itself.
                kept = context[1:] if context[:1] == [self.prefix_token_id] else context
                pairs.append(self._document([], kept, target))
                owner.append(number)
        sums = [0.0] * len(requests)
        for number, (value, _) in zip(owner, self._score(pairs, "perplexity", disable_tqdm), strict=True):
            sums[number] += value
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        raise ConfigError(
            f"task {requests[0].task_name} asks for generated text, which evaluation does not take from the model yet: "
            "choose tasks that score given answers"
        )

    def _document(self, head: list[Segment], context: list[int], target: list[int]) -> Document:
        """bos, head, context, target; eos is cut off again, nothing asks for it."""
        woven = self._prompter.woven([*head, self._ids(context, False), self._ids(target, True)])
        if len(woven) > self._context_tokens:
            raise DataError(
                f"a prompt of {len(woven):,} tokens is over the model's max_position_embeddings="
                f"{self._context_tokens:,}"
            )
        return woven

    @staticmethod
    def _ids(ids: list[int], is_target: bool) -> Segment:
        return Segment(
            0, torch.tensor(ids, dtype=torch.int32).numpy(), torch.zeros(len(ids), 3).int().numpy(), is_target
        )

    def _score(self, documents: list[Document], what: str, quiet: bool) -> list[tuple[float, bool]]:
        """Sum of the targets' log-probabilities of each document, and whether each target is the likeliest id."""
        results: list[tuple[float, bool]] = [(0.0, False)] * len(documents)
        groups = _same_but_for_the_last(documents)
        with tqdm(total=len(groups), desc=f"{what} ({self._control})", disable=quiet) as bar:
            for batch in self._by_length([documents[group[0]] for group in groups]):
                members = [groups[number] for number in batch]
                longest = max(len(documents[group[0]]) for group in members)
                rows = [
                    lay_row([(documents[group[0]], 0)], longest, self._text.eos_id, self._modality.widths)
                    for group in members
                ]
                for group, logits in zip(members, self._logits(rows), strict=True):
                    for i in group:
                        targets = torch.from_numpy(documents[i].input_ids[documents[i].loss_mask > 0]).long()
                        value = -F.cross_entropy(logits, targets, reduction="sum")
                        results[i] = float(value), bool((logits.argmax(-1) == targets).all())
                bar.update(len(batch))
        return results

    def _by_length(self, documents: list[Document]) -> Iterator[list[int]]:
        """Indices of documents of like length, at most `batch_tokens` of rows × longest a batch."""
        order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
        batch: list[int] = []
        for i in order:
            if batch and (len(batch) + 1) * len(documents[batch[0]]) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    @torch.no_grad()
    def _logits(self, rows: list[Row]) -> tuple[Tensor, ...]:
        """Each row's logits where a target is predicted, float32 (targets, V) on the CPU."""
        fields = {name: field.to(self._device) for name, field in stack_rows(rows).items()}
        is_target = fields["loss_mask"] > 0
        predict_at = is_target.roll(-1, dims=1)  # bos stands first and is no target: nothing wraps round
        output = self._decoder(**{name: fields[name] for name in MODEL_INPUTS}, predict_at=predict_at)
        return output.logits.float().cpu().split(is_target.sum(dim=1).tolist())


def _same_but_for_the_last(documents: list[Document]) -> list[list[int]]:
    """Indices in groups that one forward pass scores: documents with one target, the last token, alike up to it."""
    groups: dict[Any, list[int]] = {}
    for number, document in enumerate(documents):
        alone = document.loss_mask[-1] > 0 and document.loss_mask.sum() == 1
        content = (document.input_ids[:-1], document.image, document.audio, document.audio_frames, document.video)
        key = hashlib.sha256(b"".join(array.tobytes() for array in content)).digest() if alone else number
        groups.setdefault(key, []).append(number)
    return list(groups.values())
