"""Media in prompts: in their order, left out, given to another; paths, pictures and sound as lm-eval hands them."""

import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import ask, direct_document, tiny_lm

from omniloom.errors import DataError
from omniloom.evaluation.media import split_prompt
from omniloom.modality.files import Media
from omniloom.modality.media import read_media
from omniloom.modality.sequence import weave
from omniloom.model.load import load_model
from tiny_folders import TINY, audible, colourful, moving, save_tiny, tokenizer

KINDS = {"image": "visual", "video": "visual", "audio": "audio"}  # and the argument lm-eval hands them in


@pytest.fixture(scope="module")
def text():
    return tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("random") / "model")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Four files of each kind."""
    place = tmp_path_factory.mktemp("media")
    made = {"image": colourful(place, 4), "audio": audible(place, 4), "video": moving(place, 4)}
    return {kind: [str(path) for path in paths] for kind, paths in made.items()}


def score(lm, requests):
    return [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def shown(prompt, media, answer=" red", document=0, task="some_task"):
    """A request whose prompt shows `media`, (kind, medium) in order."""
    held = {}
    for kind, medium in media:
        held.setdefault(KINDS[kind], []).append(medium)
    return ask(prompt, answer, held, document=document, task=task)


def expected(folder, text, parts, answer=" red"):
    """What the model gives directly: parts are texts and (kind, path)."""
    segments = []
    for part in parts:
        if isinstance(part, str):
            segments.append(text.segment(part, is_target=False))
        else:
            segments += read_media(part[0], Media(part[1], Path(part[1])), TINY)
    woven = weave([*segments, text.segment(answer)], text.bos_id, text.eos_id, text.placeholder_ids, TINY.widths)
    return direct_document(load_model(folder), woven.window(0, len(woven) - 1))[0]


def test_a_prompt_is_split_at_every_placeholder():
    assert split_prompt("a<image><audio>b<video>") == ["a", "<image>", "", "<audio>", "b", "<video>", ""]
    assert split_prompt("plain <picture>") == ["plain <picture>"]


def test_every_kind_stands_where_the_prompt_shows_it(folder, text, files):
    """Texts and media in order: pictures and videos share one argument, sound has another."""
    image, audio, video = (files[kind][0] for kind in ("image", "audio", "video"))
    other = files["image"][1]
    prompts = [
        ("<image>what?", [("image", image)], [("image", image), "what?"]),
        ("<audio>what?", [("audio", audio)], [("audio", audio), "what?"]),
        ("<video>what?", [("video", video)], [("video", video), "what?"]),
        (
            "<audio>cat<image>what?",
            [("image", image), ("audio", audio)],
            [("audio", audio), "cat", ("image", image), "what?"],
        ),
        (
            "a<video>cat<image><audio>what?",
            [("video", video), ("image", image), ("audio", audio)],
            ["a", ("video", video), "cat", ("image", image), ("audio", audio), "what?"],
        ),
        (
            "<image>a<video>b<image>what?",
            [("image", image), ("video", video), ("image", other)],
            [("image", image), "a", ("video", video), "b", ("image", other), "what?"],
        ),
    ]
    values = score(tiny_lm(folder), [shown(prompt, media, document=i) for i, (prompt, media, _) in enumerate(prompts)])
    assert values == pytest.approx([expected(folder, text, parts) for *_, parts in prompts], abs=1e-4)
    assert len({round(value, 3) for value in values}) == len(prompts)


def test_the_order_of_media_of_one_kind_counts(folder, files):
    first, second = files["audio"][:2]
    one, two = score(
        tiny_lm(folder),
        [
            shown("<audio><audio>what?", [("audio", first), ("audio", second)], document=0),
            shown("<audio><audio>what?", [("audio", second), ("audio", first)], document=1),
        ],
    )
    assert abs(one - two) > 1e-3


def as_array(path):
    """A wav as lm-eval hands it over."""
    with wave.open(path) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return {"array": samples / 32_767, "sampling_rate": file.getframerate()}


def test_sound_is_given_as_a_path_or_as_an_array(folder, files):
    first, second = files["audio"][:2]
    by_path, by_array, other = score(
        tiny_lm(folder),
        [
            shown("<audio>what?", [("audio", first)], document=0),
            shown("<audio>what?", [("audio", as_array(first))], document=1),
            shown("<audio>what?", [("audio", as_array(second))], document=2),
        ],
    )
    assert by_path == pytest.approx(by_array, abs=2e-2)  # one step of 16 bits here and there
    assert abs(by_path - other) > 5e-2


def test_an_array_at_another_rate_is_brought_to_ours(folder, files):
    """The same fifth of a second of a tone at 16 kHz and at 48 kHz."""
    tones = [
        {"array": 0.3 * np.sin(2 * np.pi * 440 * np.arange(rate // 5) / rate), "sampling_rate": rate}
        for rate in (16_000, 48_000)
    ]
    tones.append({"array": tones[0]["array"], "sampling_rate": 48_000})  # the same samples played faster
    requests = [shown("<audio>what?", [("audio", tone)], document=i) for i, tone in enumerate(tones)]
    slow, fast, wrong = score(tiny_lm(folder), requests)
    assert abs(slow - fast) < abs(slow - wrong) / 3


def test_media_in_memory_are_not_taken_for_those_of_an_earlier_call(folder, files):
    """A picture that is gone may leave its address to the next."""
    lm, fresh = tiny_lm(folder), []
    for path in files["image"] * 8:
        with Image.open(path) as file:
            picture = file.copy()
        fresh.append(score(lm, [shown("<image>what?", [("image", picture)])])[0])
        del picture
    by_path = score(
        tiny_lm(folder), [shown("<image>what?", [("image", p)], document=i) for i, p in enumerate(files["image"])]
    )
    assert fresh == pytest.approx(by_path * 8, abs=1e-4)


@pytest.mark.parametrize("control", ["kept", "removed", "shuffled"])
@pytest.mark.parametrize(
    ("prompt", "given", "said"),
    [
        ("what?", {"visual": 1}, ["shows no media", "'visual': 1"]),
        ("<image><image>what?", {"visual": 1}, ["'visual': 2", "'visual': 1"]),
        ("<image>what?", {"visual": 0}, ["'visual': 1", "'visual': 0"]),
        ("<image>what?", {}, ["'visual': 1", "given none"]),
        ("<image>what?", {"audio": 1}, ["'visual': 1", "'audio': 1"]),
        ("<audio>what?", {"visual": 1}, ["'audio': 1", "'visual': 1"]),
        ("<image><audio>what?", {"visual": 1}, ["'audio': 1", "given {'visual': 1}"]),
        ("<image><video>what?", {"visual": 3}, ["'visual': 2", "'visual': 3"]),
    ],
)
def test_a_wrong_number_of_media_is_refused_with_both_figures(folder, files, control, prompt, given, said):
    held = {name: (files["image"] if name == "visual" else files["audio"])[:count] for name, count in given.items()}
    requests = [ask(prompt, " red", held, document=i, task="pictures_task") for i in (0, 1)]
    with pytest.raises(DataError) as caught:
        score(tiny_lm(folder, control), requests)
    for part in ("pictures_task", *said):
        assert part in str(caught.value)


def test_a_placeholder_without_any_medium_is_refused(folder):
    with pytest.raises(DataError, match=r"shows \{'visual': 1\} and is given none"):
        score(tiny_lm(folder), [ask("<image>what?", " red")])


@pytest.mark.parametrize("kind", KINDS)
def test_a_medium_without_an_encoder_is_named(kind, files, tmp_path):
    key = {"image": "image_patch_pixels", "video": "video_patch_pixels", "audio": "audio_mels"}[kind]
    lm = tiny_lm(save_tiny(tmp_path / "model", **{key: None}))
    with pytest.raises(DataError, match=f"task hearing shows {kind} and the model has no encoder for it"):
        score(lm, [shown(f"<{kind}>what?", [(kind, files[kind][0])], task="hearing")])
    other = "audio" if kind == "image" else "image"
    assert score(lm, [shown(f"<{other}>what?", [(other, files[other][0])])])[0] < 0


def test_a_file_of_another_kind_is_refused(folder, files):
    with pytest.raises(DataError, match="not a readable"):
        score(tiny_lm(folder), [shown("<image>what?", [("image", files["video"][0])])])


def mixed(files, order, answers=(" red", " blue")):
    """Two documents of sound and picture, two of a video, two of a picture, one question each."""
    layout = [
        ("<audio>a<image>what {}?", [("audio", 0), ("image", 0)]),
        ("<audio>a<image>what {}?", [("audio", 1), ("image", 1)]),
        ("<video>what {}?", [("video", 0)]),
        ("<video>what {}?", [("video", 1)]),
        ("<image>what {}?", [("image", 2)]),
        ("<image>what {}?", [("image", 3)]),
    ]
    return [
        shown(layout[i][0].format(i), [(kind, files[kind][n]) for kind, n in layout[order[i]][1]], answer, document=i)
        for i in range(6)
        for answer in answers
    ]


def test_removed_leaves_out_every_medium_of_mixed_documents(folder, text, files):
    values = score(tiny_lm(folder, "removed"), mixed(files, range(6), (" red",)))
    bare = [["a", f"what {i}?"] if i < 2 else [f"what {i}?"] for i in range(6)]
    assert values == pytest.approx([expected(folder, text, parts) for parts in bare], abs=1e-4)
    kept = score(tiny_lm(folder), mixed(files, range(6), (" red",)))
    assert min(abs(one - other) for one, other in zip(kept, values, strict=True)) > 1e-3


def test_shuffled_gives_mixed_documents_the_media_of_another_of_their_kind(folder, files):
    """With two documents of each kind, each gets the other's, both media together."""
    swapped = [1, 0, 3, 2, 5, 4]
    values = score(tiny_lm(folder, "shuffled"), mixed(files, range(6)))
    assert values == pytest.approx(score(tiny_lm(folder), mixed(files, swapped)), abs=1e-4)
    kept = score(tiny_lm(folder), mixed(files, range(6)))
    assert min(abs(one - other) for one, other in zip(kept, values, strict=True)) > 1e-3


def test_shuffled_leaves_a_document_without_media_as_it_is(folder, files):
    requests = [*mixed(files, range(6), (" red",)), ask("the cat", " sat", document=6)]
    (bare,) = score(tiny_lm(folder), [ask("the cat", " sat")])
    assert score(tiny_lm(folder, "shuffled"), requests)[-1] == pytest.approx(bare, abs=1e-4)


def test_a_document_alone_of_its_kind_cannot_be_shuffled(folder, files):
    requests = [
        shown("<image>what?", [("image", files["image"][0])], document=0, task="mixed_task"),
        shown("<image>what?", [("image", files["image"][1])], document=1, task="mixed_task"),
        shown("<audio>what?", [("audio", files["audio"][0])], document=2, task="mixed_task"),
    ]
    with pytest.raises(DataError, match="task mixed_task has one document of its kind"):
        score(tiny_lm(folder, "shuffled"), requests)
