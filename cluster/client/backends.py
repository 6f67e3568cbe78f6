"""Where answers come from: an engine in this process (its mesh on Ray), or a server. One interface for both."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from cluster.client.client import Client
from cluster.client.resuming import NO_LIMIT, Patience
from cluster.pb.outrider.v1 import generation_pb2 as pb
from cluster.wire.answers import Chunk, cache_is_full, num_accepted
from cluster.wire.requests import one_prompt
from runtime.config import Config
from runtime.errors import OutriderError, WorkerError
from runtime.progress import doing
from runtime.prompts import as_prompt, kind_of
from runtime.request import FinishReason, Prompt, StepOutput, forks

if TYPE_CHECKING:
    from runtime.engine.engine import Engine
    from runtime.engine.loop import EngineLoop
    from runtime.engine.session import Session
    from runtime.request import Request


class Conversation(Protocol):
    """Turns that share one cache. For one thread, but for `stop`."""

    def ask(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        token_ids: Sequence[int] | None = None,
        sampling: Mapping[str, Any] | None = None,
        lookahead: Mapping[str, Any] | None = None,
    ) -> Iterator[Chunk]:
        """Append one of text, chat messages (those since the last answer) and token ids, and answer it.

        Parameters not named are the engine's or server's defaults. Asking again stops what is left of the answer
        before. Raises InvalidRequestError, here or with the first chunk; the chunks raise ResourceExhaustedError
        where the conversation fills its cache, NumericsError, or WorkerError. From a server, all but the first are a
        CallError.
        """

    def stop(self) -> None:
        """End the running answer, if there is one: its last chunk, still to be read, says CANCELLED. Safe in a signal
        handler."""

    def close(self) -> None:
        """End the conversation and free its cache. Idempotent."""


class Backend(Protocol):
    """Safe to use from several threads."""

    def converse(self) -> Conversation:
        """Begin a conversation. Raises ResourceExhaustedError, here or with the first chunk, if too many are open."""

    def cache_info(self) -> pb.CacheInfo:
        """What the cache keeps and takes."""

    def stream(
        self, prompt: Prompt, sampling: Mapping[str, Any], lookahead: Mapping[str, Any], **urgency: Any
    ) -> Iterator[Chunk]:
        """Continue a prompt; parameters not named are the engine's or server's defaults. `urgency`: `priority` and
        `deadline_s`, as `Engine.make_request` has them.

        Raises InvalidRequestError, ResourceExhaustedError, DeadlineError, NumericsError or WorkerError. Leaving early
        withdraws the request.
        """

    def close(self) -> None:
        """End what is running and let go of everything. Idempotent."""


@contextmanager
def open_engine(config: Config, prepare: bool = False) -> Iterator[Engine]:
    """An engine in this process: alone where the mesh is 1x1, else with its workers on Ray. `prepare`: no request is to
    wait for what only some need.

    What is compiled on a first start is begun first, and waited for where it is needed.
    """
    from runtime.engine import ahead
    from runtime.model.directory import checked_model, for_model

    ahead.compile_all(config)
    config = for_model(config)
    checked_model(config)  # what is wrong with it is wrong without Ray, too: said before anything is started
    if config.is_open:
        from runtime.tuning import choose

        config = choose.resolved(config, open_engine)
    with ExitStack() as stack:
        pool = None
        if config.parallel.num_workers > 1:
            from cluster.actors.pool import RayPool

            pool = stack.enter_context(closing(RayPool(config)))
        from runtime.engine.engine import Engine

        engine = stack.enter_context(Engine.from_config(config, pool))
        if prepare:
            engine.prepare()
        yield engine


class InProcess:
    """An engine of our own, in its loop."""

    def __init__(self, config: Config) -> None:
        self._stack = ExitStack()
        with doing("loading the model"):
            from runtime.engine.loop import EngineLoop

            self.engine = self._stack.enter_context(open_engine(config))
        self._loop = EngineLoop(self.engine)
        self._stack.callback(self._loop.close)

    def stream(
        self, prompt: Prompt, sampling: Mapping[str, Any], lookahead: Mapping[str, Any], **urgency: Any
    ) -> Iterator[Chunk]:
        defaults = self.engine.config
        request = self.engine.make_request(
            prompt, defaults.sampling.merged(sampling), defaults.lookahead.merged(lookahead, "lookahead."), **urgency
        )
        answer = _Answer(self.engine, self._loop, request)
        try:
            for chunk in answer:
                if chunk.finish_reason is FinishReason.CANCELLED:
                    raise WorkerError("the request was withdrawn")
                yield chunk
        finally:
            answer.cancel()

    def converse(self) -> Conversation:
        return LocalConversation(self.engine, self._loop)

    def cache_info(self) -> pb.CacheInfo:
        from cluster.wire.server_info import cache_info

        return cache_info(self.engine, self._loop.stats)

    def close(self) -> None:
        self._stack.close()


class _Answer(Iterator[Chunk]):
    """The chunks of a request that an engine loop runs."""

    def __init__(self, engine: Engine, loop: EngineLoop, request: Request, session: Session | None = None) -> None:
        from runtime.stops import AnswerText

        self.ended = False
        """Whether the last chunk has been read, or an error has come in its place."""
        self._loop, self._request_id = loop, request.request_id
        self._capacity = engine.capacity
        self._session = session
        requests = forks(request)
        self._texts = [
            AnswerText(engine.tokenizer, each.prompt_ids, each.sampling, each.resume_from) for each in requests
        ]
        self._outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        self._live: set[str] = set()
        try:
            for each in requests:
                loop.submit(each, self._outputs.put)
                self._live.add(each.request_id)
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Withdraw what has not ended."""
        for request_id in self._live:
            self._loop.cancel(request_id)

    def __next__(self) -> Chunk:
        if self.ended:
            raise StopIteration
        output = self._outputs.get()
        is_last = output.finish_reason is not None
        if is_last:
            self._live.discard(output.request_id)
        self.ended = not self._live
        if output.finish_reason is FinishReason.ERROR:
            self.ended = True
            raise output.failure if isinstance(output.failure, OutriderError) else WorkerError(output.error)
        if self._session is not None:
            self._session.take(output)
            if output.finish_reason is FinishReason.LENGTH and not output.usage.num_new_tokens:
                raise cache_is_full(self._capacity)
        return Chunk(
            request_id=self._request_id,
            text=self._texts[output.index].push(output),
            token_ids=output.token_ids,
            num_accepted=num_accepted(output),
            finish_reason=output.finish_reason,
            usage=output.usage if is_last else None,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            index=output.index,
        )


class LocalConversation:
    """A conversation with the engine of this process."""

    def __init__(self, engine: Engine, loop: EngineLoop) -> None:
        self._engine, self._loop = engine, loop
        self._session = loop.open_session()
        self._answer: _Answer | None = None

    def ask(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        token_ids: Sequence[int] | None = None,
        sampling: Mapping[str, Any] | None = None,
        lookahead: Mapping[str, Any] | None = None,
    ) -> Iterator[Chunk]:
        _, value = one_prompt(prompt, messages, token_ids)
        self._stop_rest()
        defaults = self._engine.config
        request = self._engine.make_request(
            value,
            defaults.sampling.merged(sampling or {}),
            defaults.lookahead.merged(lookahead or {}, "lookahead."),
            session=self._session,
        )
        self._answer = _Answer(self._engine, self._loop, request, self._session)
        return self._answer

    def stop(self) -> None:
        if self._answer is not None and not self._answer.ended:
            self._answer.cancel()

    def close(self) -> None:
        self._loop.close_session(self._session)

    def _stop_rest(self) -> None:
        self.stop()
        for _ in self._answer or ():
            pass


class Remote:
    """A server's GenerationService."""

    def __init__(
        self, address: str, token: str | None = None, tls_ca: str | None = None, patience_s: float | None = None
    ) -> None:
        """`patience_s`: how long an answer that is broken off is waited for, if not as `Client` does by itself."""
        patience = Patience() if patience_s is None else Patience(NO_LIMIT, patience_s)
        retries, patience_s = patience.retries, patience.seconds
        self._client = Client(address, token=token, tls_ca=tls_ca, retries=retries, patience_s=patience_s)

    def stream(
        self, prompt: Prompt, sampling: Mapping[str, Any], lookahead: Mapping[str, Any], **urgency: Any
    ) -> Iterator[Chunk]:
        prompt = as_prompt(prompt)
        kind = kind_of(prompt)
        given: dict[str, Any] = {"prompt" if kind == "text" else kind: prompt}
        with self._client.generate(**given, sampling=sampling, lookahead=lookahead, **urgency) as chunks:
            yield from chunks

    def converse(self) -> Conversation:
        return self._client.converse()

    def cache_info(self) -> pb.CacheInfo:
        return self._client.server_info().cache

    def close(self) -> None:
        self._client.close()
