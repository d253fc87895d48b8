"""org/name: found in the cache, fetched on request only, and never more than the model's files."""

from __future__ import annotations

import socket
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from bailing_jax import hub
from bailing_jax.errors import EXIT_FAILURE, EXIT_USAGE, UserError
from bailing_jax.loading import find_folder

COMMIT = "0123456789" * 4


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Whoever wants a connection is noted, and gets none."""
    asked: list[Any] = []

    def refuse(*args: object, **_options: object) -> Any:
        asked.append(args)
        raise OSError("no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    return asked


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the library reads HF_HUB_CACHE when it is imported."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def fill(cache: Path, name: str = "some-org/Some-Name_2.0") -> Path:
    """A model as the library leaves it there."""
    repo = cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize(
    ("name", "is_name"),
    [
        ("inclusionAI/Ling-mini-2.0", True),
        ("a/b", True),
        ("org_1/na.me-2", True),
        ("ling-mini-2.0", False),
        ("a/b/c", False),
        ("/a/b", False),
        ("./a", False),
        ("../a", False),
        ("~/a", False),
        ("a/", False),
        ("a/..", False),
        ("a/b\n", False),
        ("a b/c", False),
        ("", False),
    ],
)
def test_names_of_the_hub_are_told_from_paths(name: str, is_name: bool) -> None:
    assert hub.is_hub_name(name) is is_name


def test_what_is_in_the_cache_is_found_without_the_network(
    cache: Path, no_network: list[Any]
) -> None:
    snapshot = fill(cache)
    assert hub.find("some-org/Some-Name_2.0", download=False) == snapshot
    assert find_folder("some-org/Some-Name_2.0", download=False) == snapshot
    assert no_network == []


def test_what_is_not_there_is_not_fetched_unasked(cache: Path, no_network: list[Any]) -> None:
    fill(cache)
    with pytest.raises(UserError, match="some-org/other: no such folder, and not in the") as caught:
        find_folder("some-org/other", download=False)
    assert str(cache) in caught.value.message
    assert "--download" in caught.value.hint
    assert caught.value.exit_code == EXIT_USAGE
    assert no_network == []


def test_a_folder_of_that_name_comes_first(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(cache)
    monkeypatch.chdir(tmp_path)
    folder = Path("some-org/Some-Name_2.0")
    folder.mkdir(parents=True)
    assert find_folder(str(folder), download=True) == folder


@pytest.mark.parametrize("download", [True, False])
def test_only_the_files_of_the_model_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, download: bool
) -> None:
    asked: dict[str, Any] = {}

    def fetch(model: str, **options: Any) -> str:
        asked.update(options, model=model)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert hub.find("org/name", download=download) == tmp_path
    assert asked == {
        "model": "org/name", "local_files_only": not download, "allow_patterns": list(hub.PATTERNS)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("config.json", True),
        ("tokenizer.json", True),
        ("chat_template.jinja", True),
        ("merges.txt", True),
        ("LICENSE", True),
        ("README.md", True),
        ("modeling_bailing_moe.py", False),
        ("pytorch_model.bin", False),
        ("model.pt", False),
        ("model.gguf", False),
        ("optimizer.pkl", False),
        ("sub/tokenization.py", False),
        ("run.sh", False),
    ],
)
def test_code_and_pickles_stay_where_they_are(name: str, wanted: bool) -> None:
    assert any(fnmatch(name, pattern) for pattern in hub.PATTERNS) is wanted


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("Cannot find it.\nCheck your connection."), "Cannot find it."),
        (HFValidationError("Repo id must be ..."), "Repo id must be ..."),
        (TimeoutError("timed out"), "timed out"),
        (RuntimeError(), "RuntimeError"),  # as of an HTTP library
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_download_that_fails_says_why_in_a_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fetch(*_args: Any, **_options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(UserError) as caught:
        hub.find("org/name", download=True)
    assert caught.value.message == f"org/name: cannot be fetched from the hub: {reason}"
    assert "HF_TOKEN" in caught.value.hint
    assert caught.value.exit_code == EXIT_FAILURE


def test_without_a_network_a_download_fails_as_a_user_error(
    cache: Path, no_network: list[Any]
) -> None:
    assert not list(cache.iterdir())
    with pytest.raises(UserError, match="org/name: cannot be fetched from the hub: "):
        hub.find("org/name", download=True)
    assert no_network  # or this would prove nothing
