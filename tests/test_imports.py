"""The import rules: who may know whom, read off the source without running it.

A rule is a function from a `Project` to the list of its violations. "At import" follows what a
plain `import` executes, through project modules and their parent packages; imports inside
functions and under TYPE_CHECKING do not count there, but do count where a rule says "anywhere".
A rule about a file that does not exist fails. The last part plants violations in a scratch tree
and sees each rule report them; the `--help` rule is measured on real processes.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("bailing_jax", "pallas_kernels", "convert")
# What brings a device runtime with it; the submodules of safetensors import their framework.
DEVICE_LIBRARIES = (
    "jax", "jaxlib", "flax", "optax", "orbax", "chex", "safetensors.flax", "safetensors.torch",
)  # fmt: skip
FORBIDDEN = ("torch", "transformers", "pickle")
KERNEL_LIBRARIES = ("jax", "numpy", "pallas_kernels")
CONVERT_MAY_USE = tuple(f"bailing_jax.{n}" for n in ("config", "layer_plan", "params", "errors"))
# `--format orbax` cannot do without Orbax: this file may import it, but only inside functions.
ORBAX_EXPORT = "convert.orbax_export"
COMMANDS = tuple(
    f"bailing_jax.{n}" for n in ("generate", "serve", "plan", "train", "evaluate", "selftest")
)
DEVICE_FREE = (
    *(f"bailing_jax.{name}" for name in ("config", "layer_plan", "params", "presets", "errors")),
    *(f"bailing_jax.{name}" for name in ("connection", "group", "agreement", "distributed")),
    *(f"bailing_jax.{name}" for name in ("mesh", "sharding", "planning.ranking")),
    "bailing_jax.planning.report",
    *(
        f"bailing_jax.engine.{name}"
        for name in ("scheduler", "slots", "pages", "stop", "invariants", "debug")
    ),
)
FOLDERS = (
    *PACKAGES,
    *(f"bailing_jax.{n}" for n in ("layers", "engine", "text", "checkpoint", "tasks", "planning")),
)
TYPE_CHECKING = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
REQUIRED = (
    *DEVICE_FREE,
    *(f"bailing_jax.{n}" for n in ("batch", "state", "model", "llm", "generate", "runtime")),
    *(f"bailing_jax.engine.{name}" for name in ("sampler", "engine")),
    *(f"pallas_kernels.{name}" for name in ("dispatch", "compat")),
)


@dataclass(frozen=True)
class Import:
    """One imported module, by absolute name; `from a import b` names a.b if b is a module."""

    target: str
    line: int
    runs_at_import: bool

    def is_in(self, packages: tuple[str, ...]) -> bool:
        """Whether the target is one of the packages or inside one."""
        return any(f"{self.target}.".startswith(f"{package}.") for package in packages)


class Project:
    """The modules of the three packages under `root`, by dotted name."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def files(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for package in PACKAGES:
            for path in sorted((self.root / package).rglob("*.py")):
                parts = path.relative_to(self.root).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return found

    @cached_property
    def imports(self) -> dict[str, list[Import]]:
        return {name: list(self._imports_of(name)) for name in self.files}

    def inside(self, *packages: str) -> Iterator[tuple[str, list[Import]]]:
        """The modules of a package (or one module), never none of them."""
        names = [n for n in self.files if any(f"{n}.".startswith(f"{p}.") for p in packages)]
        assert names, f"no source file for {packages} under {self.root}"
        return ((name, self.imports[name]) for name in names)

    def executed_by(self, name: str) -> dict[str, str]:
        """Every module and library that importing `name` imports, each with who asked for it."""
        assert name in self.files, f"{name} does not exist under {self.root}"
        asked = dict.fromkeys(_with_parents(name), "import")
        pending = [module for module in asked if module in self.files]
        while pending:
            module = pending.pop()
            for item in self.imports[module]:
                for target in _with_parents(item.target) if item.runs_at_import else ():
                    if target not in asked:
                        asked[target] = f"{module}:{item.line}"
                        pending += [target] if target in self.files else []
        return asked

    def _imports_of(self, name: str) -> Iterator[Import]:
        path = self.files[name]
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for node, runs in _walk(tree, runs=True):
            for target in self._targets(node, package):
                yield Import(target, getattr(node, "lineno", 0), runs)

    def _targets(self, node: ast.AST, package: str) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = (f"{base}.{alias.name}" for alias in node.names)
            return [n if n in self.files or not self._is_ours(base) else base for n in names]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")[2]
            argument = node.args[0] if node.args else None
            if called in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                return [str(argument.value)]
        return []

    def _is_ours(self, name: str) -> bool:
        return name.partition(".")[0] in PACKAGES


def _walk(node: ast.AST, *, runs: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes, each with whether importing the module executes it."""
    for child in ast.iter_child_nodes(node):
        yield child, runs
        if isinstance(child, ast.If) and ast.unparse(child.test) in TYPE_CHECKING:
            for statement in child.body:
                yield statement, False
                yield from _walk(statement, runs=False)
            for statement in child.orelse:
                yield statement, runs
                yield from _walk(statement, runs=runs)
            continue
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(child, runs=runs and not is_function)


def _with_parents(name: str) -> list[str]:
    """`a.b.c` with the packages Python imports before it: a, a.b, a.b.c."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def required_files_exist(project: Project) -> list[str]:
    missing = [name for name in REQUIRED if name not in project.files]
    empty = [f for f in FOLDERS if not any(n.startswith(f"{f}.") for n in project.files)]
    return [f"missing: {name}" for name in missing] + [f"no module in {f}" for f in empty]


def folders_are_packages(project: Project) -> list[str]:
    """The wheel takes folders with an __init__.py only; a test folder with one hides a package."""
    wanted = sorted({path.parent / "__init__.py" for path in project.files.values()})
    hiding = [project.root / "tests" / package / "__init__.py" for package in PACKAGES]
    found = [f"missing: {path}" for path in wanted if not path.exists()]
    return found + [f"hides the package: {path}" for path in hiding if path.exists()]


def kernels_know_only_jax_and_numpy(project: Project) -> list[str]:
    def allowed(item: Import) -> bool:
        is_standard = item.target.partition(".")[0] in sys.stdlib_module_names
        return is_standard or item.is_in(KERNEL_LIBRARIES)

    return _violations(project.inside("pallas_kernels"), lambda item: not allowed(item))


def convert_knows_only_the_description(project: Project) -> list[str]:
    def wrong(item: Import) -> bool:
        is_foreign = item.is_in(("bailing_jax", "pallas_kernels")) and not (
            item.is_in(CONVERT_MAY_USE)
        )
        return is_foreign or item.is_in(DEVICE_LIBRARIES)

    def checked(name: str, imports: list[Import]) -> list[Import]:
        exempt = ("orbax",) if name == ORBAX_EXPORT else ()
        return [item for item in imports if item.runs_at_import or not item.is_in(exempt)]

    modules = project.inside("convert")
    found = _violations(((name, checked(name, imports)) for name, imports in modules), wrong)
    return found + _devices_reached(project, "convert")


def ledger_and_text_need_no_device(project: Project) -> list[str]:
    return _devices_reached(project, *DEVICE_FREE, "bailing_jax.text", "bailing_jax.tasks")


def nobody_imports_a_command(project: Project) -> list[str]:
    assert COMMANDS[0] in project.files, f"{COMMANDS[0]} does not exist"
    return _violations(project.inside(*PACKAGES), lambda item: item.is_in(COMMANDS))


def forbidden_libraries_are_nowhere(project: Project) -> list[str]:
    return _violations(project.inside(*PACKAGES), lambda item: item.is_in(FORBIDDEN))


def _violations(
    modules: Iterator[tuple[str, list[Import]]], is_wrong: Callable[[Import], bool]
) -> list[str]:
    return [
        f"{name}:{item.line} imports {item.target}"
        for name, imports in modules
        for item in imports
        if is_wrong(item)
    ]


def _devices_reached(project: Project, *packages: str) -> list[str]:
    # Each named one must exist: a renamed file would otherwise leave its rule without a subject.
    names = [name for package in packages for name, _ in project.inside(package)]
    return [
        f"importing {name} imports {target} ({asker})"
        for name in names
        for target, asker in project.executed_by(name).items()
        if target in DEVICE_LIBRARIES
    ]


RULES = (
    required_files_exist,
    folders_are_packages,
    kernels_know_only_jax_and_numpy,
    convert_knows_only_the_description,
    ledger_and_text_need_no_device,
    nobody_imports_a_command,
    forbidden_libraries_are_nowhere,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_import_rule(rule: Callable[[Project], list[str]]) -> None:
    assert rule(Project(ROOT)) == []


# The walker itself: (rule, file, its text, what the report must name).
PLANTED = (
    (required_files_exist, "bailing_jax/llm.py", None, "bailing_jax.llm"),
    (folders_are_packages, "bailing_jax/loose/module.py", "", "loose"),
    (folders_are_packages, "tests/convert/__init__.py", "", "tests"),
    (kernels_know_only_jax_and_numpy, "pallas_kernels/tiles.py", "import scipy", "scipy"),
    (kernels_know_only_jax_and_numpy, "pallas_kernels/tiles.py", "import numpyish", "numpyish"),
    (kernels_know_only_jax_and_numpy, "pallas_kernels/tiles.py",
     "def f():\n    from bailing_jax import errors", "bailing_jax.errors"),
    (convert_knows_only_the_description, "convert/plan.py",
     "from bailing_jax import batch", "bailing_jax.batch"),
    (convert_knows_only_the_description, "convert/plan.py", "from bailing_jax import LLM",
     "imports bailing_jax"),
    (convert_knows_only_the_description, "convert/plan.py",
     "def f():\n    import jax.numpy as jnp", "jax.numpy"),
    (convert_knows_only_the_description, "bailing_jax/errors.py", "import jax", "convert"),
    (convert_knows_only_the_description, "convert/plan.py",
     "def f():\n    import orbax.checkpoint", "convert.plan:2 imports orbax"),
    (convert_knows_only_the_description, "convert/orbax_export.py",
     "import orbax.checkpoint", "convert.orbax_export:1 imports orbax"),
    (convert_knows_only_the_description, "convert/orbax_export.py",
     "def f():\n    import jax", "convert.orbax_export:2 imports jax"),
    (ledger_and_text_need_no_device, "bailing_jax/__init__.py",
     "from bailing_jax.model import Model", "jax"),
    (ledger_and_text_need_no_device, "bailing_jax/text/chat.py",
     "class A:\n    try:\n        import flax.nnx\n    except ImportError:\n        pass", "flax"),
    (ledger_and_text_need_no_device, "bailing_jax/engine/slots.py",
     "from ..model import Model", "bailing_jax.engine.slots"),
    (ledger_and_text_need_no_device, "bailing_jax/engine/pages.py",
     "import importlib\nimportlib.import_module('jax')", "jax"),
    (ledger_and_text_need_no_device, "bailing_jax/tasks/recall.py", "import jax", "jax"),
    (nobody_imports_a_command, "bailing_jax/llm.py",
     "def f():\n    from . import generate", "bailing_jax.generate"),
    (nobody_imports_a_command, "convert/plan.py", "import bailing_jax.serve", "serve"),
    (forbidden_libraries_are_nowhere, "bailing_jax/model.py",
     "def f():\n    import torch.nn", "torch.nn"),
    (forbidden_libraries_are_nowhere, "convert/plan.py", "from pickle import loads", "pickle"),
    (forbidden_libraries_are_nowhere, "pallas_kernels/compat.py",
     "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers",
     "transformers"),
)  # fmt: skip


@pytest.fixture
def clean_tree(tmp_path: Path) -> Path:
    """A project of all required files that keeps every rule, with what looks like a breach."""
    names = [f"{folder}.__init__" for folder in FOLDERS] + [f"{f}.module" for f in FOLDERS]
    for name in (*names, *REQUIRED):
        path = tmp_path / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
    (tmp_path / "bailing_jax/text/chat.py").write_text("def f():\n    import jax\n")
    (tmp_path / "bailing_jax/model.py").write_text("import jax\nclass Model: ...\n")
    (tmp_path / "bailing_jax/params.py").write_text(
        "from typing import TYPE_CHECKING\nimport numpy\n"
        "if TYPE_CHECKING:\n    import jax\nelse:\n    import math\n"
    )
    (tmp_path / "convert/plan.py").write_text("from bailing_jax import params, errors\n")
    (tmp_path / "convert/orbax_export.py").write_text("def f():\n    import orbax.checkpoint\n")
    (tmp_path / "pallas_kernels/compat.py").write_text(
        "import functools\nfrom jax.experimental import pallas as pl\nfrom . import dispatch\n"
    )
    return tmp_path


def test_rules_pass_a_clean_tree(clean_tree: Path) -> None:
    for rule in RULES:
        assert rule(Project(clean_tree)) == []


@pytest.mark.parametrize(("rule", "file", "text", "named"), PLANTED)
def test_planted_violation_is_reported(
    clean_tree: Path,
    rule: Callable[[Project], list[str]],
    file: str,
    text: str | None,
    named: str,
) -> None:
    path = clean_tree / file
    if text is None:
        path.unlink()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert any(named in line for line in rule(Project(clean_tree)))


@pytest.mark.parametrize("rule", RULES[2:], ids=lambda rule: rule.__name__)
def test_rule_without_its_files_fails(tmp_path: Path, rule: Callable[[Project], object]) -> None:
    with pytest.raises(AssertionError):
        rule(Project(tmp_path))


def modules_imported(*arguments: str) -> set[str]:
    """The modules a Python process imports, as `-X importtime` reports them."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    said = [line for line in lines if not line.startswith("import time:")]
    assert done.returncode == 0, said
    return {line.rpartition("|")[2].strip() for line in lines if line not in said}


def test_imported_modules_are_seen() -> None:
    assert {"json", "importlib.metadata"} <= modules_imported(
        "-c", "import json, importlib.metadata"
    )


# The first command always; the others as soon as they exist.
HELPFUL = [COMMANDS[0], *(name for name in COMMANDS[1:] if name in Project(ROOT).files)]
if "convert.__main__" in Project(ROOT).files:
    HELPFUL.append("convert")


@pytest.mark.parametrize("command", HELPFUL)
def test_help_starts_no_library(command: str) -> None:
    # Python's own start imports some of these where an editable install hooks the import system.
    imported = modules_imported("-m", command, "--help") - modules_imported("-c", "pass")
    assert "argparse" in imported
    heavy = {name for name in imported if name.partition(".")[0] in ("jax", "jaxlib", "numpy")}
    assert heavy | (imported & {"importlib.metadata"}) == set()
