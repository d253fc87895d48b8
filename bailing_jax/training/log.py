"""What a run leaves to read: a JSON line a step interval, a progress line, the loss curve.

The log is cut back to the checkpoint when a run goes on from it, so that every step is there
once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
CURVE = "loss.png"


class Log:
    """The JSONL log of a run."""

    def __init__(self, folder: Path, from_step: int) -> None:
        """Open the log, keeping entries up to `from_step`."""
        self._path = folder / LOG
        kept = [entry for entry in read(folder) if entry["step"] <= from_step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")
        temporary.replace(self._path)

    def add(self, entry: dict[str, Any]) -> None:
        """Append one entry."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run's log; a last line cut short is left out."""
    path = folder / LOG
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def progress_line(entry: dict[str, Any], steps: int, seconds_left: float) -> str:
    """One line for a person, under 100 columns for two sources."""
    sources = "  ".join(
        f"{Path(name).name} {one['loss']:.3f} ({one['accuracy']:.1%})"
        for name, one in entry["sources"].items()
    )
    left = f"{seconds_left / 60:.0f} min" if seconds_left >= 90 else f"{seconds_left:.0f} s"
    return (
        f"step {entry['step']}/{steps}  {sources}  grad {entry['grad_norm']:.2f}  "
        f"{entry['tokens_per_s'] / 1e3:,.1f}k tok/s  {left} left"
    )


def draw_curve(folder: Path, title: str) -> Path | None:
    """Draw the loss of every source against the step, or None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = read(folder)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name in entries[-1]["sources"] if entries else ():
        points = [(e["step"], e["sources"][name]["loss"]) for e in entries]
        axes.plot(*zip(*points, strict=True), label=Path(name).name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss, nats a weighted token", yscale="log", title=title)
    axes.grid(visible=True, which="both", alpha=0.3)
    if entries:
        axes.legend()
    path = folder / CURVE
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
