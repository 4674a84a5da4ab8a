"""Our decoder as an lm-eval model: log-likelihoods of texts and of continuations after text and pictures."""

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from PIL import Image
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from omniloom.errors import ConfigError, DataError
from omniloom.modality.config import ModalityConfig
from omniloom.modality.image import read_image
from omniloom.modality.sequence import Document, Row, Segment, lay_row, weave
from omniloom.modality.text import load_tokenizer
from omniloom.model.load import Model

Medium = Literal["kept", "removed", "shuffled"]
PLACEHOLDER = "<image>"  # where a task's text shows a picture, as lm-eval writes it
SHUFFLE_SEED = 0


class OmniloomLM(TemplateLM):
    """lm-eval's view of a model.

    `medium` is the control: `removed` leaves every picture out, `shuffled` gives each document another's pictures.
    """

    MULTIMODAL = True

    def __init__(self, model: Model, batch_tokens: int, medium: Medium = "kept") -> None:
        super().__init__()
        self._decoder = model.decoder
        self._device = next(model.parameters()).device
        self._text = load_tokenizer(model.folder / "tokenizer.json")
        self._modality = TypeAdapter(ModalityConfig).validate_json((model.folder / "modality.json").read_bytes())
        self._context_tokens = model.config.max_position_embeddings
        self._batch_tokens, self._medium = batch_tokens, medium

    @property
    def eot_token_id(self) -> int:
        return self._text.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._text.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._text.encode(string).tolist()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log P(continuation | context) and whether greedy decoding would give it; the context may hold pictures."""
        pictures = self._pictures(requests)
        pairs = []
        for request, mine in zip(requests, pictures, strict=True):
            context, continuation = request.args[:2]
            *before, last = context.split(PLACEHOLDER)
            if len(mine) != len(before):
                raise DataError(
                    f"task {request.task_name}: a prompt has {len(before)} {PLACEHOLDER} and {len(mine)} pictures"
                )
            head: list[Segment] = []
            for text, picture in zip(before, mine, strict=True):
                head += [self._text.segment(text, is_target=False)] if text else []
                head += [picture] if picture is not None else []
            ids, target = self._encode_pair(last, continuation) if last else ([], self.tok_encode(continuation))
            if not target:
                raise DataError(
                    f"task {request.task_name}: the answer {continuation!r} adds no token to its question, so nothing "
                    "can be scored"
                )
            pairs.append(self._document(head, ids, target))
        return self._score(pairs, "score", disable_tqdm)

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
            f"task {requests[0].task_name} asks for generated text, and generation is not built yet: choose tasks that "
            "score given answers"
        )

    def _pictures(self, requests: list[Instance]) -> list[list[Segment | None]]:
        """Each request's pictures under the control; None for one that is left out."""
        visuals = [request.args[2]["visual"] if len(request.args) > 2 else [] for request in requests]
        if self._medium == "removed":
            return [[None] * len(mine) for mine in visuals]
        if self._medium == "shuffled":
            visuals = self._shuffled(requests, visuals)
        decoded: dict[int, Segment] = {}
        return [[self._decode(visual, decoded) for visual in mine] for mine in visuals]

    def _shuffled(self, requests: list[Instance], visuals: list[list[Any]]) -> list[list[Any]]:
        """Every document gets the pictures of another, the same for all its requests."""
        of_document = {(r.task_name, r.doc_id): mine for r, mine in zip(requests, visuals, strict=True)}
        follower: dict[tuple[str, int], tuple[str, int]] = {}
        for task in sorted({name for name, _ in of_document}):
            documents = sorted(key for key in of_document if key[0] == task)
            if len(documents) == 1:
                raise DataError(f"task {task} has one document: its pictures cannot be shuffled with another's")
            drawn = random.Random(SHUFFLE_SEED).sample(documents, len(documents))
            follower |= dict(zip(drawn, drawn[1:] + drawn[:1], strict=True))  # one cycle: nobody keeps its own
        return [of_document[follower[r.task_name, r.doc_id]] for r in requests]

    def _decode(self, visual: Any, decoded: dict[int, Segment]) -> Segment:
        key = id(visual)
        if key not in decoded:
            if isinstance(visual, Image.Image):
                stream = io.BytesIO()
                visual.save(stream, format="PNG")
                data = stream.getvalue()
            else:
                data = Path(visual).read_bytes()
            decoded[key] = read_image(data, self._modality.image)
        return decoded[key]

    def _document(self, head: list[Segment], context: list[int], target: list[int]) -> Document:
        """bos, head, context, target; eos is cut off again, nothing asks for it."""
        segments = [*head, self._ids(context, False), self._ids(target, True)]
        woven = weave(
            [segment for segment in segments if len(segment)],
            self._text.bos_id,
            self._text.eos_id,
            self._text.placeholder_ids,
            self._modality.image.patch_values,
        )
        tokens = len(woven) - 1
        if tokens > self._context_tokens:
            raise DataError(
                f"a prompt of {tokens:,} tokens is over the model's max_position_embeddings={self._context_tokens:,}"
            )
        return woven.window(0, tokens)

    @staticmethod
    def _ids(ids: list[int], is_target: bool) -> Segment:
        return Segment(
            0, torch.tensor(ids, dtype=torch.int32).numpy(), torch.zeros(len(ids), 3).int().numpy(), is_target
        )

    def _score(self, documents: list[Document], what: str, quiet: bool) -> list[tuple[float, bool]]:
        """Sum of the targets' log-probabilities of each document, and whether each target is the likeliest id."""
        results: list[tuple[float, bool]] = [(0.0, False)] * len(documents)
        with tqdm(total=len(documents), desc=f"{what} ({self._medium})", disable=quiet) as bar:
            for batch in self._by_length(documents):
                longest = max(len(documents[i]) for i in batch)
                rows = [
                    lay_row([(documents[i], 0)], longest, self._text.eos_id, self._modality.image.patch_values)
                    for i in batch
                ]
                for i, scored in zip(batch, self._forward(rows), strict=True):
                    results[i] = scored
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
    def _forward(self, rows: list[Row]) -> list[tuple[float, bool]]:
        fields = {name: self._stack(rows, name) for name in ("input_ids", "modality", "position", "document")}
        image = torch.cat([torch.from_numpy(row.image) for row in rows]).to(self._device)
        is_target = self._stack(rows, "loss_mask") > 0
        predict_at = is_target.roll(-1, dims=1)  # bos stands first and is no target: nothing wraps round
        logits = self._decoder(**fields, image=image, predict_at=predict_at).logits.float()
        targets = fields["input_ids"][is_target].long()
        logprob = -F.cross_entropy(logits, targets, reduction="none")
        greedy = logits.argmax(-1) == targets
        counts = is_target.sum(dim=1).tolist()
        return [
            (float(values.sum()), bool(hits.all()))
            for values, hits in zip(logprob.split(counts), greedy.split(counts), strict=True)
        ]

    def _stack(self, rows: list[Row], name: str) -> Tensor:
        return torch.stack([torch.from_numpy(getattr(row, name)) for row in rows]).to(self._device)
