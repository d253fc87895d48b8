"""Turn the rounds of the CPU comparison into a record, a Markdown table and a plot.

The record is what `bench_cpu.py` prints: each engine's rounds, median and spread, ratios between
engines, tokens in common, and the decode ceiling the machine's memory sets. Everything here is a
function of the record; it starts no engine. matplotlib is imported only by `write_plot`.
"""

from __future__ import annotations

import statistics
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any]
Rounds: TypeAlias = dict[str, list[Record]]

SPREAD_FIGURES: tuple[str, ...] = (
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "decode_step_ms_median",
    "load_s",
    "warmup_s",
    "peak_memory_mib",
)
# The same in every round, so the record has it once.
ONCE_AN_ENGINE: tuple[str, ...] = ("tokens", "versions", "blas")
TITLES: dict[str, str] = {
    "ours": "bailing-jax",
    "mlx": "mlx-lm (as installed)",
    "mlx-blas": "mlx-lm + preloaded BLAS",
}


def spread(values: list[float]) -> Record:
    """Median, extremes and every value."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "rounds": values,
    }


def summarise(rounds: Rounds, decode_ceiling: float) -> Record:
    """Return the engines' medians and spread, the ratios between them, and tokens in common."""
    engines = {name: _summarise_engine(results, decode_ceiling) for name, results in rounds.items()}
    pairs = list(combinations(engines, 2))
    return {
        "engines": engines,
        "ratios": {f"{a} / {b}": _ratios(engines[a], engines[b]) for a, b in pairs},
        "agreement": {
            f"{a} = {b}": agreement(rounds[a][0]["tokens"], rounds[b][0]["tokens"])
            for a, b in pairs
        },
    }


def _summarise_engine(results: list[Record], decode_ceiling: float) -> Record:
    figures: Record = {
        name: spread([result[name] for result in results]) for name in SPREAD_FIGURES
    }
    decode = figures["decode_tokens_per_s"]["median"]
    return figures | {
        "percent_of_decode_ceiling": 100 * decode / decode_ceiling,
        "same_tokens_every_round": all(r["tokens"] == results[0]["tokens"] for r in results),
        "versions": results[0]["versions"],
        "blas": results[0]["blas"],
        "tokens": results[0]["tokens"],
        "rounds": [{k: v for k, v in r.items() if k not in ONCE_AN_ENGINE} for r in results],
    }


def _ratios(a: Record, b: Record) -> dict[str, float]:
    names = ("prefill_tokens_per_s", "decode_tokens_per_s")
    return {name.split("_")[0]: a[name]["median"] / b[name]["median"] for name in names}


def agreement(a: list[int], b: list[int]) -> dict[str, int]:
    """Count equal greedy tokens; once two differ, what follows answers different texts."""
    equal = [left == right for left, right in zip(a, b, strict=True)]
    prefix = equal.index(False) if False in equal else len(equal)
    return {"tokens": len(equal), "equal": sum(equal), "equal_before_first_difference": prefix}


def markdown(record: Record) -> str:
    """Write the record as a page."""
    shapes, roofline, host = record["shapes"], record["roofline"], record["host"]
    counts = shapes["parameters"]
    lines = [
        "# A LinearV2 model on the CPU",
        "",
        f"Random float32 checkpoint, {counts['total'] / 1e6:.1f} M parameters "
        f"({counts['active'] / 1e6:.1f} M active), batch 1, prompt of "
        f"{shapes['prompt_tokens']} tokens, then {shapes['decode_tokens']} tokens, greedy. "
        f"{host['cpu']}, {host['cores']} cores; commit {record['commit'][:12]}"
        f"{' with local changes' if record['uncommitted_changes'] else ''}, {record['date']}.",
        "",
        f"Median of {shapes['rounds']} rounds (lowest to highest), each in a fresh process, the "
        "engines taking turns.",
        "",
        "| engine | prefill, tokens/s | decode, tokens/s | of decode ceiling | load + warm-up, s "
        "| peak memory, MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(name, figures) for name, figures in record["engines"].items()]
    lines += ["", *_remarks(record), ""]
    lines += [
        f"Decode ceiling: {roofline['bytes_per_token'] / 1e6:.0f} MB of active weights a token "
        f"at {roofline['copy_bandwidth_gb_per_s']['median']:.1f} GB/s (median of numpy copies on "
        f"{host['cores']} threads in the same run, bytes read plus bytes written) = "
        f"{roofline['decode_ceiling_tokens_per_s']:.0f} tokens/s.",
        "",
        "Again: `" + record["command"] + "`",
        "",
    ]
    return "\n".join(lines)


def _row(name: str, figures: Record) -> str:
    start = figures["load_s"]["median"] + figures["warmup_s"]["median"]
    return (
        f"| {TITLES[name]} | {_cell(figures['prefill_tokens_per_s'])} "
        f"| {_cell(figures['decode_tokens_per_s'])} "
        f"| {figures['percent_of_decode_ceiling']:.0f} % | {start:.1f} "
        f"| {figures['peak_memory_mib']['median']:.0f} |"
    )


def _cell(figure: Record) -> str:
    return f"{figure['median']:.1f} ({figure['min']:.1f} to {figure['max']:.1f})"


def _remarks(record: Record) -> list[str]:
    lines = []
    for pair, ratio in record["ratios"].items():
        a, b = (TITLES[name] for name in pair.split(" / "))
        lines.append(
            f"- {a} against {b}: prefill {ratio['prefill']:.2f} times, "
            f"decode {ratio['decode']:.2f} times."
        )
    for pair, count in record["agreement"].items():
        a, b = (TITLES[name] for name in pair.split(" = "))
        lines.append(
            f"- {a} and {b} gave the same greedy token at {count['equal']} of {count['tokens']} "
            f"places, the first {count['equal_before_first_difference']} without a difference."
        )
    for name, figures in record["engines"].items():
        versions = ", ".join(f"{k} {v}" for k, v in figures["versions"].items())
        blas = f"; BLAS: {', '.join(figures['blas'])}" if figures["blas"] else ""
        lines.append(f"- {TITLES[name]}: {versions}{blas}.")
    return lines


def write_plot(record: Record, path: Path) -> None:
    """Draw prefill and decode side by side: bars for medians, dots for rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    engines = record["engines"]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 1.8 + 0.6 * len(engines)))
    for axis, name in zip(axes, ("prefill", "decode"), strict=True):
        for row, (engine, figures) in enumerate(engines.items()):
            speed = figures[f"{name}_tokens_per_s"]
            colour = "#1f6f8b" if engine == "ours" else "#b0b7bd"
            axis.barh(row, speed["median"], color=colour)
            axis.plot(speed["rounds"], [row] * len(speed["rounds"]), "o", color="#222", ms=4)
            axis.annotate(
                f"{speed['median']:.0f}", (speed["max"], row), (6, 0), va="center",
                textcoords="offset points",
            )  # fmt: skip
        axis.set_yticks(range(len(engines)), [TITLES[engine] for engine in engines])
        axis.invert_yaxis()
        axis.set_title(f"{name}, tokens/s")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    ceiling = record["roofline"]["decode_ceiling_tokens_per_s"]
    axes[1].axvline(ceiling, color="#c0392b", ls="--", lw=1, label="memory ceiling")
    axes[1].legend(loc="lower right", fontsize=8, framealpha=1)
    axes[1].set_yticklabels([])
    host, shapes = record["host"], record["shapes"]
    figure.suptitle(
        f"{host['cpu']}, {host['cores']} cores, float32, batch 1, prompt "
        f"{shapes['prompt_tokens']}, decode {shapes['decode_tokens']}: medians, dots are rounds",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
