"""What the server's calls share: how an error ends one, and a request's outputs as text, step by step."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from typing import NoReturn

import grpc

from cluster.serving import logs
from cluster.serving.visits import Visit
from cluster.wire.statuses import status_of, told
from runtime.engine.loop import EngineLoop
from runtime.errors import WorkerError
from runtime.request import FinishReason, Request, StepOutput
from runtime.stops import AnswerText
from runtime.tokenizer import Tokenizer

log = logging.getLogger(__name__)


async def abort(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    """End the call with the status of `error`; a defect is logged."""
    code = status_of(error)
    text = told(error)
    if code is grpc.StatusCode.INTERNAL:
        logs.defect(log, error)
        text = f"internal error ({type(error).__name__}); the server's log says where"
    await context.abort(code, text)
    raise AssertionError("abort raises")


class Running:
    """Requests that run, from `with` on: iterated over, each step's output of each, and the text that became certain
    with it. Leaving the `with` withdraws what still runs.

    Entering raises LimitError, and what `EngineLoop.submit` raises, and then none of them runs. Iterating raises
    NumericsError if the model gives no numbers, and WorkerError if the workers fail, or if the server shuts down
    meanwhile, unless `may_be_cancelled`: then that a request was cancelled is an output like others.
    """

    def __init__(
        self,
        loop: EngineLoop,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        visit: Visit,
        may_be_cancelled: bool = False,
    ) -> None:
        """`requests`: each is for one answer (runtime.request.forks)."""
        self._loop, self._tokenizer, self._requests, self._visit = loop, tokenizer, requests, visit
        self._within = ExitStack()
        self._may_be_cancelled = may_be_cancelled
        self._events = asyncio.get_running_loop()
        # At most max_new_tokens outputs ever wait here for each answer, so a slow reader holds up nobody but itself.
        self._outputs: asyncio.Queue[StepOutput] = asyncio.Queue()
        self._live: set[str] = set()
        self._texts: dict[str, AnswerText] = {}

    def __enter__(self) -> AsyncIterator[tuple[StepOutput, str]]:
        self._within.enter_context(self._visit.account.request(len(self._requests)))
        try:
            for request in self._requests:
                self._live.add(request.request_id)
                try:
                    self._loop.submit(request, self._on_output)
                except BaseException:
                    self._live.discard(request.request_id)
                    raise
        except BaseException:
            self._withdraw()
            raise
        self._visit.admit(self._requests, self._tokenizer)
        return self._read()

    def __exit__(self, *_: object) -> None:
        self._withdraw()

    def _withdraw(self) -> None:
        self._within.close()
        for request_id in list(self._live):  # the others' ids may be of other requests by now
            self._loop.cancel(request_id)

    def _on_output(self, output: StepOutput) -> None:
        if output.finish_reason is not None:
            self._live.discard(output.request_id)
        self._events.call_soon_threadsafe(self._outputs.put_nowait, output)

    async def _read(self) -> AsyncIterator[tuple[StepOutput, str]]:
        texts = {
            each.request_id: AnswerText(self._tokenizer, each.prompt_ids, each.sampling, each.resume_from)
            for each in self._requests
        }
        num_unfinished = len(texts)
        while num_unfinished:
            output = await self._outputs.get()
            if output.finish_reason is FinishReason.ERROR:
                assert output.failure is not None
                raise output.failure
            if output.finish_reason is FinishReason.CANCELLED and not self._may_be_cancelled:
                # A client that cancels does not get here; this is `GenerationServer.stop`.
                raise WorkerError("the server shut down before the text had ended")
            num_unfinished -= output.finish_reason is not None
            text = texts[output.request_id].push(output)
            self._visit.take(output, text)
            yield output, text
