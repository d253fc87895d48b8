"""python -m bailing_jax.plan: text, JSON, exit codes, and mistakes told in a line or two."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import LATENT, write_tiny_model

from bailing_jax.errors import EXIT_DOES_NOT_FIT, EXIT_OK, EXIT_USAGE
from bailing_jax.plan import main
from bailing_jax.presets import preset_names

Capture = pytest.CaptureFixture[str]
SMALL = ("--model", "ring-mini-linear-2.0", "--topology", "v6e:2x2")


def plan(capsys: Capture, *args: object, code: int = EXIT_OK) -> str:
    assert main([str(arg) for arg in args]) == code
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_text_says_units_and_that_nothing_ran(capsys: Capture) -> None:
    out = plan(capsys, *SMALL)
    assert "Bounds from published peak rates, not measurements: nothing was run." in out
    assert "16.423 B parameters, 1.601 B active a token" in out
    assert "v6e:2x2: 4 chips, 4 devices, 1 host; 0.9 of 31.25 GiB a device" in out
    assert re.search(r"decode +at most +[\d,]+ tokens/s", out)
    assert re.search(r"first token after at least [\d.,]+ ms", out)
    for what in ("weights", "recurrent state", "pages", "temporaries", "total", "allowed"):
        assert re.search(rf"^  {what} +\d+\.\d{{3}}", out, re.M), what
    assert re.search(r"^fits\. The smallest v6e slice with room is v6e:", out, re.M)
    assert max(map(len, out.splitlines())) < 240


def test_json_agrees_with_text(capsys: Capture) -> None:
    out = plan(capsys, *SMALL)
    found = json.loads(plan(capsys, *SMALL, "--json"))
    chosen = found["chosen"]
    mesh = ",".join(f"{axis}={size}" for axis, size in chosen["mesh"].items())
    assert f"mesh {mesh}:" in out
    assert f"{chosen['decode']['tokens_per_s_bound']:,.0f} tokens/s" in out
    assert sum(chosen["bytes_a_device"].values()) == chosen["total_bytes_a_device"]
    assert chosen["bytes_a_chip"] == chosen["bytes_a_device"]
    assert found["meshes"][0] == chosen
    assert found["fits"] is True
    assert found["compiled"] == []
    assert "not measurements" in found["remark"]
    assert found["in_force"]["max_num_seqs"] == 32
    assert found["in_force"]["max_model_len"] == 8192


def test_a_chip_of_two_devices(capsys: Capture) -> None:
    args = ("--model", "ring-mini-linear-2.0", "--topology", "tpu7x:2x2x1")
    found = json.loads(plan(capsys, *args, "--json"))
    assert (found["topology"]["chips"], found["topology"]["devices"]) == (4, 8)
    chosen = found["chosen"]
    assert {k: 2 * v for k, v in chosen["bytes_a_device"].items()} == chosen["bytes_a_chip"]
    assert re.search(r"GiB +a device +a chip", plan(capsys, *args))


def test_a_mesh_of_ones_own(capsys: Capture) -> None:
    out = plan(capsys, *SMALL, "--mesh", "data=1,expert=4,tensor=1")
    assert "mesh data=1,expert=4,tensor=1: 4 shards of 1 device, 8 slots and 1024 pages" in out


def test_exit_3_names_the_smallest_slice(capsys: Capture) -> None:
    args = ("--model", "ling-2.6-1t", "--topology", "v6e:8x8")
    out = plan(capsys, *args, code=EXIT_DOES_NOT_FIT)
    assert re.search(
        r"^does not fit\. The smallest v6e slice with room is v6e:(16x16|8x16) \(\d+ chips",
        out,
        re.M,
    )
    found = json.loads(plan(capsys, *args, "--json", code=EXIT_DOES_NOT_FIT))
    assert found["fits"] is False
    assert found["smallest_slice"]["fits"] is True
    assert found["smallest_slice"]["chips"] > 64


def test_another_mesh_would_fit(capsys: Capture) -> None:
    out = plan(capsys, *SMALL, "--mesh", "data=4", code=EXIT_DOES_NOT_FIT)
    assert re.search(r"^does not fit\. Mesh data=1,\S+ does\. ", out, re.M)


def test_nothing_has_room(capsys: Capture) -> None:
    load = ("--max-num-seqs", 10**7, "--max-model-len", 131072)
    out = plan(capsys, *SMALL, *load, code=EXIT_DOES_NOT_FIT)
    assert "does not fit. No v6e slice has room for this load" in out
    found = json.loads(plan(capsys, *SMALL, *load, "--json", code=EXIT_DOES_NOT_FIT))
    assert found["smallest_slice"] is None


def test_a_folder_needs_only_its_config(capsys: Capture, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", LATENT)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    out = plan(capsys, "--model", folder, "--topology", "v5e:1x1", "--max-model-len", 64)
    assert f"{folder}: config.json of a folder" in out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--topology", "v9:2x2"), "--topology = 'v9:2x2'; the chips are v5e"),
        (("--topology", "v6e:3x5"), "--topology = 'v6e:3x5'; the slices of v6e are"),
        (("--topology", "h100:3"), "--topology = 'h100:3'; the numbers of GPUs"),
        (("--mesh", "tensor=3"), "--mesh = 'tensor=3' has 3 devices, v6e:2x2 has 4"),
        (("--mesh", "depth=4"), "--mesh = 'depth=4'; allowed: data=D,expert=E,tensor=T"),
        (("--mesh", "expert=x"), "--mesh = 'expert=x'; allowed: "),
        (("--model", "nowhere"), "nowhere: no such folder, and no preset of that name"),
        (("--model", "ling-lite"), "'BailingMoeForCausalLM'; allowed: "),
        (("--model", "ling-3.0-flash"), "'BailingMoeV3ForCausalLM'; allowed: "),
        (("--hf-overrides", "{"), "--hf-overrides: not JSON"),
        (("--hf-overrides", '{"nonsense": 1}'), "--hf-overrides: unknown name nonsense"),
        (("--hf-overrides", '{"vocab_size": 7}', "--mesh", "tensor=4"), "--mesh: tensor=4 does"),
        (("--max-num-seqs", "0"), "--max-num-seqs = 0; allowed: "),
        (("--max-model-len", "999999"), "--max-model-len = 999999; allowed: up to 131072"),
        (("--prompt-tokens", "0"), "--prompt-tokens = 0; allowed: "),
        (("--weight-dtype", "int4"), "--weight-dtype = 'int4'; allowed: "),
        (("--state-dtype", "int8"), "--state-dtype = 'int8'; allowed: "),
        (("--memory-fraction", "2"), "--memory-fraction = 2.0; allowed: "),
        (("--topology", "h100:8", "--compile"), "--compile: h100:8 can't be compiled for"),
    ],
)  # fmt: skip
def test_mistakes(capsys: Capture, args: tuple[str, ...], says: str) -> None:
    assert main([*SMALL, *args]) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert len(lines) <= 2
    assert max(map(len, lines)) < 300
    assert "Traceback" not in err
    assert len(lines) == 2 or "; allowed: " in err or "not JSON" in err


def test_compile_without_libtpu(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert main([*SMALL, "--compile"]) == EXIT_USAGE
    err = capsys.readouterr().err
    assert "error: --compile: libtpu, which holds the compiler for TPUs, is not installed" in err
    assert "pip install -e '.[plan]'" in err


def test_a_folder_without_config(capsys: Capture, tmp_path: Path) -> None:
    assert main(["--model", str(tmp_path), "--topology", "v6e:2x2"]) == EXIT_USAGE
    assert "no config.json" in capsys.readouterr().err


def test_every_supported_preset_is_planned(capsys: Capture) -> None:
    for name in preset_names():
        if "3.0" in name or name in ("ling-lite", "ling-plus"):
            continue
        for where in ("v5p:2x2x1", "h200:8"):
            args = ["--model", name, "--topology", where, "--json"]
            assert main(args) in (EXIT_OK, EXIT_DOES_NOT_FIT)
            assert json.loads(capsys.readouterr().out)["parameters"]["total"] > 10**10


def test_a_plan_needs_no_jax() -> None:
    """Nothing but --compile imports it, so no device is looked for."""
    code = (
        "import sys; from bailing_jax.plan import main; "
        f"main({[*SMALL]!r}); print('jax' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stderr == "False\n"


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    command = f"{sys.executable} -m bailing_jax.plan {' '.join(SMALL)} | head -n 1"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) == 1
