"""What exact mode costs at the level of a step: the shipped small model, exact against normal.

Exact mode runs prefill and decode apart: decode with max_num_seqs rows, each prompt with the
smallest prefill that has room for it alone; normal mode runs the smallest of its sizes that fits
everybody.
"Same sizes" is what the operators' exact forms cost by themselves. All steps take turns in every
round, so that another program on the machine slows all of them alike.

    python scripts/bench_exact.py                     # a table on stderr, one JSON line on stdout
    python scripts/bench_exact.py --quick
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bailing_jax  # noqa: F401  (before jax: sets the CPU scheduler)

# isort: split
import jax
import numpy as np
from flax import nnx

from bailing_jax import small_model
from bailing_jax.batch import BatchLayout, pack
from bailing_jax.engine.sizes import prefill_size
from bailing_jax.engine_options import EngineOptions
from bailing_jax.loading import LoadedModel, load
from bailing_jax.row import Row
from bailing_jax.state import DecodeState, allocate

NUM_SEQS, CHUNK, MODEL_LEN, CONTEXT = 8, 512, 1024, 200


class Model:
    """The small model with normal or exact operators, and its state."""

    def __init__(self, *, exact: bool) -> None:
        options = EngineOptions(
            batch_invariant=exact,
            max_num_seqs=NUM_SEQS,
            prefill_chunk=CHUNK,
            max_model_len=MODEL_LEN,
        )
        loaded: LoadedModel = load(small_model.folder(), options, {}, 0, lambda _line: None)
        self.limits, self.vocab = loaded.limits, loaded.config.vocab_size
        graphdef, self.params = nnx.split(loaded.model)

        def step(params, state: DecodeState, layout: BatchLayout):
            model = nnx.merge(graphdef, params)
            x, state, _ = model(state, layout)
            return model.logits(x[layout.logit_rows]), state

        self.step = jax.jit(step, donate_argnums=1)
        self.state = allocate(loaded.config, loaded.state_spec)

    def layout(
        self,
        decodes: int,
        decode_rows: int,
        prompt: int = 0,
        prefill_rows: int = 0,
        *,
        prompts: int = 1,
    ) -> BatchLayout:
        """`decodes` sequences with a context, and prompts; rows beyond them are padding."""
        rng, width = np.random.default_rng(0), self.limits.pages_a_sequence

        def row(place: int, count: int, context: int) -> Row:
            pages = range(1 + (place - 1) * width, 1 + place * width)
            return Row(rng.integers(0, self.vocab, count).tolist(), place, pages, context)

        return pack(
            [row(i + 1, 1, CONTEXT) for i in range(decodes)],
            [row(NUM_SEQS - i, prompt, 0) for i in range(prompts)] if prompt else [],
            num_decode=decode_rows,
            num_prefill=prefill_rows,
            num_segments=NUM_SEQS if prefill_rows else 0,
            page_size=self.limits.page_size,
            pages_a_sequence=width,
        )

    def run(self, *layouts: BatchLayout) -> None:
        """These calls one after the other, to their end."""
        logits = None
        for layout in layouts:
            logits, self.state = self.step(self.params, self.state, layout)
        jax.block_until_ready(logits)


def cases(normal: Model, exact: Model) -> dict[str, dict[str, Callable[[], None]]]:
    """Each line of the table: normal mode, exact mode, and normal operators at exact sizes."""
    decode = {n: normal.layout(n, NUM_SEQS) for n in (1, 4, NUM_SEQS)}
    rows = {n: prefill_size(exact.limits, n).prefill_rows for n in (48, CHUNK)}
    prefill = {n: normal.layout(0, 0, n, rows[n]) for n in rows}
    table: dict[str, dict[str, Callable[[], None]]] = {}
    for n, layout in decode.items():
        own = normal.layout(n, n)
        table[f"decode, {n} of {NUM_SEQS} sequences"] = {
            "normal": lambda own=own: normal.run(own),
            "exact": lambda layout=layout: exact.run(layout),
            "same sizes": lambda layout=layout: normal.run(layout),
        }
    for n, layout in prefill.items():
        own = normal.layout(0, NUM_SEQS, n, rows[n])
        table[f"prefill, {n} tokens"] = {
            "normal": lambda own=own: normal.run(own),
            "exact": lambda layout=layout: exact.run(layout),
            "same sizes": lambda layout=layout: normal.run(layout),
        }
        others = NUM_SEQS - 1
        mixed = normal.layout(others, NUM_SEQS, n, rows[n])
        both = normal.layout(others, NUM_SEQS), layout
        table[f"prefill, {n} tokens, and decode, {others}"] = {
            "normal": lambda mixed=mixed: normal.run(mixed),
            "exact": lambda both=both: exact.run(*both),
            "same sizes": lambda both=both: normal.run(*both),
        }
    # Where many short prompts come at once, normal mode takes them in one call.
    together = normal.layout(0, NUM_SEQS, 48, CHUNK, prompts=NUM_SEQS)
    each = [prefill[48]] * NUM_SEQS
    table[f"prefill, {NUM_SEQS} prompts of 48 tokens"] = {
        "normal": lambda: normal.run(together),
        "exact": lambda: exact.run(*each),
        "same sizes": lambda: normal.run(*each),
    }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="2 rounds")
    args = parser.parse_args()
    table = cases(Model(exact=False), Model(exact=True))
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range((2 if args.quick else args.rounds) + 1):
        for line, ways in table.items():
            for way, run in ways.items():
                start = time.perf_counter()
                run()
                if number:  # the first round compiles
                    seconds.setdefault((line, way), []).append(time.perf_counter() - start)
    found = []
    for line, ways in table.items():
        # A shared machine only ever adds time: the quickest of the rounds is the step's own.
        best = {way: min(seconds[line, way]) * 1e3 for way in ways}
        middle = {way: statistics.median(seconds[line, way]) * 1e3 for way in ways}
        found.append({"step": line, "best_ms": best, "median_ms": middle})
        print(
            f"{line:<42} normal {best['normal']:7.2f} ms  exact {best['exact']:7.2f} ms  "
            f"x{best['exact'] / best['normal']:.2f}  normal at the same sizes "
            f"{best['same sizes']:7.2f} ms",
            file=sys.stderr,
        )
    print(json.dumps({"rounds": args.rounds, "jax": jax.__version__, "steps": found}))


if __name__ == "__main__":
    main()
