"""What scripts/gpu_check.py reads from a profile, counts as bytes and writes as a table."""

from __future__ import annotations

import gpu_check
import gpu_check_times
import jax
import pytest
from lightning_shapes import DECODES, PREFILLS, RAGGED, UNTUNED, Decode, Prefill, even

PROFILE = """
planes { name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "kernel" } }
  event_metadata { key: 2 value { id: 2 name: "copy" } }
  lines { name: "Stream #13(Compute)"
    events { metadata_id: 1 duration_ps: 2500000 }
    events { metadata_id: 1 offset_ps: 3000000 duration_ps: 3500000 }
    events { metadata_id: 2 offset_ps: 9000000 duration_ps: 1000000 } }
  lines { name: "XLA Ops" events { metadata_id: 1 duration_ps: 9000000 } } }
planes { name: "/host:CPU" lines { name: "Stream" events { duration_ps: 1 } } }
"""


def test_times_are_those_of_the_streams(tmp_path):
    """In microseconds, each run of a kernel once."""
    profile = jax.profiler.ProfileData.text_proto_to_serialized_xspace(PROFILE)
    (tmp_path / "a.xplane.pb").write_bytes(profile)
    assert gpu_check_times.kernel_times(tmp_path) == {"kernel": [2.5, 3.5], "copy": [1.0]}


def test_shapes_have_names_of_their_own_and_known_sizes():
    shapes = (*PREFILLS, *UNTUNED, *DECODES)
    assert len({shape.name for shape in shapes}) == len(shapes)
    assert even(10, 3) == (3, 3, 4)
    assert {n % 64 for n in RAGGED} >= {1, 5, 6}
    prefill = Prefill("p", 3, (5, 7), head_dim=64)
    assert prefill.bytes_moved() == 4 * 12 * 3 * 64 * 2 + 2 * 2 * 3 * 64 * 64 * 4
    decode = Decode("d", 5, 3, state_dtype="bfloat16", head_dim=64)
    assert decode.bytes_moved() == 5 * 3 * (2 * 64 * 64 * 2 + 4 * 64 * 2)


def test_every_tuning_names_a_shape():
    assert {name for name, _ in gpu_check.TUNINGS} <= set(gpu_check.BY_NAME)


@pytest.mark.parametrize("extra", [{"gpu_us": 123.4, "percent_of_floor": 50.0}, {"error": "no"}])
def test_the_table_has_a_cell_for_each_column(extra):
    row = {"kind": "decode", "shape": "H16 B1", "must_us": 2.7, "wall_us": 4.0, **extra}
    report = {
        "about": gpu_check.about(dry=True),
        "ceilings": {"copy_tb_s": 2.9, "matmul_tflop_s": 700.0},
        "rows": [row],
    }
    table = [x for x in gpu_check.as_markdown(report).splitlines() if x.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert "DRY" in gpu_check.as_markdown(report)
