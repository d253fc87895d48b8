"""LLM: the offline API. Prompts in, answers out, in order.

Names follow vLLM's offline API where it has them. Token ids work without a tokenizer; text needs
the checkpoint's tokenizer.json. One LLM runs one request queue and is not safe to share between
threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bailing_jax.engine import debug
from bailing_jax.engine.engine import Engine
from bailing_jax.engine.exact_check import require_exact
from bailing_jax.engine.limits import EngineLimits
from bailing_jax.engine.programs import Programs
from bailing_jax.engine.scoring import Scorer
from bailing_jax.engine.seeds import FreshSeeds
from bailing_jax.engine.stop import StopMatcher
from bailing_jax.engine_options import (
    DEFAULT_NUM_SEQS,
    DEFAULT_PREFILL_CHUNK,
    EngineOptions,
)
from bailing_jax.errors import EXIT_USAGE, UserError
from bailing_jax.loading import Report, load
from bailing_jax.request import Answer, Request, RequestOutput, StreamPiece
from bailing_jax.sampling_params import SamplingParams, resolve
from bailing_jax.state import state_bytes
from bailing_jax.terminal import tell
from bailing_jax.token_ids import checked_ids, eos_ids, is_one_prompt

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """A model ready to generate.

    Args:
        model: a checkpoint folder, org/name in the Hugging Face cache, or a preset's name (random
            weights from `seed`); None: the small model that ships with the package.
        dtype: of weights and activations, "float32" or "bfloat16"; None: float32 on a CPU, the
            checkpoint's elsewhere.
        state_dtype: of the recurrent state, "float32" or "bfloat16".
        rope_dtype: what RoPE hands q and k on in; None: as dtype.
        max_num_seqs: sequences that run at once; over all shards of a mesh, rounded up to as many
            in each.
        max_model_len: tokens of one sequence, prompt and answer; None: the model's limit, at
            most 4096.
        prefill_chunk: prompt tokens a step.
        memory_fraction: the share of the device's memory that may be used.
        mesh: devices along `data`, `expert` and `tensor`, such as "data=2,tensor=4" or a mapping;
            "auto": all there are; None: one, or under jax.distributed "auto".
        kernels: "auto", or the name of one implementation for all operators.
        batch_invariant: exact mode: a request's tokens, log probabilities and state are, bit for
            bit, those of the request alone; slower (docs/numerics.md).
        hf_overrides: config.json keys (and decay_layer_offset) that replace the file's.
        seed: of a preset's random weights.
        report: called with each line about what was loaded; default: printed on stderr.
        download: fetch org/name from the hub where the cache lacks it.
        check_limits: called with the sizes in force before any weight is read; what it raises ends
            the loading. None: under jax.distributed the processes compare versions, arguments,
            model and sizes there.

    Raises:
        UserError: what is wrong with model or options, and what to do.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: str | None = None,
        state_dtype: str = "float32",
        rope_dtype: str | None = None,
        max_num_seqs: int = DEFAULT_NUM_SEQS,
        max_model_len: int | None = None,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
        memory_fraction: float = 0.9,
        mesh: Mapping[str, int] | str | None = None,
        kernels: str = "auto",
        batch_invariant: bool = False,
        hf_overrides: Mapping[str, object] | None = None,
        seed: int = 0,
        report: Report = tell,
        download: bool = False,
        check_limits: Callable[[EngineLimits], object] | None = None,
    ) -> None:
        options = EngineOptions(
            dtype=dtype,
            state_dtype=state_dtype,
            rope_dtype=rope_dtype,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            prefill_chunk=prefill_chunk,
            memory_fraction=memory_fraction,
            mesh=mesh,
            kernels=kernels,
            batch_invariant=batch_invariant,
        )
        debug.check_processes()
        loaded = load(
            model, options, hf_overrides or {}, seed, report,
            download=download, check_limits=check_limits,
        )  # fmt: skip
        require_exact(loaded)
        self.config = loaded.config
        self.limits = loaded.limits
        self.tokenizer = loaded.tokenizer
        self.chat_template = loaded.chat_template
        self.generation_config = loaded.generation_config
        self._name = loaded.name
        self._seeds = FreshSeeds()
        self._eos_ids = eos_ids(loaded.config.eos_token_ids, loaded.generation_config)
        programs = Programs(loaded.model, loaded.placement)
        limits, spec = loaded.limits, loaded.state_spec
        if limits.num_shards > 1:
            report(limits.shards_in_words(max_num_seqs, state_bytes(loaded.config, spec)))
        self._engine = Engine(programs, loaded.config, limits, spec, programs.new_state)
        self._scorer = Scorer(
            programs,
            loaded.config,
            spec,
            limits.prefill_chunk,
            limits.num_shards,
            programs.new_state,
        )

    def warm_up(self, prompt_tokens: int, sampling_params: SamplingParams | None = None) -> None:
        """Compile ahead what one request with a prompt of this many tokens runs."""
        self._engine.warm_up(prompt_tokens, self._resolved(sampling_params or SamplingParams()))

    def warm_up_all(self, report: Report = tell) -> None:
        """Compile ahead everything that any requests can run."""
        self._engine.warm_up_all(report)

    def watch_compiling(self, report: Callable[[str], None] | None) -> None:
        """Call `report` before each step that compiles, with its sizes; None: nobody any more."""
        self._engine.on_compile = report or _ignore

    def meet_after_compiling(self, meet: Callable[[], None]) -> None:
        """Call `meet` after each step's compiling, before what was compiled runs.

        Of several processes each takes its own time to compile, and a collective may be patient
        for less long than that.
        """
        self._engine.on_compiled = meet

    def encode(self, text: str) -> list[int]:
        """The token ids of a plain text; names of control tokens in it are plain text too.

        Raises:
            UserError: the checkpoint has no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError(
                f"{self._name}: has no tokenizer.json, so a prompt can't be text",
                "Give token ids.",
                EXIT_USAGE,
            )
        return self.tokenizer.encode(text)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer every prompt, in order.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            sampling_params: one for all, or one a prompt.

        Raises:
            UserError: a prompt that is empty, too long, holds unknown token ids, or is text
                without a tokenizer. Nothing has run then.
        """
        single = isinstance(prompts, str) or is_one_prompt(prompts)
        listed: list[Prompt] = [prompts] if single else list(prompts)  # pyright: ignore
        if isinstance(sampling_params, SamplingParams) or sampling_params is None:
            sampling_params = [sampling_params or SamplingParams()] * len(listed)
        if len(sampling_params) != len(listed):
            raise UserError(
                f"{len(listed)} prompts and {len(sampling_params)} sampling_params",
                "Give one SamplingParams, or one for each prompt.",
                EXIT_USAGE,
            )
        prepared = [
            self.prepare(prompt, params, f"prompt {i}")
            for i, (prompt, params) in enumerate(zip(listed, sampling_params, strict=True))
        ]
        try:
            for request in prepared:
                self.submit(request)
            while any(self.is_unfinished(request) for request in prepared):
                self.step()
        finally:
            # After Ctrl-C nobody wants these answers any more.
            for request in prepared:
                self.cancel(request)
        return [request.output() for request in prepared]

    def prepare(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, what: str = "prompt"
    ) -> Request:
        """Check one request without running it; `submit` queues it, `step` runs it.

        Args:
            prompt: a text or a list of token ids.
            sampling_params: how to answer; None: the model's defaults.
            what: what messages call the prompt.

        Raises:
            UserError: prompt or parameters can't be used.
        """
        params = self._resolved(sampling_params or SamplingParams())
        ids = self.check_prompt(prompt, what)
        answers = self._answers(len(ids), params)
        return Request(prompt if isinstance(prompt, str) else None, ids, params, answers)

    def submit(
        self, request: Request, on_piece: Callable[[StreamPiece], None] | None = None
    ) -> None:
        """Queue a prepared request; `on_piece` is called with every piece of every answer.

        An Exception it raises ends that answer, with finish_reason "error", and no other;
        `Request.error` has it.
        """
        for i in range(len(request.answers)):
            # Known before it runs: what Ctrl-C interrupts here, `cancel` still finds.
            request.numbers.append(self._engine.new_number())
            self._submit(request, i, on_piece or _ignore)

    def is_unfinished(self, request: Request) -> bool:
        """Whether a submitted request has tokens to come."""
        return any(self._engine.is_unfinished(number) for number in request.numbers)

    def step(self) -> None:
        """Run one step for all submitted requests. If it fails, all of them are over.

        Where nobody waits and every running request decodes, it may be several steps in one call.
        """
        self._engine.step()

    def cancel(self, request: Request) -> None:
        """End a request at once; harmless if it is finished."""
        for number in request.numbers:
            self._engine.cancel(number)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[StreamPiece]:
        """Answer one prompt piece by piece, one piece a token; closing it cancels the request.

        Raises:
            UserError: as `generate`; also when n is not 1.
        """
        request = self.prepare(prompt, sampling_params)
        if request.params.n != 1:
            raise UserError(
                f"n = {request.params.n}; a stream gives one answer", exit_code=EXIT_USAGE
            )
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[StreamPiece]:
        pieces: deque[StreamPiece] = deque()
        try:
            self.submit(request, pieces.append)
            # Other calls may step the engine between two pieces, and finish this answer too.
            while pieces or self.is_unfinished(request):
                while pieces:
                    yield pieces.popleft()
                if self.is_unfinished(request):
                    self.step()
            request.raise_error()
            if request.output().outputs[0].finish_reason is None:
                raise RuntimeError("an error in another call ended this stream")
        finally:
            self.cancel(request)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template_args: Mapping[str, object] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of {"role", "content"}) or several.

        Raises:
            UserError: as `generate`; also without tokenizer or chat template.
        """
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        prompts = [self.chat_prompt(c, chat_template_args) for c in conversations]
        return self.generate(prompts, sampling_params)

    def chat_prompt(
        self, messages: Sequence[Message], template_args: Mapping[str, object] | None = None
    ) -> list[int]:
        """The token ids of one conversation, ready for the next answer.

        Raises:
            UserError: no tokenizer, no chat template, or messages the template refuses.
        """
        if self.tokenizer is None or self.chat_template is None:
            missing = "tokenizer.json" if self.tokenizer is None else "chat template"
            raise UserError(
                f"{self._name}: has no {missing}, which chat needs",
                "Use a complete release folder, or generate with a plain prompt.",
                EXIT_USAGE,
            )
        return self.chat_template.encode(self.tokenizer, messages, template_args=template_args)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [T, vocab]: the logits after every token.

        Raises:
            UserError: the result would exceed 4 GiB, or the token ids are not the model's.
        """
        return self._scorer.logits(self._checked(token_ids))

    def hidden_states(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [layers + 1, T, d]: the embedding, then the stream after each layer.

        The last row is before the final norm.

        Raises:
            UserError: the result would exceed 4 GiB, or the token ids are not the model's.
        """
        return self._scorer.hidden_states(self._checked(token_ids))

    def token_logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [T - 1]: the log probability of every token but the first, at any length.

        Raises:
            UserError: the token ids are not the model's.
        """
        return self._scorer.token_logprobs(self._checked(token_ids))

    def recurrent_states(self, token_ids: Sequence[int]) -> dict[int, np.ndarray]:
        """float32 [heads, K, V] of every lightning layer after all tokens, by layer.

        Raises:
            UserError: the token ids are not the model's.
        """
        return self._scorer.recurrent_states(self._checked(token_ids))

    def _resolved(self, params: SamplingParams) -> SamplingParams:
        resolved = resolve(params, self.generation_config, f"{self._name}: generation_config.json")
        for name in ("logit_bias", "stop_token_ids"):
            checked_ids(list(getattr(params, name) or ()), self.config.vocab_size, name, empty=True)
        return resolved

    def _answers(self, prompt_length: int, params: SamplingParams) -> list[Answer]:
        if params.stop_strings and self.tokenizer is None:
            raise UserError(
                f"{self._name}: stop strings need tokenizer.json, which the folder lacks",
                "Use stop_token_ids.",
                EXIT_USAGE,
                options=("stop_token_ids",),
            )
        room = self.limits.max_model_len - prompt_length
        return [
            Answer(
                i,
                StopMatcher(
                    params.stop_strings,
                    params.stop_token_ids or (),
                    params.ignore_eos,
                    self._eos_ids,
                    min(params.max_tokens, room),
                ),
                None if self.tokenizer is None else self.tokenizer.stream(),
            )
            for i in range(params.n)
        ]

    def _submit(
        self, request: Request, index: int, on_piece: Callable[[StreamPiece], None]
    ) -> None:
        params, answer = request.params, request.answers[index]

        def on_token(token: int, logprobs: dict[int, float] | None) -> bool:
            piece = answer.push(token, logprobs)
            on_piece(piece)
            return piece.finish_reason is not None

        seed = self._seeds.next() if params.seed is None else (params.seed + index) % 2**64
        self._engine.submit(
            request.prompt_token_ids,
            replace(params, n=1),
            seed,
            on_token,
            request.numbers[-1],
            stop_ids=answer.stop_ids,
            on_error=answer.fail,
        )

    def check_prompt(self, prompt: Prompt, what: str = "prompt") -> list[int]:
        """The token ids of a prompt that can be answered.

        Raises:
            UserError: empty, too long, unknown token ids, or text without a tokenizer.
        """
        ids = self._checked(self.encode(prompt) if isinstance(prompt, str) else prompt, what)
        if len(ids) >= self.limits.max_model_len:
            raise UserError(
                f"{what}: {len(ids)} tokens leave no room for an answer; "
                f"max_model_len is {self.limits.max_model_len}",
                "Shorten the prompt or raise max_model_len.",
                EXIT_USAGE,
                options=("max_model_len",),
            )
        return ids

    def _checked(self, token_ids: Sequence[int], what: str = "token_ids") -> list[int]:
        return checked_ids(token_ids, self.config.vocab_size, what)


def _ignore(_report: StreamPiece | str) -> None:
    """What becomes of reports nobody asked for."""
