"""An asyncio front of the engine: submit, stream, cancel, from one event loop.

One worker thread owns the LLM and steps it; nothing else touches it after the start. The loop sends
it commands through a queue, and it sends pieces back through `call_soon_threadsafe`. A command is
taken between two calls of the engine, so a cancelled request takes part in one more at most.
What goes wrong with one request is raised by its own stream; what ends the engine's step ends every
stream that is open, and the next ones run.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from bailing_jax.request import Request, StreamPiece
from bailing_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from bailing_jax.llm import LLM, Prompt

# What a stream is sent: a piece, an error that ends it, or None for its end.
_Item = StreamPiece | Exception | None


class ClosedError(RuntimeError):
    """The engine was shut down before or while this request ran."""


class Stream:
    """The pieces of one request, for one consumer: `async for piece in stream`.

    Pieces of a request with n > 1 come interleaved, in the order they were made.

    Attributes:
        request: the answers so far; complete when the stream has ended.
    """

    def __init__(self, engine: AsyncEngine, request: Request) -> None:
        self.request = request
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[_Item] = asyncio.Queue()
        self._ended = False

    def __aiter__(self) -> AsyncIterator[StreamPiece]:
        return self

    async def __anext__(self) -> StreamPiece:
        if self._ended:
            raise StopAsyncIteration
        item = await self._items.get()
        if isinstance(item, StreamPiece):
            return item
        self._ended = True
        if item is None:
            raise StopAsyncIteration
        raise item

    def cancel(self) -> None:
        """End the request soon; the stream ends after the pieces that are on their way."""
        self._engine._send(lambda worker: worker.cancel(self))

    def _put(self, item: _Item) -> None:
        """From the worker. A loop that has closed has nobody left who would listen."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:
            if not self._loop.is_closed():
                raise


class AsyncEngine:
    """Streams of many requests at once over one LLM.

    Use it as an async context manager, or call `aclose`. The LLM belongs to it from then on: its
    own methods must not be called meanwhile.

    Args:
        llm: loaded, and warmed up if the first answers shall not wait for compiling.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._commands: queue.SimpleQueue[Callable[[_Worker], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        worker = _Worker(llm, self._commands)
        self._thread = threading.Thread(target=worker.run, name="bailing engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()

    def submit(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Stream:
        """Queue a request; must be called inside the event loop that will read the stream.

        Raises:
            UserError: prompt or parameters can't be used.
            ClosedError: the engine is shut down.
        """
        # Checks and encodes on this thread: it reads what never changes after loading.
        stream = Stream(self, self._llm.prepare(prompt, sampling_params))
        self._send(lambda worker: worker.submit(stream))
        return stream

    async def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[StreamPiece]:
        """The pieces of one request; leaving the loop early or being cancelled cancels it."""
        stream = self.submit(prompt, sampling_params)
        try:
            async for piece in stream:
                yield piece
        finally:
            if not self._closed:
                stream.cancel()

    async def aclose(self) -> None:
        """Cancel what runs, end its streams with `ClosedError` and stop the worker."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._commands.put(_Worker.close)
        await asyncio.to_thread(self._thread.join)

    def _send(self, command: Callable[[_Worker], None]) -> None:
        # Under the lock, so that no command comes in behind the one that closes.
        with self._lock:
            if self._closed:
                raise ClosedError("the engine is shut down")
            self._commands.put(command)


class _Worker:
    """What the thread runs. Only it touches the engine."""

    def __init__(
        self, llm: LLM, commands: queue.SimpleQueue[Callable[[_Worker], None]]
    ) -> None:
        self._llm = llm
        self._commands = commands
        self._open: dict[int, Stream] = {}
        self._running = True

    def run(self) -> None:
        """Take commands and step until told to close."""
        while self._running:
            # Without work it sleeps until somebody wants something.
            while self._running and (not self._open or not self._commands.empty()):
                self._commands.get()(self)
            if self._open:
                self._step()

    def submit(self, stream: Stream) -> None:
        """Start a request."""
        self._open[id(stream)] = stream
        try:
            self._llm.submit(stream.request, stream._put)
        except Exception as error:
            self._end(stream, error)

    def cancel(self, stream: Stream) -> None:
        """End a request; one that has ended is ignored."""
        if id(stream) in self._open:
            self._end(stream, None)

    def close(self) -> None:
        """End everybody and stop."""
        for stream in list(self._open.values()):
            self._end(stream, ClosedError("the engine was shut down"))
        self._running = False

    def _step(self) -> None:
        try:
            self._llm.step()
        except Exception as error:
            # The engine has ended all requests and begun afresh.
            for stream in list(self._open.values()):
                self._end(stream, error)
            return
        for stream in list(self._open.values()):
            if not self._llm.is_unfinished(stream.request):
                self._end(stream, stream.request.error)

    def _end(self, stream: Stream, error: Exception | None) -> None:
        del self._open[id(stream)]
        self._llm.cancel(stream.request)
        stream._put(error)
