"""What the server's calls share: how an error ends one, and a request's outputs as text, step by step."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import NoReturn

import grpc

from cluster.wire.statuses import status_of
from runtime.engine.loop import EngineLoop
from runtime.request import FinishReason, Request, StepOutput
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
    """Run a request: each step's output, and the text that became certain with it.

    Raises what `EngineLoop.submit` raises, NumericsError if the model gives no numbers, and WorkerError if the workers
    fail meanwhile; that the request was cancelled is an output like others. Leaving early (close the iterator)
    withdraws the request.
    """
    events = asyncio.get_running_loop()
    # At most max_new_tokens outputs ever wait here, so a slow reader holds up nobody but itself.
    outputs: asyncio.Queue[StepOutput] = asyncio.Queue()
    ended = False

    def on_output(output: StepOutput) -> None:
        nonlocal ended
        ended = output.finish_reason is not None
        events.call_soon_threadsafe(outputs.put_nowait, output)

    loop.submit(request, on_output)
    try:
        shown = AnswerText(tokenizer, request.prompt_ids, request.sampling)
        last = False
        while not last:
            output = await outputs.get()
            if output.finish_reason is FinishReason.ERROR:
                assert output.failure is not None
                raise output.failure
            last = output.finish_reason is not None
            yield output, shown.push(output)
    finally:
        if not ended:  # else its id may be another's by now
            loop.cancel(request.request_id)
