"""The tests both paged operators share, as a class to derive from.

A derived class says what a token and a query look like, runs the operator and has its oracle.
"""

from __future__ import annotations

import abc
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from checks import assert_close, assert_same_bits, normal, poison
from paged_cases import Call, Seq, build

from pallas_kernels.paged_softmax import QUERY_TILE

IMPLEMENTATIONS = ("xla", "reference")
TOLERANCE = {"float32": "attention", "bfloat16": "attention_bfloat16"}


class PagedLaws(abc.ABC):
    """Tests of an operator that appends to pages and attends."""

    token: ClassVar[tuple[int, ...]]
    query: ClassVar[tuple[int, int]]

    @abc.abstractmethod
    def run(self, implementation: str, call: Call) -> tuple[np.ndarray, np.ndarray]:
        """The operator's outputs and pages."""

    @abc.abstractmethod
    def attend(self, q: np.ndarray, tokens: np.ndarray, context: int) -> np.ndarray:
        """The oracle for one sequence."""

    def build(self, rng: np.random.Generator, sequences: list[Seq], **sizes) -> Call:
        return build(rng, sequences, token=self.token, query=self.query, **sizes)

    def check(self, implementation: str, call: Call) -> tuple[np.ndarray, np.ndarray]:
        """Run a call and compare every row and every bit of the pages."""
        o, pages = self.run(implementation, call)
        assert_same_bits(pages, call.pages_after)
        real = np.zeros(len(call.q), bool)
        want = np.zeros(o.shape)
        for s, tokens, rows in zip(call.sequences, call.tokens, call.row_ranges(), strict=True):
            if not s.pad and s.new:
                real[rows] = True
                want[rows] = self.attend(call.q[rows], tokens, s.context)
        assert o.dtype == call.q.dtype
        assert (o[~real] == 0).all()
        assert_close(o[real], want[real], TOLERANCE[o.dtype.name], head_axis=1)
        return o, pages

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("page_size", [4, 64])
    def test_r019_r106_decode_rows(self, rng, implementation, page_size, dtype):
        """Contexts on both sides of every page and block border, pads between them."""
        contexts = [0, 1, page_size - 1, page_size, page_size + 1, 191]
        contexts += [254, 255, 256, 257, 511, 512, 513, 700]
        sequences = [Seq(int(c), 1) for c in rng.permutation(contexts)]
        for place in (0, 7, 7):
            sequences.insert(place, Seq(int(rng.integers(0, 700)), 1, pad=True))
        call = self.build(
            rng, sequences, page_size=page_size, width=-(-701 // page_size) + 2,
            num_pages=sum(contexts) // page_size + 50, num_rows=None, dtype=dtype,
        )  # fmt: skip
        self.check(implementation, call)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("page_size", [4, 64])
    def test_r019_r046_r106_segments(self, rng, implementation, page_size, dtype):
        """Lengths around the query tile, contexts around pages and blocks, empty ones and pads."""
        sizes = [(0, 0), (0, 1), (0, 63), (3, 64), (page_size, 65), (page_size - 1, 130)]
        sizes += [(256, 0), (254, 3), (512, 1), (241, 37), (page_size + 1, 2)]
        sequences = [Seq(context, new) for context, new in sizes]
        sequences += [Seq(300, 5, pad=True), Seq(0, 0, pad=True), Seq(17, 1, pad=True)]
        sequences = [sequences[i] for i in rng.permutation(len(sequences))]
        used = sum(map(sum, sizes))
        call = self.build(
            rng, sequences, page_size=page_size, width=-(-513 // page_size) + 1,
            num_pages=used // page_size + 40, num_rows=sum(s.new for s in sequences) + 9,
            dtype=dtype,
        )  # fmt: skip
        self.check(implementation, call)

    def small(self, rng, sequences: list[Seq], **kept) -> Call:
        """A call of the shape that the laws below share: 5 sequences, 23 rows, pages of 4."""
        sequences = [*sequences, *[Seq(9, 0, pad=True)] * (5 - len(sequences))]
        return self.build(rng, sequences, page_size=4, width=9, num_pages=41, num_rows=23, **kept)

    def small_decode(self, rng, sequences: list[Seq], **kept) -> Call:
        sequences = [*sequences, *[Seq(9, 1, pad=True)] * (5 - len(sequences))]
        return self.build(rng, sequences, page_size=4, width=9, num_pages=41, num_rows=None, **kept)

    @pytest.mark.parametrize("place", ["first", "middle", "last", "all"])
    def test_r100_empty_segments(self, rng, implementation, place):
        empty = [Seq(6, 0), Seq(0, 0)]
        live = [Seq(3, 7), Seq(0, 8)]
        sequences = {
            "first": [*empty, *live],
            "middle": [live[0], *empty, live[1]],
            "last": [*live, *empty],
            "all": empty,
        }[place]
        self.check(implementation, self.small(rng, sequences))

    def test_r035_r043_padding_alone_leaves_the_pages(self, rng, implementation):
        for call in (
            self.small(rng, [Seq(5, 3, pad=True), Seq(0, 2, pad=True), Seq(33, 0, pad=True)]),
            self.small_decode(rng, []),
        ):
            o, pages = self.run(implementation, call)
            assert (o == 0).all()
            assert_same_bits(pages, call.pages)

    def test_r047_every_cut_of_a_prompt_is_the_whole(self, rng, implementation):
        """Across a block border, bit for bit at tile borders; the last token is decoded."""
        tokens = normal(rng, (263, *self.token), "float32")
        q = normal(rng, (263, *self.query), "float32")
        sizes = {"page_size": 4, "width": 68, "num_pages": 75}
        whole = self.build(rng, [Seq(0, 263)], num_rows=269, tokens=[tokens], q=[q], **sizes)
        want, pages_after = self.check(implementation, whole)
        for cut in (1, 5, 64, 128, 255, 256, 257, 262):
            first = self.build(
                rng, [Seq(0, cut)], num_rows=269, tokens=[tokens[:cut]], q=[q[:cut]], **sizes
            )
            # The second call runs on the pages the first one left.
            first = replace(first, page_table=whole.page_table, pages=whole.pages)
            o, pages = self.run(implementation, first)
            rest = self.build(
                rng, [Seq(cut, 262 - cut)], num_rows=269, tokens=[tokens[:262]],
                q=[q[cut:262]], **sizes,
            )  # fmt: skip
            rest = replace(rest, page_table=whole.page_table, pages=pages)
            o_rest, pages = self.run(implementation, rest)
            last = self.build(
                rng, [Seq(262, 1)], num_rows=None, tokens=[tokens], q=[q[262:]], **sizes
            )
            last = replace(last, page_table=whole.page_table, pages=pages)
            o_last, pages = self.run(implementation, last)
            got = np.concatenate([o[:cut], o_rest[: 262 - cut], o_last])
            assert_close(got, want[:263], "attention", head_axis=1)
            if cut % QUERY_TILE == 0:
                assert_same_bits(got[:262], want[:262])
            assert_same_bits(pages, pages_after)

    def company(self, rng) -> tuple[list[Seq], list[np.ndarray], list[np.ndarray]]:
        sequences = [Seq(5, 6), Seq(0, 9), Seq(17, 1), Seq(30, 4)]
        tokens = [normal(rng, (s.context + s.new, *self.token), "float32") for s in sequences]
        return sequences, tokens, [normal(rng, (s.new, *self.query), "float32") for s in sequences]

    def test_r022_the_order_of_segments_does_not_matter(self, rng, implementation):
        sequences, tokens, q = self.company(rng)
        call = self.small(rng, sequences, tokens=[*tokens, tokens[0]], q=[*q, q[0]])
        outputs, _ = self.check(implementation, call)
        wanted = [outputs[rows] for rows in call.row_ranges()]
        for order in ([3, 2, 1, 0, 4], rng.permutation(5)):
            moved = self.small(
                rng, [call.sequences[i] for i in order],
                tokens=[call.tokens[i] for i in order], q=[[*q, q[0]][i] for i in order],
            )  # fmt: skip
            o, _ = self.check(implementation, moved)
            for i, rows in zip(order, moved.row_ranges(), strict=True):
                assert_same_bits(o[rows], wanted[i])

    def test_r023_the_choice_of_pages_does_not_matter(self, rng, implementation):
        sequences, _, _ = self.company(rng)
        call = self.small(rng, sequences)
        o, _ = self.run(implementation, call)
        place = np.concatenate([[0], 1 + rng.permutation(40)])
        moved, pages = self.run(implementation, call.rename_pages(place))
        assert_same_bits(moved, o)
        assert_same_bits(pages[place], call.pages_after)

    @pytest.mark.parametrize("kind", ["segments", "decode"])
    def test_r102_neighbours_do_not_matter(self, rng, implementation, kind):
        """Beside others, beside sequences of NaN, and beside none: the same bits."""
        sequences, tokens, q = self.company(rng)
        make = self.small
        if kind == "decode":
            make = self.small_decode
            sequences = [Seq(s.context + s.new - 1, 1) for s in sequences]
            q = [x[:1] for x in q]
        call = make(rng, sequences, tokens=[*tokens, tokens[0]], q=[*q, q[0]])
        o, _ = self.check(implementation, call)
        for i, mine in enumerate(call.row_ranges()[:4]):
            sick = [
                x if j == i else poison(rng, x.shape, "float32")
                for j, x in enumerate([*tokens, tokens[0]])
            ]
            beside = make(rng, sequences, tokens=sick, q=[*q, q[0]])
            assert_same_bits(self.run(implementation, beside)[0][mine], o[mine])
            alone = make(rng, [sequences[i]], tokens=[tokens[i]] * 5, q=[q[i]] * 5)
            assert_same_bits(self.run(implementation, alone)[0][: mine.stop - mine.start], o[mine])
