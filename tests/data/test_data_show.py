"""What `omniloom show` tells of a corpus is what its index and rows hold; nothing in it steers a terminal."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from handmade import build, save_clip, save_lines, save_picture, save_video
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tqdm import tqdm

from omniloom.data import facts as facts_module
from omniloom.data.config import DataConfig
from omniloom.data.corpus import Corpus, Documents
from omniloom.data.facts import RowFacts, corpus_facts, dissect, rejects_by_reason, stream_row, whole_document
from omniloom.data.loader import Rows
from omniloom.data.plan import SHUFFLED_ROWS, Plan, Stream, open_plan
from omniloom.data.samples import write_samples
from omniloom.data.schedule import read_schedule
from omniloom.data.show import clean, print_corpus, print_row
from omniloom.data.thumbnails import Thumbnail, loudness
from omniloom.modality.image import cut_patches, join_patches
from omniloom.modality.sequence import MODALITIES, Row

OMNILOOM = str(Path(sys.executable).parent / "omniloom")
SEQ_LEN = 64
DATA = DataConfig(seq_len=SEQ_LEN)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The smoke samples: words, pictures, clips and videos."""
    folder = tmp_path_factory.mktemp("show")
    return build(write_samples("smoke", folder / "files"), folder / "corpora" / "mine")


@pytest.fixture(scope="module")
def documents(corpus: Corpus) -> Documents:
    return Documents([corpus], "train")


@pytest.fixture(scope="module")
def plan(corpus: Corpus, documents: Documents, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return open_plan(documents, read_schedule([corpus], DATA, 0), 300, tmp_path_factory.mktemp("plans"))


def told(print_it: Callable[[Console], None], colours: bool = False, width: int = 118) -> str:
    console = Console(
        file=io.StringIO(), width=width, highlight=False, color_system="truecolor" if colours else None, no_color=False
    )
    print_it(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row_of(documents: Documents, *sources: int, padding: int = 5) -> RowFacts:
    """A row of the first documents of these sources, whole, and some padding."""
    taken = [int(documents.first_S[source]) + sources[:place].count(source) for place, source in enumerate(sources)]
    pieces = [whole_document(documents, "train", number) for number in taken]
    return dissect(documents, pieces, sum(piece.tokens for piece in pieces) + padding)


def test_the_row_shown_is_the_row_that_is_trained_on(corpus: Corpus, documents: Documents, plan: Plan) -> None:
    """Field by field, over a plan."""
    rows = Rows(documents, plan, read_schedule([corpus], DATA, 0))
    for number in range(0, len(plan), 7):
        check_against_row(dissect(documents, plan[number], SEQ_LEN), rows[number])


def test_of_several_media_in_a_document_each_segment_has_its_own(tmp_path: Path) -> None:
    """Whole, and in the pieces that short rows make of it."""
    pictures = [{"image": str(save_picture(tmp_path / f"{seed}.png", seed))} for seed in range(3)]
    clips = [{"audio": str(save_clip(tmp_path / f"{seed}.wav", seed, 0.05 + seed / 100))} for seed in range(2)]
    videos = [{"video": str(save_video(tmp_path / f"{seed}.mp4", seed))} for seed in range(2)]
    segments = [*pictures, {"text": "two", "loss": False}, *clips, *videos, {"text": " seven"}, pictures[0], videos[0]]
    save_lines(tmp_path / "documents.jsonl", segments)
    (tmp_path / "m.yaml").write_text("sources: {a: {format: interleaved, train: [documents.jsonl]}}")
    corpus = build(tmp_path / "m.yaml", tmp_path / "corpus")
    documents = Documents([corpus], "train")
    for seq_len in (12, 20, 100):
        schedule = read_schedule([corpus], DataConfig(seq_len=seq_len), 0)
        pieces = [row for block in Stream(documents, schedule).blocks(12) for row in block]
        rows = Rows(documents, pieces, schedule)
        for number, row in enumerate(pieces):
            check_against_row(dissect(documents, row, seq_len), rows[number])
    whole = dissect(documents, [whole_document(documents, "train", 0)], 100).parts[0].stretches
    kinds = ["text" if "text" in segment else next(iter(segment)) for segment in segments]
    assert [stretch.kind for stretch in whole] == ["bos", *kinds, "eos"]
    assert [stretch.text for stretch in whole if stretch.text] == ["two", " seven"]


def check_against_row(facts: RowFacts, row: Row) -> None:
    """Every token is told of once, as the row has it."""
    for field in ("modality", "document", "loss_mask"):
        assert np.array_equal(getattr(facts, field), getattr(row, field))
    media = {
        kind: [s.content for part in facts.parts for s in part.stretches if s.kind == kind] for kind in MODALITIES[1:]
    }
    for kind, contents in media.items():
        assert np.array_equal(np.concatenate([*contents, getattr(row, kind)[:0]]), getattr(row, kind))
    mask = np.concatenate([np.full(end - begin, value) for begin, end, value in facts.mask_runs])
    assert np.array_equal(mask, row.loss_mask)
    for part in facts.parts:
        for stretch in part.stretches:
            place = slice(stretch.begin, stretch.end)
            assert set(row.loss_mask[place]) == {int(stretch.is_target)}
            if stretch.position:
                between = np.stack([row.position[place].min(0), row.position[place].max(0)], axis=1)
                assert between.tolist() == [stretch.position[axis] for axis in ("time", "row", "column")]
    ends = [stretch.end for part in facts.parts for stretch in part.stretches]
    begins = [stretch.begin for part in facts.parts for stretch in part.stretches]
    assert begins == [0, *ends[:-1]], "a token is told of twice or not at all"
    assert ends[-1] == facts.seq_len - facts.padding


@pytest.mark.parametrize("row", [0, 3, SHUFFLED_ROWS - 1, SHUFFLED_ROWS, 299])
def test_a_row_is_packed_in_memory_as_its_plan_has_it(
    row: int, corpus: Corpus, documents: Documents, plan: Plan
) -> None:
    pieces, record = stream_row(documents, read_schedule([corpus], DATA, 0), row)
    assert pieces == plan[row]
    assert record.rows == max(row + 1, SHUFFLED_ROWS)
    assert record.key == plan.record.key
    if row == 299:
        assert record == plan.record
    assert not (corpus.folder / "plans").exists()


def test_a_row_is_found_without_a_progress_bar(
    corpus: Corpus, documents: Documents, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TQDM_DISABLE=1 turns bars off, and their counts with them."""
    monkeypatch.setattr(facts_module, "tqdm", partial(tqdm, disable=True))
    assert stream_row(documents, read_schedule([corpus], DATA, 0), 3)[0] == plan[3]
    assert stream_row(documents, read_schedule([corpus], DATA, 0), 299)[0] == plan[299]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
def test_patches_join_to_the_picture_they_were_cut_from(down: int, across: int, patch: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (down * patch, across * patch, 3), np.uint8)
    assert np.array_equal(join_patches(*cut_patches(pixels, patch)), pixels)


def test_a_picture_is_two_pixels_a_character_and_grey_without_colours() -> None:
    red, black = (255, 0, 0), (0, 0, 0)
    picture = Thumbnail(np.array([[red, black], [black, red]], np.uint8), 10, 10)
    coloured = told(lambda console: console.print(picture), colours=True)
    assert coloured.count("▀") == 2
    assert "38;2;255;0;0;48;2;0;0;0m▀" in coloured
    steps = np.linspace(0, 255, 8).astype(np.uint8)
    ramp = Thumbnail(np.repeat(np.tile(steps, (2, 1))[:, :, None], 3, axis=2), 10, 10)
    assert told(lambda console: console.print(ramp)).rstrip("\n") == " .-=+*%@"
    wide = Thumbnail(np.zeros((10, 400, 3), np.uint8), 36, 14)
    assert wide.size == (36, 1)
    assert Thumbnail(np.zeros((400, 100, 3), np.uint8), 36, 14).size == (7, 14)


def test_loudness_rises_with_the_sound() -> None:
    rising = np.repeat(np.arange(8, dtype=np.float16)[:, None], 4, axis=1)
    assert loudness(rising, 60) == "▁▂▃▄▅▆▇█"
    assert loudness(np.zeros((100, 4), np.float16), 20) == "▁" * 20


def test_a_row_is_told_document_by_document(documents: Documents) -> None:
    facts = row_of(documents, 1, 2, 3)
    page = told(lambda console: print_row(console, facts, "a row"))
    assert "\x1b" not in page
    for number, part in enumerate(facts.parts):
        assert f"document {number} · {part.source} {part.document} · " in page
    assert "2 × 2 patches = 4 tokens · row 0…1, column 0…1" in page
    assert "4 frames, 2 s, of 2 × 2 patches = 16 tokens · time 0…3, row 0…1, column 0…1" in page
    assert "1 clip, 0.2 s, 20 frames = 10 tokens · time 0…9" in page
    assert "  Which colour?" in page
    assert f"{facts.seq_len - 5}:{facts.seq_len} is padding" in page
    medium, number, _ = page.splitlines()[3:6]
    letters = [MODALITIES[kind][0] for kind in facts.modality[:-5]]
    assert medium.split() == ["medium", "".join(letters) + "·" * 5]
    places = [str(document) for document in facts.document[:-5]]
    assert number.split() == ["document", "".join(places) + "·" * 5]


def test_of_many_documents_the_first_are_drawn_and_the_rest_listed(documents: Documents) -> None:
    facts = row_of(documents, *[1] * 50)
    page = told(lambda console: print_row(console, facts, "a row"))
    assert page.count("\ndocument ") == 36
    assert "… and 14 more documents, all with --json" in page
    assert "runs)" in page
    assert len(page.splitlines()) < 200
    narrow = told(lambda console: print_row(console, facts, "a row"), width=10)
    assert "medium" in narrow


def test_the_counts_are_the_indexs(corpus: Corpus) -> None:
    page = told(lambda console: print_corpus(console, corpus, []))
    for source in corpus.index.sources:
        (line,) = [line for line in page.splitlines() if line.split()[:2] == ["train", source.name]]
        assert line.split()[4:6] == [f"{source.train.documents:,}", f"{source.train.tokens:,}"]
    every = next(line for line in page.splitlines() if line.split()[:2] == ["train", "all"]).split()
    records = [source.train for source in corpus.index.sources]
    assert every[2:4] == [f"{sum(r.documents for r in records):,}", f"{sum(r.tokens for r in records):,}"]
    assert "lengths of the train documents, in tokens" in page
    assert "2,048 – 4,095" in page


def test_rejects_are_grouped_by_reason(tmp_path: Path) -> None:
    """What differs from one to the next (a name, a number) is left out; a name cannot steer the terminal."""
    save_picture(tmp_path / "good.png", 0)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    save_clip(tmp_path / "silent.wav", 0, loudness=0)
    save_video(tmp_path / "film.mp4", 0)
    names = ({"image": "a.png"}, {"image": "b.png"}, {"audio": "silent.wav"})
    gone = [{"video": f"gone/{number}.mp4"} for number in range(3)]
    media = [*names, *gone, {"image": "good.png"}, {"video": "film.mp4"}]
    save_lines(tmp_path / "\x1b[31mred.jsonl", *([medium, {"text": " seven"}] for medium in media))
    (tmp_path / "m.yaml").write_text("sources: {a: {format: interleaved, train: ['*.jsonl']}}")
    corpus = build(tmp_path / "m.yaml", tmp_path / "corpus")
    groups = rejects_by_reason(corpus)
    assert [(group.count, group.share) for group in groups] == [(3, 3 / 8), (2, 2 / 8), (1, 1 / 8)]
    assert groups[0].reason == "cannot read … No such file or directory"
    assert groups[0].example.reason.endswith("gone/0.mp4: No such file or directory")
    page = told(lambda console: print_corpus(console, corpus, groups), width=300)
    assert "skipped: 6 documents, 75.00% of all, by reason" in page
    assert "\x1b" not in page
    assert "\\x1b[31mred.jsonl@" in page
    assert corpus_facts(corpus)["rejects"][0]["example"]["name"].startswith(str(tmp_path))


def test_what_a_file_says_cannot_steer_a_terminal() -> None:
    assert clean("a\nb\tc") == "a⏎ b⇥ c"
    assert clean("\x1b]0;title\x07 \x9b31m \u202e [bold]é") == "\\x1b]0;title\\x07 \\x9b31m \\u202e [bold]é"


def omniloom(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "COLUMNS")}
    return subprocess.run(
        [OMNILOOM, "show", *words], cwd=folder, capture_output=True, text=True, timeout=120, env=plain
    )


def test_the_verb_draws_a_row_or_gives_it_as_json(corpus: Corpus, plan: Plan) -> None:
    home = corpus.folder.parents[1]
    page = omniloom(home, "corpora/mine", "row=5", f"data.seq_len={SEQ_LEN}")
    assert page.returncode == 0, page.stderr
    assert "row 5 of the training stream: seed=0 data.seq_len=64" in page.stdout
    assert "\x1b" not in page.stdout
    answer = omniloom(home, "corpora/mine", "row=5", f"data.seq_len={SEQ_LEN}", "--json")
    assert (answer.returncode, answer.stderr) == (0, "")
    facts = json.loads(answer.stdout)
    assert facts["index"] == corpus_facts(corpus)["index"]
    assert [(d["document"], d["start"], d["stop"]) for d in facts["row"]["documents"]] == [*map(tuple, plan[5])]
    assert {segment["kind"] for d in facts["row"]["documents"] for segment in d["segments"]} <= {
        "bos",
        "eos",
        *MODALITIES,
    }
    assert facts["plan"]["epochs"].keys() == {"words", "colours", "tones", "fades"}
    assert sorted(path.name for path in corpus.folder.iterdir() if path.is_dir()) == ["shards"]


def test_a_corpus_of_preference_pairs_is_counted_and_has_no_row(tmp_path: Path) -> None:
    pairs = [{"prompt": "red?", "chosen": "yes", "rejected": "no"}] * 3
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "corpus.yaml").write_text("sources: {pairs: {format: preference, train: [a.jsonl]}}")
    build(tmp_path / "corpus.yaml", tmp_path / "corpus")
    drawn = omniloom(tmp_path, "corpus")
    assert drawn.returncode == 0, drawn.stderr
    assert "preference" in drawn.stdout
    assert "training stream" not in drawn.stdout


def test_the_verb_shows_one_document_whole_and_held_out_rows(corpus: Corpus) -> None:
    home = corpus.folder.parents[1]
    document = omniloom(home, "corpora/mine", "document=0", "--json")
    (part,) = json.loads(document.stdout)["row"]["documents"]
    assert (part["start"], part["stop"]) == (0, part["tokens"])
    text = Path(part["name"]).read_text()
    assert part["segments"][1]["text"] == text
    heldout = omniloom(home, "corpora/mine", "split=heldout", f"data.seq_len={SEQ_LEN}")
    assert heldout.returncode == 0, heldout.stderr
    assert "row 0 of the held-out rows" in heldout.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "corpora here are corpora/mine"),
        (["corpora/mien"], "neither a corpus (a folder with index.json) nor a run in runs_dir=runs; did you mean"),
        (["corpora/mine", "document=900"], "document=900 is not there: split=train has 188, counted from 0"),
        (["corpora/mine", "split=heldout", "row=99", "val_rows=2"], "row=99 is not there: the held-out documents make"),
        (["corpora/mine", "split=test"], "split=test is none of train, heldout"),
        (["corpora/mine", "row=-1"], "row=-1 must be at least 0"),
        (["corpora/mine", "data.weights.wrods=1"], "data.weights.wrods names no source of the corpus"),
        (["half"], "it is half built: repeat the same tokenize command"),
    ],
)
def test_a_wrong_word_is_one_message_and_a_nonzero_status(words: list[str], message: str, corpus: Corpus) -> None:
    home = corpus.folder.parents[1]
    (home / "half" / "shards").mkdir(parents=True, exist_ok=True)
    answer = omniloom(home, *words)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr
