"""A model that somebody else trained, read from llama2.c's files: its story, and its perplexity on real texts."""

import json
import math
import struct
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from exchanged import exported, imported, logits_apart, theirs_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoTokenizer

from omniloom.errors import CheckpointError
from omniloom.model.llama2c import Llama2cWeights, convert_tokenizer
from omniloom.model.load import Model, load_model


@pytest.fixture(scope="module")
def files(real_data: Path) -> Path:
    return real_data / "model" / "stories260K"


@pytest.fixture(scope="module")
def stories(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ours."""
    folder = tmp_path_factory.mktemp("imported") / "stories"
    told = imported(files / "stories260K.bin", folder, tokenizer=files / "tok512.bin")
    assert (told.kind, told.parameters, told.notes) == ("llama2.c", 260_032, [])
    return folder


@pytest.fixture(scope="module")
def model(stories: Path) -> Model:
    return load_model(stories)


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(stories / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


@torch.no_grad()
def test_it_tells_the_expected_story(files, model, tokenizer):
    expected = json.loads((files / "expected_greedy_ids.json").read_text())
    ids = [1]
    for _ in range(256):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert ids[:256] == expected
    assert tokenizer.decode(ids) == (files / "expected_greedy_256.txt").read_text().removesuffix("\n")


@torch.no_grad()
def nll(model: Model, ids: list[int], window: int) -> tuple[float, int]:
    """Sum of −ln P and the tokens scored: windows that start fresh, every token but the first a target."""
    total, scored = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        inputs, targets = ids[start : start + window], ids[start + 1 : start + window + 1]
        logits = model(torch.tensor([inputs[: len(targets)]]))[0].double()
        total += F.cross_entropy(logits, torch.tensor(targets), reduction="sum").item()
        scored += len(targets)
    return total, scored


@pytest.mark.parametrize("number", [0, 1])
def test_its_perplexity_is_the_reference(real_data, model, tokenizer, number):
    reference = json.loads((real_data / "reference" / "reference_scores.json").read_text())["stories260K"]
    expected = reference["results"][number]
    text = (real_data / expected["text"].removeprefix("dev/")).read_text()[: expected["chars"]]
    assert sha256(text.encode()).hexdigest() == expected["sha256_text"]
    ids = tokenizer.encode(text).ids
    assert ids[:16] == expected["first_ids"]
    total, scored = nll(model, ids, reference["W"])
    assert scored == expected["tokens_scored"]
    assert total / scored == pytest.approx(expected["nll_mean"], abs=1e-4)
    assert total / math.log(2) / len(text.encode()) == pytest.approx(expected["bits_per_byte"], abs=1e-4)


def test_transformers_takes_its_export(tmp_path, stories, model):
    """Its pairs lie side by side, Llama's half a head apart."""
    exported(stories, tmp_path / "theirs")
    ids = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(1))
    logits_apart(model, theirs_of(tmp_path / "theirs"), ids)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    ours = Tokenizer.from_file(str(stories / "tokenizer.json"))
    text = "Once upon a time, <s>there</s> was a café."
    ours.encode_special_tokens = True
    assert theirs(text).input_ids == ours.encode(text).ids
    assert theirs.decode(theirs("Once upon a time").input_ids, skip_special_tokens=True) == "Once upon a time"


def encode_as_run_c(text: str, tokens: list[tuple[str, float]]) -> list[int]:
    """run.c's encode(bos=1, eos=0), step by step."""
    number = {token: index for index, (token, _) in reversed(list(enumerate(tokens)))}
    ids = [1]
    if text:
        ids.append(number[" "])
    for character in text:
        if character in number:
            ids.append(number[character])
        else:
            ids += [byte + 3 for byte in character.encode()]
    while True:
        best, where = -1e10, None
        for place in range(len(ids) - 1):
            whole = tokens[ids[place]][0] + tokens[ids[place + 1]][0]
            if whole in number and tokens[number[whole]][1] > best:
                best, where = tokens[number[whole]][1], (place, number[whole])
        if where is None:
            return ids
        ids[where[0] : where[0] + 2] = [where[1]]


@pytest.fixture(scope="module")
def tokens(files: Path) -> list[tuple[str, float]]:
    content, at, found = (files / "tok512.bin").read_bytes(), 4, []
    while at < len(content):
        score, length = struct.unpack_from("<fi", content, at)
        found.append((content[at + 8 : at + 8 + length].decode(), score))
        at += 8 + length
    return found


WORDS = st.sampled_from(
    [" the", "Once", " upon", "aaa", "\n", "  ", "é", "☃", "▁", "<s>", "</s>", "<unk>", "<0x0A>", "Lily", "'s", " "]
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(st.characters(codec="utf-8", exclude_characters="\0")), st.lists(WORDS).map("".join)))
def test_its_tokenizer_encodes_as_run_c_does(tokenizer, tokens, text):
    assert tokenizer.encode(text).ids == encode_as_run_c(text, tokens)


def test_a_long_text_encodes_as_run_c_does(real_data, tokenizer, tokens):
    text = (real_data / "text" / "gutenberg" / "alice.txt").read_text()[5_000:7_000]
    ids = tokenizer.encode(text).ids
    assert ids == encode_as_run_c(text, tokens)
    assert tokenizer.decode(ids) == text


def test_an_untied_file_has_its_head_last(tmp_path, files):
    content = bytearray((files / "stories260K.bin").read_bytes())
    struct.pack_into("<i", content, 20, -512)
    head = torch.randn(512, 64)
    path = tmp_path / "untied.bin"
    path.write_bytes(bytes(content) + head.numpy().tobytes())
    imported(path, tmp_path / "ours")
    assert torch.equal(load_model(tmp_path / "ours").decoder.lm_head.weight, head)


@pytest.mark.parametrize("size", [0, 27, 28, 1_056_000, 1_056_539])
def test_a_file_cut_short_is_refused_with_both_sizes(tmp_path, files, size):
    path = tmp_path / "short.bin"
    path.write_bytes((files / "stories260K.bin").read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"{size:,} bytes"):
        imported(path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "header", [(64, 172, 5, 8, 3, 512, 512), (64, 172, 5, 0, 4, 512, 512), (-1, 172, 5, 8, 4, 512, 512)]
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, header):
    path = tmp_path / "odd.bin"
    path.write_bytes(struct.pack("<7i", *header) + b"\0" * 999)
    with pytest.raises(CheckpointError):
        Llama2cWeights(path)


def test_a_tokenizer_of_another_model_or_cut_short_is_refused(tmp_path, files):
    with pytest.raises(CheckpointError, match="512 tokens and the model 600"):
        convert_tokenizer(files / "tok512.bin", 600)
    (tmp_path / "short.bin").write_bytes((files / "tok512.bin").read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="cut short in token 511"):
        convert_tokenizer(tmp_path / "short.bin", 512)
