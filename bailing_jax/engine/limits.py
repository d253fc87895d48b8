"""The static sizes of an engine, fixed when it starts."""

from __future__ import annotations

from dataclasses import dataclass

from bailing_jax.state import StateSpec

# Decode steps one device call may run. More would save no more of the host's share (2 % of a step
# is left), and a stream gets its tokens in bursts of that many.
DECODE_STEPS = 8
# Prefill rows a step may have, where that is less than a whole chunk.
PREFILL_SIZES = (64, 256, 1024)


@dataclass(frozen=True)
class EngineLimits:
    """The static sizes of an engine; of each of its shards, where it has several.

    Attributes:
        max_num_seqs: sequences that run at once.
        max_model_len: tokens of one sequence, prompt and answer.
        prefill_chunk: prefill tokens a step.
        page_size: tokens a page.
        max_num_pages: pages of all sequences together; None: every sequence at full length.
        exact: sizes of steps follow from each sequence alone, prompts are cut on a fixed grid.
        small_prefills: prefill rows a step may have besides `prefill_chunk`, ascending.
        num_shards: sets of devices with sequences, slots and pages of their own.
    """

    max_num_seqs: int
    max_model_len: int
    prefill_chunk: int
    page_size: int
    max_num_pages: int | None = None
    exact: bool = False
    small_prefills: tuple[int, ...] = PREFILL_SIZES
    num_shards: int = 1

    @property
    def total_num_seqs(self) -> int:
        """Sequences that run at once, in all shards."""
        return self.max_num_seqs * self.num_shards

    @property
    def pages_a_sequence(self) -> int:
        """The width of a page table."""
        return -(-self.max_model_len // self.page_size)

    @property
    def num_pages(self) -> int:
        """Pages that can be handed out."""
        full = self.max_num_seqs * self.pages_a_sequence
        return full if self.max_num_pages is None else min(full, self.max_num_pages)

    def shards_in_words(self, asked: int, bytes_a_shard: int) -> str:
        """What each of several shards has, and what that is in all.

        Args:
            asked: sequences that were asked for.
            bytes_a_shard: of its state.
        """
        num = self.num_shards
        rounded = f" (max_num_seqs = {asked}, rounded up)" * (asked != self.total_num_seqs)
        return (
            f"{num} shards, each with {self.max_num_seqs} sequences, {self.num_pages} pages and "
            f"{bytes_a_shard / 1e6:,.1f} MB of state: in all {self.total_num_seqs} sequences"
            f"{rounded}, {num * self.num_pages} pages and {num * bytes_a_shard / 1e6:,.1f} MB"
        )

    def state_spec(self, page_dtype: str, state_dtype: str, platform: str = "") -> StateSpec:
        """One shard's state for so many sequences and pages, NULL slot and page included.

        Args:
            page_dtype: of what pages keep.
            state_dtype: of the recurrent state.
            platform: where it lies: jax's name.
        """
        return StateSpec(
            num_slots=self.max_num_seqs + 1,
            num_pages=self.num_pages + 1,
            page_dtype=page_dtype,
            state_dtype=state_dtype,
            page_size=self.page_size,
            whole_lanes=platform == "tpu",
        )
