"""What the server's calls share: how an error ends one, and a request's outputs as text, step by step."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import NoReturn

import grpc

from cluster.wire.statuses import status_of
from runtime.engine.loop import EngineLoop
from runtime.request import FinishReason, Request, StepOutput, forks
from runtime.stops import AnswerText
from runtime.tokenizer import Tokenizer

log = logging.getLogger(__name__)


async def abort(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    """End the call with the status of `error`; a defect is logged."""
    code = status_of(error)
    text = str(error)
    if code is grpc.StatusCode.INTERNAL:
        log.error("a request failed", exc_info=error)
        text = f"internal error ({type(error).__name__}: {error}); the server's log has the details"
    await context.abort(code, text)
    raise AssertionError("abort raises")


async def answer(loop: EngineLoop, tokenizer: Tokenizer, request: Request) -> AsyncGenerator[tuple[StepOutput, str]]:
    """Run a request: each step's output, of each of its answers, and the text that became certain with it.

    Raises what `EngineLoop.submit` raises, NumericsError if the model gives no numbers, and WorkerError if the workers
    fail meanwhile; that the request was cancelled is an output like others. Leaving early (close the iterator)
    withdraws the request.
    """
    events = asyncio.get_running_loop()
    # At most max_new_tokens outputs ever wait here for each answer, so a slow reader holds up nobody but itself.
    outputs: asyncio.Queue[StepOutput] = asyncio.Queue()
    live: set[str] = set()

    def on_output(output: StepOutput) -> None:
        if output.finish_reason is not None:
            live.discard(output.request_id)
        events.call_soon_threadsafe(outputs.put_nowait, output)

    requests = forks(request)
    try:
        for each in requests:
            live.add(each.request_id)
            try:
                loop.submit(each, on_output)
            except BaseException:
                live.discard(each.request_id)
                raise
        texts = [AnswerText(tokenizer, each.prompt_ids, each.sampling, each.resume_from) for each in requests]
        shown_of = {each.index: text for each, text in zip(requests, texts, strict=True)}
        num_unfinished = len(requests)
        while num_unfinished:
            output = await outputs.get()
            if output.finish_reason is FinishReason.ERROR:
                assert output.failure is not None
                raise output.failure
            num_unfinished -= output.finish_reason is not None
            yield replace(output, request_id=request.request_id), shown_of[output.index].push(output)
    finally:
        for request_id in list(live):  # the others' ids may be of other requests by now
            loop.cancel(request_id)
