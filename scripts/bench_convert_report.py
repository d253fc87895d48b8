"""Turn the rounds of the converter's benchmark into a record and a Markdown page.

A step's speed is the checkpoint's bytes over its seconds, whatever it reads or writes of them, and
is divided by the copy's of the same round. Everything here is a function of the record.
"""

from __future__ import annotations

from bench_cpu_report import Record, Rounds, spread

STEPS = ("copy", "hf-to-native", "native-to-hf", "verify --quick", "verify --full")
TITLES = {
    "copy": "plain copy of the files",
    "hf-to-native": "hf-to-native",
    "native-to-hf": "native-to-hf",
    "verify --quick": "verify --quick",
    "verify --full": "verify --full (reads both folders)",
}


def summarise(rounds: Rounds, size: int) -> Record:
    """Each step's speed, its ratio to the copy, and its memory: medians and spread."""
    copies = [result["seconds"] for result in rounds["copy"]]
    return {
        name: {
            "gb_per_s": spread([size / 1e9 / r["seconds"] for r in results]),
            "of_copy": spread(
                [copy / r["seconds"] for copy, r in zip(copies, results, strict=True)]
            ),
            "peak_memory_mb": spread([r["peak_memory_bytes"] / 1e6 for r in results]),
            "rounds": results,
        }
        for name, results in rounds.items()
    }


def markdown(record: Record) -> str:
    """Write the record as a page."""
    host, checkpoint, versions = record["host"], record["checkpoint"], record["versions"]
    config = checkpoint["config"]
    lines = [
        "# The converter beside a plain copy",
        "",
        f"Random bfloat16 checkpoint of {checkpoint['bytes'] / 1e9:.2f} GB, "
        f"{checkpoint['tensors']} tensors like {checkpoint['like']}'s "
        f"({config['num_hidden_layers']} layers, {config['num_experts']} experts, width "
        f"{config['hidden_size']}). {host['cpu']}, {host['cores']} cores, {host['filesystem']}, "
        f"load {host['load_before']:.1f} before the start; "
        f"commit {record['commit'][:12]}"
        f"{' with local changes' if record['uncommitted_changes'] else ''}, {record['date']}.",
        "",
        f"Median of {checkpoint['rounds']} rounds (lowest to highest), each step in a fresh "
        "process, the steps taking turns on one disk, with "
        f"{_cache(record['page_cache_emptied'])} before each. Speed is the checkpoint's size over "
        "the command's time (without the start of Python); writing ends with fsync in all of them. "
        "A worker writes a file at a time, so as few threads work as files are written.",
        "",
        "| step | files written | GB/s | of the copy's speed | peak memory, MB |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [_row(name, figures) for name, figures in record["steps"].items()]
    lines += _trillion(record["trillion"]) if record["trillion"] else []
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines += ["", f"Python {host['python']}, {named}.", "", f"Again: `{record['command']}`", ""]
    return "\n".join(lines)


def _cache(emptied: bool) -> str:
    if emptied:
        return "a sync and an emptied page cache"
    return "a sync (the page cache was left as it was: no permission to empty it)"


def _row(name: str, figures: Record) -> str:
    ratio = "1" if name == "copy" else _cell(figures["of_copy"], 2)
    files = figures["rounds"][0].get("files", "none")
    memory = figures["peak_memory_mb"]["max"]
    return (
        f"| {TITLES[name]} | {files} | {_cell(figures['gb_per_s'], 2)} | {ratio} | {memory:.0f} |"
    )


def _cell(figure: Record, digits: int) -> str:
    median, low, high = (f"{figure[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def _trillion(found: Record) -> list[str]:
    limits, streamed = found["limit_bytes"], found["stream"][0]
    seconds = spread([result["seconds"] for result in found["plan"]])
    rates = [r["written_bytes"] / 1e9 / r["write_seconds"] for r in found["stream"]]
    return [
        "",
        f"A trillion parameters ({found['preset']}: {found['tensors']} tensors, "
        f"{found['bytes'] / 1e9:.0f} GB, the largest {found['largest_tensor_bytes'] / 1e9:.2f} GB) "
        "as sparse files, whose data reads as zeros. The process's address space is limited to "
        "twice the largest tensor and 512 MiB. A file of the native folder is written by one "
        "worker, so streaming a layer shows one thread's speed.",
        "",
        "| step | figure | peak memory, MB | limit, MB |",
        "| --- | --- | --- | --- |",
        f"| plan (dry run) | {_cell(seconds, 1)} s | {_peak(found['plan']):.0f} "
        f"| {limits['plan'] / 1e6:.0f} |",
        f"| stream `{found['streamed']}*`, {streamed['written_bytes'] / 1e9:.2f} GB "
        f"| {_cell(spread(rates), 2)} GB/s | {_peak(found['stream']):.0f} "
        f"| {limits['stream'] / 1e6:.0f} |",
    ]


def _peak(results: list[Record]) -> float:
    return max(result["peak_memory_bytes"] for result in results) / 1e6
