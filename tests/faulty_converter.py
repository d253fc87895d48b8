"""Conversions under faults, from the tests' side: checkpoints, the converter, what lies there.

`Converter` starts `convert_faults.py`, which says what the faults are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_faults import contents
from random_checkpoints import INERT, V2_5, random_tensors, write_checkpoint
from tiny_tokenizer import write_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]

# A layer of each kind and an MTP block, which is not used: every kind of file, in few steps.
CONFIG: dict[str, Any] = {
    **INERT,
    "architectures": [V2_5],
    "model_type": "bailing_hybrid",
    "vocab_size": 269,
    "eos_token_id": 268,
    "pad_token_id": 268,
    "max_position_embeddings": 128,
    "num_hidden_layers": 2,
    "layer_group_size": 2,
    "group_norm_size": 3,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "hidden_size": 18,
    "intermediate_size": 22,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "q_lora_rank": None,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 10,
    "v_head_dim": 5,
    "rope_interleave": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 7,
    "num_shared_experts": None,
    "routed_scaling_factor": 2.5,
    "rope_theta": 1e4,
    "rope_scaling": None,
}


def write_source(folder: Path, *, seed: int = 5, **changes: Any) -> Path:
    """A checkpoint in three shards with tokenizer, side files and remote code."""
    config = {**CONFIG, **changes}
    tensors = random_tensors(config, seed)
    write_checkpoint(folder, config, tensors, shards=3, dtype="bfloat16")
    write_tiny_tokenizer(folder, 269)
    (folder / "README.md").write_text("A model.\n", encoding="utf-8")
    (folder / "LICENSE").write_text("As is.\n", encoding="utf-8")
    (folder / "modeling.py").write_text("raise SystemExit\n", encoding="utf-8")
    return folder


Step = tuple[str, str, int]  # a call that changes the disk, its path, and bytes if it writes
Identity = tuple[int, int]


@dataclass(frozen=True)
class Run:
    """How a process ended; `code` is negative for a signal, None if it is only stopped.

    If watched, `steps` are what it did, and `audited` is how many of them Python reports by
    itself.
    """

    pid: int
    code: int | None
    out: str
    err: str
    steps: Sequence[Step]
    audited: int


def request(
    *argv: str | Path,
    fault: Mapping[str, Any] | None = None,
    shard_bytes: int | None = None,
    boundless: bool = False,
    watched: bool = False,
) -> dict[str, Any]:
    """What to run.

    Args:
        argv: the command line.
        fault: what to `do` at which `step` `of` what; see convert_faults.py.
        shard_bytes: a shard's size, for native-to-hf.
        boundless: let the disk claim that it has no end of room.
        watched: report the steps.
    """
    options = {"shard_bytes": shard_bytes, "boundless": boundless, "watched": watched}
    return {"argv": [str(arg) for arg in argv], "fault": fault, **options}


class Converter:
    """Runs conversions in processes forked from one interpreter; `prefix` starts that."""

    def __init__(self, *prefix: str) -> None:
        self._server = subprocess.Popen(
            [*prefix, sys.executable, str(ROOT / "tests" / "convert_faults.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment() | {"OPENBLAS_NUM_THREADS": "1"},  # fewer pages to fork
        )

    def end(self) -> None:
        """End the interpreter, and the processes that are still stopped."""
        self._server.communicate()

    def run(self, request: Mapping[str, Any]) -> Run:
        """A conversion."""
        return self.run_all([request])[0]

    def run_all(self, requests: Sequence[Mapping[str, Any]], at_once: int = 4) -> list[Run]:
        """Conversions, so many at a time; those begin together."""
        return [_run(found) for found in self._ask({"runs": requests, "at_once": at_once})]

    def go_on(self, stopped: Run) -> Run:
        """Let a stopped process run to its end."""
        return _run(self._ask({"go_on": stopped.pid}))

    def command(self, *argv: str | Path) -> None:
        """Run a program where the conversions run; it must succeed."""
        code, err = self._ask({"command": [str(arg) for arg in argv]})
        assert code == 0, err

    def contents(self, folder: Path) -> dict[str, str]:
        """A folder's contents as the conversions see them."""
        return self._ask({"contents": str(folder)})

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())


def _run(found: Mapping[str, Any]) -> Run:
    steps = [(name, path, size) for name, path, size in found["steps"]]
    return Run(**{**found, "steps": steps})


def environment() -> dict[str, str]:
    """For a Python that imports the packages of this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def command(*argv: str | Path) -> list[str]:
    """The command line of a real converter."""
    return [sys.executable, "-m", "convert", *map(str, argv)]


def convert(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a real converter to its end."""
    return subprocess.run(
        command(*argv), capture_output=True, text=True, check=False, cwd=ROOT, env=environment()
    )


def partial_of(path: Path) -> Path:
    """Where the output `path` is while it is being made."""
    return path.with_name(f".{path.name}.partial")


def journaled(path: Path) -> dict[str, Identity]:
    """Inode and mtime of each file that an unfinished conversion's journal calls finished."""
    journal = partial_of(path) / "journal.json"
    if not journal.exists():
        return {}
    # Between its publication and its last step the folder has its name, and the journal is there.
    folder = path if path.exists() else partial_of(path) / "files"
    return {name: identity(folder / name) for name in json.loads(journal.read_bytes())["files"]}


def identity(path: Path) -> Identity:
    """What changes when a file is written again."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def snapshot(folder: Path) -> dict[str, tuple[str, Identity]]:
    """Contents, inodes and mtimes of everything below a folder, and of itself."""
    found = {name: (digest, identity(folder / name)) for name, digest in contents(folder).items()}
    return found | {".": ("folder", identity(folder))}
