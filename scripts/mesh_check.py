"""One model over the devices of a host: the answers of one device, and how fast.

    python scripts/mesh_check.py --devices 2                    on two GPUs
    python scripts/mesh_check.py --devices 2 --simulate --tiny  on two simulated CPU devices

Two models, on one device and on every mesh of --devices that cuts along one axis: the shipped one
with word problems, and a random LinearV2 of about 1 B parameters with 32 experts (--tiny: a small
one) with random prompts. In float32 every greedy token must be that of one device, and the logits
of a prompt within the bound of a mesh. Of an answer that differs, `gaps` says how near a tie it
was: the distance of the two tokens' logits, relative to their spread. Of the random model also
tokens/s in bfloat16, all requests at once, compiled before: wall times of the same call, best of
3. Prints one JSON object; exit code 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

AXES = ("tensor", "expert", "data")
# Logits of a mesh against one device, relative to their spread: sums of float32 in another order.
BOUND = 1e-4
# Wide and of few layers: what a mesh divides is large, and it compiles in minutes.
ONE_B: dict[str, Any] = {
    "hidden_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 16,
    "num_key_value_heads": 4, "num_experts": 32, "num_experts_per_tok": 4, "n_group": 4,
    "topk_group": 2, "moe_intermediate_size": 1024, "moe_shared_expert_intermediate_size": 1024,
    "intermediate_size": 8192, "vocab_size": 32768, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
TINY = {
    **ONE_B, "hidden_size": 64, "head_dim": 16, "vocab_size": 512, "intermediate_size": 256,
    "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
}  # fmt: skip
PRESET = "ring-mini-linear-2.0"
MODELS = ("shipped", "random")
NUM, ANSWER, PROMPT = 32, 64, 200


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="one model over the devices of a host")
    add = parser.add_argument
    add("--devices", type=int, default=2)
    add("--simulate", action="store_true", help="devices that this CPU plays")
    add("--tiny", action="store_true", help="a small random model: does it run?")
    add("--only", choices=MODELS, help="one of the two models")
    add("--out", type=Path, help="folder for mesh_check.json")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.simulate:
        os.environ["JAX_PLATFORMS"] = "cpu"
        flag = f"--xla_force_host_platform_device_count={args.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import bailing_jax  # isort: skip  before jax: it sets a flag of XLA's
    import jax

    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "devices": f"{args.devices} of {len(jax.devices())} {jax.devices()[0].device_kind}",
        "simulated": args.simulate,
        "jax": jax.__version__,
        "bailing_jax": bailing_jax.__version__,
        "bound": BOUND,
        "rows": [],
    }
    for row in rows(args):
        report["rows"].append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "mesh_check.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0 if all(row["same_answers"] for row in report["rows"]) else 1


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One a model and mesh, the one device first."""
    random_model = {"model": PRESET, "hf_overrides": TINY if args.tiny else ONE_B}
    for name, model in zip(MODELS, ({"model": None}, random_model), strict=True):
        if args.only not in (None, name):
            continue
        alone: dict[str, Any] = {}
        for axis in ("", *AXES):
            mesh = f"{axis}={args.devices}" if axis else None
            row: dict[str, Any] = {"model": name, "mesh": mesh or "one device"}
            found = answers(model, mesh, alone.get("tokens"))
            alone = alone or found
            spread = alone["logits"].std()
            row["parameters"] = found["parameters"]
            row["answers"] = len(found["tokens"])
            row["same"] = row["answers"] - len(found["gaps"])
            row["gaps"] = [float(gap / spread) for gap in found["gaps"]]
            row["logits_off"] = float(abs(found["logits"] - alone["logits"]).max() / spread)
            row["same_answers"] = not row["gaps"] and row["logits_off"] <= BOUND
            yield row | (speed(model, mesh) if model["model"] else {})


def load(model: dict[str, Any], mesh: str | None, dtype: str) -> Any:
    from bailing_jax import LLM

    gc.collect()  # the model before this one
    return LLM(
        **model, mesh=mesh, dtype=dtype, max_num_seqs=NUM, max_model_len=1024, prefill_chunk=256,
        report=lambda _line: None,
    )  # fmt: skip


def prompts(llm: Any) -> list[list[int]]:
    """Word problems, or random tokens for a model that nobody can read."""
    import numpy as np

    if llm.tokenizer is not None:
        from bailing_jax.tasks.word_problems import word_problem

        asked = [word_problem(0, i, "test").question for i in range(NUM)]
        return [llm.chat_prompt([{"role": "user", "content": text}]) for text in asked]
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2 * PROMPT, NUM)
    return [rng.integers(3, llm.config.vocab_size, n).tolist() for n in lengths]


def answers(
    model: dict[str, Any], mesh: str | None, alone: list[list[int]] | None
) -> dict[str, Any]:
    """Greedy tokens of every prompt, and the logits of one, in float32.

    `gaps`: of each answer that is not that of one device, how far apart this mesh's logits of the
    first two tokens that differ are.
    """
    from bailing_jax import SamplingParams
    from bailing_jax.params import describe

    llm = load(model, mesh, "float32")
    params = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
    asked = prompts(llm)
    tokens = [output.outputs[0].token_ids for output in llm.generate(asked, params)]
    gaps = []
    for prompt, mine, theirs in zip(asked, tokens, alone or tokens, strict=True):
        if mine != theirs:
            at = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
            logits = llm.logits(prompt + mine[:at])[-1]
            gaps.append(abs(logits[mine[at]] - logits[theirs[at]]))
    return {
        "tokens": tokens,
        "gaps": gaps,
        "logits": llm.logits(list(range(3, 3 + PROMPT))),
        "parameters": sum(param.size for param in describe(llm.config)),
    }


def speed(model: dict[str, Any], mesh: str | None) -> dict[str, float]:
    """Tokens/s of prompts and of answers, best of 3 calls, in bfloat16."""
    from bailing_jax import SamplingParams

    llm = load(model, mesh, "bfloat16")
    asked = [list(range(3, 3 + PROMPT))] * NUM
    found = {}
    for name, tokens, count in (("prompt", 1, NUM * PROMPT), ("answer", 257, NUM * 256)):
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        llm.generate(asked, params)  # compiles
        times = []
        for _ in range(3):
            start = time.perf_counter()
            llm.generate(asked, params)
            times.append(time.perf_counter() - start)
        found[name] = min(times)
        if name == "answer":
            # Less what the prompts and the first tokens took.
            times = [found["answer"] - found["prompt"]]
        found[f"{name}_tokens_per_s"] = round(count / min(times), 1)
    return {k: v for k, v in found.items() if k.endswith("_s")}


if __name__ == "__main__":
    sys.exit(main())
