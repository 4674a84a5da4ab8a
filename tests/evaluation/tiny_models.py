"""Tiny models for lm-eval, and requests for them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance

from omniloom.evaluation.lm import OmniloomLM
from omniloom.modality.batch import MODEL_INPUTS, stack_rows
from omniloom.modality.sequence import Document, lay_row
from omniloom.model.load import Model, load_model
from tiny_folders import TINY

EVALS = Path(__file__).resolve().parents[2] / "evals"


def tiny_lm(folder: Path, control: Any = "kept", batch_tokens: int = 8_192) -> OmniloomLM:
    return OmniloomLM(load_model(folder), batch_tokens, control)


def ask(*arguments: Any, document: int = 0, task: str = "some_task", kind: Any = "loglikelihood") -> Instance:
    return Instance(kind, {}, arguments, 0, (task, document, 1))


def rolling(text: str) -> Instance:
    return ask(text, kind="loglikelihood_rolling")


@torch.no_grad()
def direct_document(model: Model, document: Document) -> tuple[float, bool]:
    """The same of the targets of one woven document, media and all."""
    fields = stack_rows([lay_row([(document, 0)], len(document), 0, TINY.widths)])
    everywhere = torch.ones_like(fields["input_ids"], dtype=torch.bool)
    output = model.decoder(**{name: fields[name] for name in MODEL_INPUTS}, predict_at=everywhere)
    logprob = output.logits.double().log_softmax(-1)
    targets = [(at, int(document.input_ids[at])) for at in np.flatnonzero(document.loss_mask)]
    likeliest = all(int(logprob[at - 1].argmax()) == i for at, i in targets)
    return sum(float(logprob[at - 1, i]) for at, i in targets), likeliest


@torch.no_grad()
def direct(model: Model, context: list[int], target: list[int]) -> tuple[float, bool]:
    """Σ log P(target | context) through model(input_ids), and whether every target is the likeliest id."""
    ids = torch.tensor([context + target])
    logprob = model(ids)[0].double().log_softmax(-1)
    before = range(len(context) - 1, len(context) + len(target) - 1)
    likeliest = [int(logprob[at].argmax()) for at in before]
    return sum(float(logprob[at, i]) for at, i in zip(before, target, strict=True)), likeliest == target
