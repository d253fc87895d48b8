"""A trillion parameters on 64 hosts of four devices: a host reads what its own devices hold.

The checkpoint is a release's in names and shapes, with holes for data (`make_sparse_checkpoint`).
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bailing_jax import sharding
from bailing_jax.checkpoint.load import match_released
from bailing_jax.config import ModelConfig
from bailing_jax.mesh import MeshShape, check_mesh
from bailing_jax.params import Param, describe
from convert.source import open_source

ROOT = Path(__file__).resolve().parents[2]
MESH = MeshShape(1, 32, 8)
HOSTS = 64
BFLOAT16 = 2


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def boxes_of_host(config: ModelConfig, param: Param, host: int) -> set[sharding.Box]:
    """What its devices hold of a parameter; devices are numbered through, slowest axis first."""
    sizes = sharding.axis_sizes(config, MESH)
    places = list(itertools.product(*map(range, sizes.values())))
    each = len(places) // HOSTS
    found: set[sharding.Box] = set()
    for place in places[host * each : (host + 1) * each]:
        position = dict(zip(sharding.AXES, place, strict=True))
        found.update(sharding.regions(config, param, MESH, position))
    return found


def elements(box: sharding.Box) -> int:
    return math.prod(stop - start for start, stop in box)


def mapped_bytes(folder: Path) -> int:
    """Bytes of the folder's files that this process has mapped and touched."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what is mapped")
def test_a_host_of_64_reads_its_share_of_a_trillion(tmp_path: Path) -> None:
    sparse = script("make_sparse_checkpoint")
    folder = tmp_path / "sparse"
    sparse.write_checkpoint(folder, sparse.read_config(sparse.DEFAULT_PRESET, None))
    with open_source(folder) as source:
        config = ModelConfig.from_hf(source.config)
        check_mesh(config, MESH)
        weights = match_released(config, source)
        assert weights.num_bytes > 1.9e12
        experts = 0
        for param in describe(config):
            if ".experts." in param.path:
                share = sum(map(elements, boxes_of_host(config, param, 17)))
                assert share * HOSTS == param.size
                experts += share
        assert experts * BFLOAT16 < 32e9
        host = sum(
            elements(box)
            for param in describe(config)
            for box in boxes_of_host(config, param, 17)
        )
        # Attention, dense layers and vocabulary are divided among the eight devices of a shard,
        # of which a host has four; the rest is norms, routers and latents.
        others = weights.num_bytes / BFLOAT16 - HOSTS * experts
        assert others / 2 <= host - experts < 0.6 * others
        # One parameter for real: of 256 experts the four of this host are touched.
        param = next(p for p in describe(config) if p.path.endswith("experts.gate_proj.weight"))
        before, wanted = mapped_bytes(folder), 0
        for box in boxes_of_host(config, param, 17):
            part, num_bytes = weights.read_box(param, box, np.dtype("float32"))
            assert part.shape == tuple(stop - start for start, stop in box)
            assert num_bytes == elements(box) * BFLOAT16
            wanted += num_bytes
        touched = mapped_bytes(folder) - before
        assert wanted == 4 * config.hidden_size * config.moe.expert_width * BFLOAT16
        assert wanted <= touched < 1.1 * wanted + 2**20
