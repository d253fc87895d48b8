"""The GPU table as a plot: each shape's time as a multiple of its floor, the peer's beside it.

    python scripts/gpu_check_plot.py docs/benchmarks/lightning_gpu.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw(report: dict[str, Any], path: Path) -> None:
    """One line a shape: times over the floor, on a logarithmic axis; 1 is the floor."""
    rows = [r for r in report["rows"] if r.get("floor_us") and r.get("gpu_us")]
    about = report["about"]
    figure = Figure(figsize=(9, 0.32 * len(rows) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(rows))
    ours = [row["gpu_us"] / row["floor_us"] for row in rows]
    axes.scatter(ours, places, label="these kernels", zorder=3)
    both = [(row, place) for row, place in zip(rows, places, strict=True) if "peer_gpu_us" in row]
    peers = [(row["peer_gpu_us"] / row["floor_us"], place) for row, place in both]
    if peers:
        axes.scatter(*zip(*peers, strict=True), marker="x", label=report["peer"], zorder=3)
    names = [" ".join([r["kind"], r["shape"], r.get("implementation", "")]).strip() for r in rows]
    axes.set(
        yticks=list(places), yticklabels=names, xscale="log",
        xlabel="time / floor (bytes that must move over the copy bandwidth of this run)",
        title=f"{about['device']}, jax {about['jax']}, {about['date']}",
    )  # fmt: skip
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.grid(visible=True, which="both", axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text(encoding="utf-8")), source.with_suffix(".png"))
