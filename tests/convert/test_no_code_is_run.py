"""S08: a checkpoint is data. Nothing in its folder is unpickled, imported or even opened as such.

A folder comes with a pickle, remote code named in config.json, and modules called like ours; each
would leave a canary. The conversion runs in a process that reports what it opens and executes.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from corruptions import CONFIG, edit_json, write_sound

from bailing_jax.errors import EXIT_OK, EXIT_USAGE

ROOT = Path(__file__).resolve().parents[2]
PICKLES = ("pytorch_model.bin", "consolidated.00.pth", "training_args.pt", "scaler.pkl")
MODULES = ("modeling_x.py", "configuration_x.py", "torch.py", "json.py", "sitecustomize.py")
# Modules that run what they read, beside those tests/test_imports.py forbids.
RUNNERS = (
    "pickle", "_pickle", "pickletools", "cloudpickle", "dill", "joblib", "shelve", "marshal",
    "torch", "transformers", "runpy", "code", "imp",
)  # fmt: skip

# What runs in the child: reports, as JSON, what it did with the folder's pickles and modules.
WATCH = """
import json, os, sys

source, prelude, *arguments = sys.argv[1:]
seen = []

def watch(event, args):
    if event.startswith("pickle."):
        seen.append(event)
    name = args[0] if args else None
    if event == "exec":
        name = name.co_filename
    if event in ("open", "exec", "compile") and isinstance(name, (str, bytes)):
        name = os.path.realpath(os.fsdecode(name))
        if name.startswith(source + os.sep) and not name.endswith((".json", ".safetensors", ".md")):
            seen.append(f"{event} {name}")

sys.addaudithook(watch)
exec(prelude)
from convert.__main__ import main
code = main(arguments)
print(json.dumps({"code": code, "seen": seen, "modules": sorted(sys.modules)}))
"""


class Trap:
    """A pickle that writes to a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.canary, "unpickled")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def trapped(tmp_path: Path, canary: Path) -> Path:
    """A sound checkpoint with traps beside its weights."""
    folder = tmp_path / "in" / "model"
    write_sound(folder, "v2")
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Trap(canary)))
    for name in MODULES:
        (folder / name).write_text(f"open({str(canary)!r}, 'w').write('imported')\n")
    code = {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    edit_json(folder / CONFIG, lambda config: config.update(auto_map=code, trust_remote_code=True))
    return folder


def watched(source: Path, output: Path, prelude: str = "") -> dict[str, Any]:
    """Convert in a child; what it did."""
    command = ["hf-to-native", str(source), str(output), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", WATCH, os.path.realpath(source), prelude, *command],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def test_the_traps_are_live(trapped: Path, canary: Path) -> None:
    for name in PICKLES:
        pickle.loads((trapped / name).read_bytes())
        assert canary.read_text() == "unpickled"
        canary.unlink()
    for name in MODULES:
        runpy.run_path(str(trapped / name))
        assert canary.read_text() == "imported"
        canary.unlink()


@pytest.mark.parametrize(
    ("prelude", "seen"),
    [
        ("import pickle; pickle.load(open(f'{source}/scaler.pkl', 'rb'))", "pickle.find_class"),
        ("open(f'{source}/pytorch_model.bin', 'rb')", "open"),
        ("sys.path.insert(0, source); import modeling_x", "modeling_x.py"),
    ],
)
def test_the_watch_sees_what_is_run(trapped: Path, tmp_path: Path, prelude: str, seen: str) -> None:
    assert any(seen in event for event in watched(trapped, tmp_path / "native", prelude)["seen"])


def test_s08_a_conversion_runs_nothing_of_the_folder(
    trapped: Path, tmp_path: Path, canary: Path
) -> None:
    done = watched(trapped, tmp_path / "native")
    assert (done["code"], done["seen"]) == (EXIT_OK, [])
    assert not canary.exists()
    assert {"torch", "transformers", "modeling_x"} & set(done["modules"]) == set()
    copied = {path.name for path in (tmp_path / "native").iterdir()}
    assert not copied & {*PICKLES, *MODULES}


def test_s08_a_folder_of_pickles_is_refused_unopened(
    trapped: Path, tmp_path: Path, canary: Path
) -> None:
    for path in (*trapped.glob("*.safetensors"), *trapped.glob("*.index.json")):
        path.unlink()
    done = watched(trapped, tmp_path / "native")
    assert (done["code"], done["seen"]) == (EXIT_USAGE, [])
    assert not canary.exists()
    assert not (tmp_path / "native").exists()


def runs_code(tree: ast.AST) -> list[str]:
    """What a module imports or calls to run what it reads."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in RUNNERS]
        elif isinstance(node, ast.ImportFrom):
            found += [str(node.module)] * ((node.module or "").split(".")[0] in RUNNERS)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            # numpy's own files may hold pickles.
            is_runner = called in ("eval", "exec", "compile", "__import__", "np.load", "numpy.load")
            found += [called] * is_runner
    return found


def test_s08_no_module_of_the_converter_can_run_what_it_reads() -> None:
    modules = sorted((ROOT / "convert").glob("*.py"))
    assert len(modules) > 10
    found = {m.name: runs_code(ast.parse(m.read_text(encoding="utf-8"))) for m in modules}
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "def f():\n    from torch.serialization import load", "np.load(path)",
        "exec(text)", "import importlib, marshal", "value = eval('1')", "from _pickle import loads",
    ],
)  # fmt: skip
def test_what_runs_code_is_recognised(text: str) -> None:
    assert runs_code(ast.parse(text)) != []
    assert runs_code(ast.parse("import json, re\nre.compile('x')\njson.load(file)")) == []
