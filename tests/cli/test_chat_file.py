"""/save and /load: what is written comes back, nothing is overwritten, mistakes are named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fake_chat import FakeLLM, Talk, turn


def test_save_and_load_restore_the_conversation(tmp_path: Path) -> None:
    path = tmp_path / "a talk.json"
    llm = FakeLLM("é\n", "1" * 30, limit=30)
    talk = Talk(llm, "a\\", "b", f"/save {path}", "c" * 40, f"/save {path}2", system="S")
    messages = [("system", "S"), *turn("a\nb", "é\n")]
    want = [{"role": role, "content": text} for role, text in messages]
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == want
    assert "é" in text
    assert text.endswith("]\n")
    assert f"{path}: 3 messages written" in talk.said
    assert sorted(os.listdir(tmp_path)) == ["a talk.json", "a talk.json2"]
    # The waiting question is part of it.
    again = FakeLLM("x", "y", "z")
    talk = Talk(again, "old", f"/load {path}2", "/retry", f"/load {path}", "new", system="T")
    assert again.sent[2:] == [[*messages, ("user", "c" * 40)], [*messages, ("user", "new")]]
    assert f"{path}2: 4 messages read; its last question waits for /retry" in talk.said
    assert f"{path}: 3 messages read" in talk.said


def test_a_loaded_conversation_replaces_the_system_message(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    Talk(FakeLLM(), f"/save {path}")
    assert json.loads(path.read_text()) == []
    llm = FakeLLM("x", "y")
    Talk(llm, "old", f"/load {path}", "new", system="T")
    assert llm.sent[2:] == [turn("new")]


def test_save_overwrites_nothing_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, link = tmp_path / "talk", tmp_path / "link"
    path.write_text("precious")
    link.symlink_to(tmp_path / "nowhere")
    talk = Talk(FakeLLM(), f"/save {path}", f"/save {link}")
    assert talk.errors == [f"{p}: exists; it was not overwritten" for p in (path, link)]
    assert path.read_text() == "precious"

    def full(part: Path, data: bytes) -> int:
        part.write_text(data.decode()[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    talk = Talk(FakeLLM(), f"/save {tmp_path / 'new'}")
    assert talk.errors == [f"{tmp_path / 'new'}: cannot be written: No space left on device"]
    assert sorted(os.listdir(tmp_path)) == ["link", "talk"]


def test_save_knows_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Talk(FakeLLM("1"), "a", "/save ~/talk")
    assert len(json.loads((tmp_path / "talk").read_text())) == 2


def test_a_lone_surrogate_survives_a_file(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    llm = FakeLLM("1", "2")
    Talk(llm, "a\udc80b", f"/save {path}", f"/load {path}", "c")
    assert llm.sent[-1] == turn("a\udc80b", "1", "c")


def message_of(role: object, content: object = "x", **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON: "),
        ("[" * 100_000, "not JSON: "),
        (b"\xff", "not JSON: 'utf-8' codec"),
        ({"messages": []}, "{'messages': []}; allowed: a list of messages"),
        ([3], "messages[0] = 3; allowed: an object of role and content"),
        (
            [message_of("user"), {"role": "assistant"}],
            "messages[1] = {'role': 'assistant'}; allowed: ",
        ),
        (
            [message_of("user", name="x")],
            "messages[0] = {'role': 'user', 'content': 'x', 'name': 'x'};",
        ),
        ([message_of("user", None)], "messages[0]: content = None; allowed: a string"),
        ([message_of("tool")], "messages[0]: role = 'tool'; allowed here: system or user"),
        ([message_of([])], "messages[0]: role = []; allowed here: system or user"),
        (
            [message_of("assistant")],
            "messages[0]: role = 'assistant'; allowed here: system or user",
        ),
        (
            [message_of("user"), message_of("user")],
            "messages[1]: role = 'user'; allowed here: assistant",
        ),
        (
            [message_of("system"), message_of("assistant")],
            "messages[1]: role = 'assistant'; allowed here: user",
        ),
        (
            [message_of("user"), message_of("assistant"), message_of("system")],
            "messages[2]: role = 'system'; allowed",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_file_is_named_and_changes_nothing(
    tmp_path: Path, content: object, message: str
) -> None:
    path = tmp_path / "talk"
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(raw if isinstance(raw, bytes) else json.dumps(raw).encode())
    llm = FakeLLM("1", "2")
    talk = Talk(llm, "a", f"/load {path}", "b")
    (error,) = talk.errors
    assert error.startswith(f"{path}: {message}")
    assert len(error) < len(str(path)) + 160
    assert llm.sent[-1] == turn("a", "1", "b")


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bailing_jax.cli.chat_file.MAX_FILE_BYTES", 1)
    (tmp_path / "talk").write_text("[]")
    talk = Talk(FakeLLM(), f"/load {tmp_path / 'talk'}")
    assert talk.errors == [f"{tmp_path / 'talk'}: longer than 1 bytes"]
