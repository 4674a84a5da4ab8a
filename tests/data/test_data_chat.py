"""Conversations and preferences become text with role headers; what is none says where."""

import base64
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from read_raw import jsonl, parts, read, texts

from omniloom.data.source import RawDocument


def chat(tmp_path: Path, *records: Any) -> list[RawDocument]:
    return read("chat", jsonl(tmp_path / "chat.jsonl", *records))


TURNS = [("system", "Be brief."), ("user", "Which colour?"), ("assistant", "red"), ("user", "And?"), ("assistant", "b")]
RENDERED = [
    ("system: Be brief.\n\nuser: Which colour?\n\nassistant:", False),
    (" red", True),
    ("\n\nuser: And?\n\nassistant:", False),
    (" b", True),
]


def test_messages_sharegpt_and_alpaca_read_alike(tmp_path: Path) -> None:
    theirs = {"user": "human", "assistant": "gpt", "system": "system"}
    messages, sharegpt, alpaca, without_input = chat(
        tmp_path,
        {"id": 7, "messages": [{"role": role, "content": text} for role, text in TURNS]},
        {"conversations": [{"from": theirs[role], "value": text} for role, text in TURNS]},
        {"instruction": "Which colour?", "input": "grass", "output": "green"},
        {"instruction": "Which colour?", "input": "", "output": "green"},
    )
    assert texts(messages) == texts(sharegpt) == RENDERED
    assert texts(alpaca) == [("user: Which colour?\n\ngrass\n\nassistant:", False), (" green", True)]
    assert texts(without_input) == [("user: Which colour?\n\nassistant:", False), (" green", True)]


def test_parts_of_a_message_keep_their_order(tmp_path: Path) -> None:
    picture = base64.b64encode(b"bytes").decode()
    content = [
        {"type": "text", "text": "See "},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": f"data:image/png;base64,{picture}"},
        {"type": "image", "path": "b.png"},
        {"type": "text", "text": "and hear"},
        {"type": "audio", "audio": "c.wav"},
        {"type": "input_audio", "input_audio": {"data": picture, "format": "wav"}},
        {"type": "video", "video": f"file://{tmp_path}/d.mp4"},
    ]
    (document,) = chat(
        tmp_path, {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]}
    )
    assert parts(document) == [
        ("text", "user: See "),
        ("image", tmp_path / "a.png"),
        ("image", b"bytes"),
        ("image", tmp_path / "b.png"),
        ("text", "and hear"),
        ("audio", tmp_path / "c.wav"),
        ("audio", b"bytes"),
        ("video", tmp_path / "d.mp4"),
        ("text", "\n\nassistant:"),
        ("text", " x"),
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "neither messages nor conversations nor instruction"),
        ({"messages": []}, "messages is no list of turns, or an empty one"),
        ({"messages": "hi"}, "messages is no list of turns"),
        ({"messages": [None]}, "messages[0] is no mapping"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no turn of the assistant"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "messages[0].role 'usr' is no role; did you mean 'user'?"),
        ({"messages": [{"role": None, "content": "a"}]}, "messages[0].role is null"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content is null"),
        ({"messages": [{"role": "assistant", "content": []}]}, "messages[0].content is empty"),
        ({"messages": [{"role": "assistant", "content": [{"type": "txt"}]}]}, "did you mean 'text'?"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
            "messages[0].content[0] names no image",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "image", "image": "a\0"}]}]}, "NUL byte"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image", "url": "https://a/b"}]}]},
            "https:// is not read",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "image", "url": "data:,a"}]}]}, "base64 alone"),
        ({"conversations": [{"from": "gpt", "value": 7}]}, "conversations[0].value is a number"),
        ({"instruction": "a", "output": None}, "output is null"),
        ({"instruction": "a"}, "no key 'output'"),
    ],
)
def test_a_conversation_that_is_none_says_where(record: Any, reason: str, tmp_path: Path) -> None:
    (document,) = chat(tmp_path, record)
    assert reason in document.problem


def test_a_preference_is_two_documents_of_one_name(tmp_path: Path) -> None:
    asked, good, bad = (
        {"role": r, "content": c} for r, c in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5"))
    )
    file = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [asked], "chosen": [good], "rejected": [bad]},
        {"chosen": [asked, good], "rejected": [asked, bad]},
        {"prompt": "2+2?", "chosen": [asked, good], "rejected": [asked, bad]},
    )
    documents = read("preference", file)
    assert [document.kind for document in documents] == ["chosen", "rejected"] * 4
    for chosen, rejected in zip(documents[::2], documents[1::2], strict=True):
        assert chosen.name == rejected.name
        assert texts(chosen) == [("user: 2+2?\n\nassistant:", False), (" 4", True)]
        assert texts(rejected) == [("user: 2+2?\n\nassistant:", False), (" 5", True)]


def test_only_the_answer_of_a_preference_is_a_target(tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in TURNS]
    file = jsonl(tmp_path / "a.jsonl", {"prompt": turns[:-1], "chosen": "b", "rejected": "c"})
    assert [text for text in texts(read("preference", file)[0]) if text[1]] == [(" b", True)]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "no key 'rejected'"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "chosen is null"),
        ({"prompt": "a", "chosen": "b", "rejected": []}, "rejected is no list of turns"),
        (
            {
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "rejected": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}],
            },
            "answer different prompts",
        ),
        ({"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}, "ends in a turn of the user"),
    ],
)
def test_a_preference_that_is_none_is_one_reject(record: Any, reason: str, tmp_path: Path) -> None:
    (document,) = read("preference", jsonl(tmp_path / "a.jsonl", record))
    assert reason in document.problem


@pytest.mark.parametrize("format", ["chat", "preference"])
def test_conversations_of_a_parquet_file_read_as_those_of_a_jsonl(format: str, tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in TURNS]
    record = {"messages": turns} if format == "chat" else {"prompt": turns[:1], "chosen": "b", "rejected": "c"}
    pq.write_table(pa.Table.from_pylist([record, record]), tmp_path / "a.parquet")
    lines = read(format, jsonl(tmp_path / "a.jsonl", record, record))
    rows = read(format, tmp_path / "a.parquet")
    assert [document.segments for document in rows] == [document.segments for document in lines]
    assert [document.name.rpartition("@")[2] for document in rows] == [str(n) for n in range(2) for _ in rows[::2]]
