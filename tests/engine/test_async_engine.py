"""Laws of the asyncio front: every stream gets its answer, whoever leaves, fails or shuts down."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from typing import Any

import pytest
from tiny_models import greedy, is_idle, linear_llm

from bailing_jax import LLM, AsyncEngine, SamplingParams
from bailing_jax.engine.async_engine import ClosedError, Stream
from bailing_jax.errors import UserError

pytestmark = pytest.mark.unoptimised


@pytest.fixture(scope="module")
def llm() -> LLM:
    return linear_llm()


@pytest.fixture(autouse=True)
def _idle(llm: LLM) -> Iterator[None]:
    yield
    assert is_idle(llm)
    assert not llm._engine._requests


def jobs(count: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(count)
    return [
        (
            [rng.randrange(300) for _ in range(rng.randint(1, 40))],
            SamplingParams(max_tokens=rng.randint(1, 30), temperature=1.0, seed=i, ignore_eos=True),
        )
        for i in range(count)
    ]


def alone(llm: LLM, work: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    return [llm.generate(*job)[0].outputs[0].token_ids for job in work]


async def tokens(stream: Any) -> list[int]:
    return [piece.token_id async for piece in stream]


def test_many_streams_at_once_get_what_each_gets_alone(llm: LLM) -> None:
    work = jobs(40)
    want = alone(llm, work)

    async def main() -> list[list[int]]:
        async with AsyncEngine(llm) as engine:
            return await asyncio.gather(*(tokens(engine.stream(*job)) for job in work))

    assert asyncio.run(main()) == want


def test_r085_cancelling_at_random_moments_leaves_the_others_alone(llm: LLM) -> None:
    """By `cancel`, by leaving the loop, by cancelling the task; before, in and after the prompt."""
    work = jobs(60)
    want = alone(llm, work)

    async def left(engine: AsyncEngine, number: int, after: int) -> None:
        pieces = engine.stream(*work[number])
        got: list[int] = []
        async for piece in pieces:
            got.append(piece.token_id)
            if len(got) == after:
                break
        await pieces.aclose()  # pyright: ignore
        assert got == want[number][: len(got)]

    async def cancelled(engine: AsyncEngine, number: int, after: float) -> None:
        stream = engine.submit(*work[number])
        await asyncio.sleep(after)
        stream.cancel()
        stream.cancel()
        got = await tokens(stream)
        assert got == want[number][: len(got)]
        assert await tokens(stream) == []

    async def killed(engine: AsyncEngine, number: int, after: float) -> None:
        task = asyncio.create_task(tokens(engine.stream(*work[number])))
        await asyncio.sleep(after)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            assert await task == want[number]

    async def main() -> None:
        rng = random.Random(3)
        async with AsyncEngine(llm) as engine:
            tasks: list[Any] = []
            for i in range(0, 60, 4):
                tasks.append(left(engine, i, rng.randint(1, 9)))
                tasks.append(cancelled(engine, i + 1, rng.random() / 3))
                tasks.append(killed(engine, i + 2, rng.random() / 3))
                tasks.append(tokens(engine.stream(*work[i + 3])))
            got = await asyncio.gather(*tasks)
            assert got[3::4] == want[3::4]

    asyncio.run(main())


def test_an_error_of_one_request_is_its_own(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    work = jobs(5)
    want = alone(llm, work)

    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            with pytest.raises(UserError):
                engine.submit([])
            bad = engine.submit([1], greedy(9, ignore_eos=True))
            monkeypatch.setattr(bad.request.answers[0], "push", lambda *_: 1 / 0)
            streams = [engine.submit(*job) for job in work]
            with pytest.raises(ZeroDivisionError):
                await tokens(bad)
            assert bad.request.output().outputs[0].finish_reason == "error"
            assert [await tokens(stream) for stream in streams] == want

    asyncio.run(main())


def test_r028_a_failed_step_ends_all_streams_and_the_next_ones_run(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = jobs(5)
    want = alone(llm, work)

    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            with monkeypatch.context() as patch:
                patch.setattr(llm._engine._programs, "step", lambda *_: 1 / 0)
                streams = [engine.submit(*job) for job in work]
                for result in await asyncio.gather(*map(tokens, streams), return_exceptions=True):
                    assert isinstance(result, ZeroDivisionError)
            assert await asyncio.gather(*(tokens(engine.stream(*job)) for job in work)) == want

    asyncio.run(main())


def test_shutting_down_ends_every_stream(llm: LLM) -> None:
    async def main() -> list[Any]:
        engine = AsyncEngine(llm)
        streams = [engine.submit([i], greedy(80, ignore_eos=True)) for i in range(6)]
        first = await anext(streams[0])
        assert isinstance(first.token_id, int)
        await engine.aclose()
        await engine.aclose()
        with pytest.raises(ClosedError):
            engine.submit([1])
        with pytest.raises(ClosedError):
            streams[0].cancel()
        return await asyncio.gather(*map(tokens, streams), return_exceptions=True)

    results = asyncio.run(main())
    assert any(isinstance(result, ClosedError) for result in results)
    assert all(isinstance(result, ClosedError) or len(result) == 80 for result in results)


def test_r026_idle_between_bursts_nobody_holds_anything(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            for burst in range(5):
                work = jobs(6)
                await asyncio.gather(*(tokens(engine.stream(*job)) for job in work[burst:]))
                assert is_idle(llm)

    asyncio.run(main())


def test_several_answers_to_one_prompt_share_a_stream(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=4, n=3, ignore_eos=True)
    (want,) = llm.generate([1, 2], params)

    async def main() -> Stream:
        async with AsyncEngine(llm) as engine:
            stream = engine.submit([1, 2], params)
            assert len(await tokens(stream)) == 18
            return stream

    assert asyncio.run(main()).request.output().outputs == want.outputs
