"""One model over the devices of a host: the answers of one device, and how fast.

    python scripts/mesh_check.py --devices 2                    on two GPUs
    python scripts/mesh_check.py --devices 2 --simulate --tiny  on two simulated CPU devices

Two models, on one device and on every mesh of --devices that cuts along one axis: the shipped one
with word problems, and a random LinearV2 of about 1 B parameters with 32 experts (--tiny: a small
one) with random prompts. In float32 every greedy token must be that of one device, and the logits
of a prompt within the bound of a mesh. Of an answer that differs, `gaps` says how near a tie it
was: the distance of the two tokens' logits, relative to their spread.

Random weights choose among near ties all the time, and a sum in another order may choose the other
one: an expert for a token of the prompt is enough. So one device picks the random prompts by its
own margins before any mesh runs (`clear_prompts`): those on whose way to the last token no choice,
of a token, an expert or a group of experts, is nearer to a tie than a mesh may come.

With --float64 also how far the random model's logits are from those of an independent float64
model: one device is as far from them as any mesh. Of the random model on real devices also
tokens/s in bfloat16, all requests at once, compiled before: wall times of the same call, best of
3. Prints one JSON object; exit code 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import contextlib
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
# Each of two logits may be off by BOUND.
TOKEN_MARGIN = 2 * BOUND
# Of a router's scores, between 0 and 1. On a mesh the rows that a router sees are off by up to
# 7.5e-6 of their size (docs/benchmarks/mesh_simulated.md), a score by a quarter of that, and the
# difference of two groups, four scores, by twice a score's: five times as much and more.
ROUTER_MARGIN = 2e-5
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
NUM, PROMPT = 32, 200
LOGITS_OF = list(range(3, 3 + PROMPT))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="one model over the devices of a host")
    add = parser.add_argument
    add("--devices", type=int, default=2)
    add("--simulate", action="store_true", help="devices that this CPU plays")
    add("--tiny", action="store_true", help="a small random model: does it run?")
    add("--answer", type=int, default=64, help="tokens of each answer that is compared")
    add("--longest", type=int, default=2 * PROMPT, help="tokens of a random prompt at most")
    add("--float64", action="store_true", help="logits of an independent float64 model beside them")
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
        is_random = model["model"] is not None
        asked, tried = clear_prompts(model, args) if is_random else (None, NUM)
        exact = float64_logits(model) if is_random and args.float64 else None
        alone: dict[str, Any] = {}
        for axis in ("", *AXES):
            mesh = f"{axis}={args.devices}" if axis else None
            row: dict[str, Any] = {"model": name, "mesh": mesh or "one device"}
            found = answers(model, mesh, asked, args.answer, alone.get("tokens"))
            alone = alone or found
            spread = alone["logits"].std()
            row["parameters"] = found["parameters"]
            row["prompts_tried"] = tried
            row["answers"] = len(found["tokens"])
            row["same"] = row["answers"] - len(found["gaps"])
            row["gaps"] = [float(gap / spread) for gap in found["gaps"]]
            row["logits_off"] = float(abs(found["logits"] - alone["logits"]).max() / spread)
            if exact is not None:
                row["float64_off"] = float(abs(found["logits"] - exact).max() / spread)
            row["same_answers"] = not row["gaps"] and row["logits_off"] <= BOUND
            yield row | (speed(model, mesh) if is_random and not args.simulate else {})


def load(model: dict[str, Any], mesh: str | None, dtype: str) -> Any:
    from bailing_jax import LLM

    gc.collect()  # the model before this one
    return LLM(
        **model, mesh=mesh, dtype=dtype, max_num_seqs=NUM, max_model_len=1024, prefill_chunk=256,
        report=lambda _line: None,
    )  # fmt: skip


def float64_logits(model: dict[str, Any]) -> Any:
    """Of the prompt whose logits are compared."""
    import mesh_float64

    return mesh_float64.logits(model["model"], model["hf_overrides"], LOGITS_OF)


def word_problems(llm: Any) -> list[list[int]]:
    """Of the shipped model's kind, held out from its training."""
    from bailing_jax.tasks.word_problems import word_problem

    asked = [word_problem(0, i, "test").question for i in range(NUM)]
    return [llm.chat_prompt([{"role": "user", "content": text}]) for text in asked]


def greedy(llm: Any, asked: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Answers of so many tokens."""
    from bailing_jax import SamplingParams

    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(asked, params)]


def clear_prompts(model: dict[str, Any], args: argparse.Namespace) -> tuple[list[list[int]], int]:
    """NUM random prompts on whose way to the answer's end one device meets no near tie.

    Returns:
        The prompts, and how many were tried.
    """
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    found: list[list[int]] = []
    tried = 0
    with watched_routers() as gaps:
        llm = load(model, None, "float32")
        while len(found) < NUM:
            count = min(NUM, 2 * (NUM - len(found)))
            lengths = rng.integers(1, args.longest, count)
            asked = [rng.integers(3, llm.config.vocab_size, n).tolist() for n in lengths]
            for prompt, tokens in zip(asked, greedy(llm, asked, args.answer), strict=True):
                gaps.clear()
                logits = llm.logits(prompt + tokens[:-1])[len(prompt) - 1 :]
                jax.effects_barrier()  # until all gaps are there
                second, first = np.partition(logits, -2, axis=1)[:, -2:].T
                is_clear = min((first - second) / logits.std(axis=1)) >= TOKEN_MARGIN
                if is_clear and min(gaps) >= ROUTER_MARGIN:
                    found.append(prompt)
            tried += count
            print(f"{len(found)} of {tried} prompts are clear", file=sys.stderr, flush=True)
    return found[:NUM], tried


@contextlib.contextmanager
def watched_routers() -> Iterator[list[float]]:
    """Of each layer and step, the least distance of a score that was chosen to one that was not.

    Over rows that exist, of experts and of groups of experts.
    """
    import jax
    import jax.numpy as jnp

    from bailing_jax.layers.moe import MoE

    gaps: list[float] = []
    plain = MoE.__call__

    def gap(scores: jax.Array, num_chosen: int) -> jax.Array:
        best, _ = jax.lax.top_k(scores, num_chosen + 1)
        return best[:, -2] - best[:, -1]

    def watched(self: MoE, x: jax.Array, exists: jax.Array) -> jax.Array:
        router, config = self.gate, self.gate.config
        scores = router.scores(x) + router.expert_bias[...]
        best_two, _ = jax.lax.top_k(scores.reshape(len(scores), config.num_groups, -1), 2)
        least = jnp.minimum(
            gap(best_two.sum(-1), config.num_kept_groups),
            gap(router._keep_best_groups(scores), config.num_experts_per_token),
        )
        least = jnp.where(exists, least, jnp.inf).min()
        jax.debug.callback(lambda value: gaps.append(float(value)), least)
        return plain(self, x, exists)

    MoE.__call__ = watched
    jax.clear_caches()  # a layer is traced once for all models of its shapes
    try:
        yield gaps
    finally:
        MoE.__call__ = plain
        jax.clear_caches()


def answers(
    model: dict[str, Any],
    mesh: str | None,
    asked: list[list[int]] | None,
    num_tokens: int,
    alone: list[list[int]] | None,
) -> dict[str, Any]:
    """Greedy tokens of every prompt (None: word problems), and the logits of one, in float32.

    `gaps`: of each answer that is not that of one device, how far apart this mesh's logits of the
    first two tokens that differ are.
    """
    from bailing_jax.params import describe

    llm = load(model, mesh, "float32")
    asked = word_problems(llm) if asked is None else asked
    tokens = greedy(llm, asked, num_tokens)
    gaps = []
    for prompt, mine, theirs in zip(asked, tokens, alone or tokens, strict=True):
        if mine != theirs:
            at = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
            logits = llm.logits(prompt + mine[:at])[-1]
            gaps.append(abs(logits[mine[at]] - logits[theirs[at]]))
    return {
        "tokens": tokens,
        "gaps": gaps,
        "logits": llm.logits(LOGITS_OF),
        "parameters": sum(param.size for param in describe(llm.config)),
    }


def speed(model: dict[str, Any], mesh: str | None) -> dict[str, float]:
    """Tokens/s of prompts and of answers, best of 3 calls, in bfloat16."""
    from bailing_jax import SamplingParams

    llm = load(model, mesh, "bfloat16")
    asked = [LOGITS_OF] * NUM
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
