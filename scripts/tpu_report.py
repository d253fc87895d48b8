"""docs/benchmarks/tpu_lightning.md from what `tpu_check.py` found."""

from __future__ import annotations

from typing import Any

# SGLang-JAX at commit cddbf6f1 (K = V = 128, bfloat16 rows, float32 state), compiled for v6e with
# jax 0.10.2 in the same way: lower and compile seconds, temporaries in MiB, MB moved around the
# kernels, bundles. Prefill takes a chunk of 64 tokens in two kernels.
PEER = (
    ("decode", "H16 B8", "0.6 + 2.2", 0, 0, "8,488"),
    ("decode", "H16 B32", "2.8 + 9.5", 0, 0, "33,724"),
    ("decode", "H16 B128", "15 + 46", 0, 0, "134,996"),
    ("decode", "H64 B8", "2.3 + 11", 0, 0, "31,572"),
    ("prefill", "H16 T2048", "0.3 + 2.4", 62, 561, "503 + 277 a chunk and head"),
    ("prefill", "H16 T8192", "0.2 + 3.2", 206, 1364, "501 + 395 a chunk and head"),
    ("prefill", "H64 T8192", "0.2 + 4.2", 1090, 4873, "501 + 395 a chunk and head"),
)


def markdown(found: dict[str, Any]) -> str:
    """The report."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        "# The TPU kernels, compiled and simulated",
        "",
        "**Nothing here ran on a TPU.** The compiler for TPUs compiled the kernels on a CPU host, "
        "and the interpreter of TPU kernels ran them on a CPU, where their results are compared "
        "with a float64 fold, races are looked for and every byte they move is counted. Speed, "
        "overlap of copies with arithmetic, and the numbers that the hardware's matrix units give "
        "are not verified.",
        "",
        f"K = V = 128, bfloat16 rows, float32 state, {versions}. *H16 B32*: 16 heads, 32 decode "
        "rows. *T8192 x16*: 8192 prefill rows in 16 ragged segments. *Moved*: the kernel's copies "
        "and windows, counted as they are made, plus what XLA counts for the program around the "
        "kernel (on tpu7x it counts some of the kernel's arguments again). *Of the fewest*: "
        "against every row once, every slot once in and once out. *Code* does not grow with rows. "
        "Seconds are of two cores that other programs used as well.",
        "",
        "| kernel | shape | chip | lower + compile, s | code, KiB | temporaries, MiB | VMEM, MiB "
        "| moved, MB | of the fewest | pool in place |",
        "|" + " --- |" * 10,
    ]
    for row in found["calls"]:
        moved = row["bytes_kernel"] + row["bytes_around"]
        lines.append(
            f"| {row['operator']} | {row['shape']} | {row['chip']} "
            f"| {row['lower_s']} + {row['compile_s']} | {row['code_bytes'] / 1024:.0f} "
            f"| {row['temporary_bytes'] / 2**20:.1f} | {row['vmem_bytes'] / 2**20:.1f} "
            f"| {moved / 1e6:,.1f} | {row['bytes_ratio']:.3f} "
            f"| {'yes' if row['pool_in_place'] else 'NO'} |"
        )
    lines += ["", "## Instruction bundles", "", *_bundles(found["calls"])]
    lines += ["", "## Other head sizes", "", *_widths(found["widths"])]
    lines += ["", "## The small model's steps, compiled whole", "", *_steps(found["small_model"])]
    lines += [
        "",
        "## Beside a peer",
        "",
        "SGLang-JAX at commit cddbf6f1, compiled in the same way for v6e, two busy cores:",
        "",
        "| kernel | shape | lower + compile, s | temporaries, MiB | moved around the kernels, MB "
        "| bundles |",
        "|" + " --- |" * 6,
        *(f"| {' | '.join(str(x) for x in row)} |" for row in PEER),
        "",
        "Its decode unrolls rows and heads, so time to compile and code grow with both. Its "
        "prefill pads, gathers and transposes around two kernels: for H64 T8192 9 times the "
        "necessary 537 MB, beside what the kernels move.",
        "",
        "Again: `python scripts/tpu_check.py --bundles`",
        "",
    ]
    return "\n".join(lines)


def _bundles(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Final instruction bundles of the whole kernel, counted once whatever its loops do, and "
        "the slots that its units take in them. Decode's loop does one row and 8 heads, prefill's "
        "one chunk of 128 tokens and 8 heads. A measure of code, not of time.",
        "",
        "| kernel | shape | chip | bundles | MXU | VALU | XLU | spills |",
        "|" + " --- |" * 8,
    ]
    names = ("bundles", "MXU", "VALU", "XLU", "spills")
    for row in rows:
        if "bundles" in row:
            found = " | ".join(f"{row[name]:,}" for name in names)
            lines.append(f"| {row['operator']} | {row['shape']} | {row['chip']} | {found} |")
    return lines


def _widths(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "The public functions, 256 rows, pools of 257 slots with zeros behind V up to whole lanes.",
        "",
        "| chip | kernel | heads, K, V | state | copies of the pool | temporaries, MiB |",
        "|" + " --- |" * 6,
    ]
    for row in rows:
        lines.append(
            f"| {row['chip']} | {row['operator']} | {row['heads']}, {row['K']}, {row['V']} "
            f"| {row['state_dtype']} | {row['state_copies']} "
            f"| {row['temporary_bytes'] / 2**20:.1f} |"
        )
    return lines


def _steps(model: dict[str, Any]) -> list[str]:
    lines = [
        "128 decode rows; the mixed step has 256 prefill rows beside them.",
        "",
        "| chip | step | kernels inside | compile, s | temporaries, MiB | copies of a pool |",
        "|" + " --- |" * 6,
    ]
    for chip, found in model.items():
        for name, step in found.items():
            kernels = ", ".join(f"{number} {kernel}" for kernel, number in step["kernels"].items())
            lines.append(
                f"| {chip} | {name} | {kernels} | {step['compile_s']} "
                f"| {step['temporary_bytes'] / 2**20:.1f} | {step['state_copies']} |"
            )
    return lines
