"""Where answers come from: an engine in this process (its mesh on Ray), or a server. One interface for both."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from cluster.client import Chunk, Client, num_accepted
from runtime.config import Config
from runtime.errors import WorkerError
from runtime.request import FinishReason, StepOutput

if TYPE_CHECKING:
    from runtime.engine import Engine, Prompt


class Backend(Protocol):
    """Safe to use from several threads."""

    def stream(self, prompt: Prompt, sampling: Mapping[str, Any], lookahead: Mapping[str, Any]) -> Iterator[Chunk]:
        """Continue a prompt; parameters not named are the engine's or server's defaults.

        Raises InvalidRequestError, ResourceExhaustedError or WorkerError. Leaving early withdraws the request.
        """

    def close(self) -> None:
        """End what is running and let go of everything. Idempotent."""


@contextmanager
def open_engine(config: Config) -> Iterator[Engine]:
    """An engine in this process: alone where the mesh is 1x1, else with its workers on Ray."""
    from runtime.engine import Engine
    from runtime.model.loader import load_spec, resolve_model

    if config.parallel.num_workers == 1:
        with Engine.from_config(config) as engine:
            yield engine
        return
    # What is wrong with the model is wrong without Ray too: say so before anything is started.
    load_spec(resolve_model(config.model.path)).check_tp(config.parallel.tp)
    from cluster.pool import RayPool

    pool = RayPool(config)
    try:
        with Engine.from_config(config, pool) as engine:
            yield engine
    finally:
        pool.close()


class InProcess:
    """An engine of our own, in its loop."""

    def __init__(self, config: Config) -> None:
        from runtime.loop import EngineLoop

        self._stack = ExitStack()
        self.engine = self._stack.enter_context(open_engine(config))
        self._loop = EngineLoop(self.engine)
        self._stack.callback(self._loop.close)

    def stream(self, prompt: Prompt, sampling: Mapping[str, Any], lookahead: Mapping[str, Any]) -> Iterator[Chunk]:
        from runtime.tokenizer import Detokenizer

        defaults = self.engine.config
        request = self.engine.make_request(
            prompt, defaults.sampling.merged(sampling), defaults.lookahead.merged(lookahead, "lookahead.")
        )
        outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        self._loop.submit(request, outputs.put)
        detokenizer = Detokenizer(self.engine.tokenizer)
        finished = False
        try:
            while not finished:
                output = outputs.get()
                finished = output.finish_reason is not None
                if output.finish_reason in (FinishReason.ERROR, FinishReason.CANCELLED):
                    raise WorkerError(output.error or "the request was withdrawn")
                text = detokenizer.push(output.text_ids) + (detokenizer.flush() if finished else "")
                yield Chunk(
                    request_id=output.request_id,
                    text=text,
                    token_ids=output.token_ids,
                    num_accepted=num_accepted(output),
                    finish_reason=output.finish_reason,
                    usage=output.usage if finished else None,
                )
        finally:
            if not finished:
                self._loop.cancel(request.request_id)

    def close(self) -> None:
        self._stack.close()


class Remote:
    """A server's GenerationService."""

    def __init__(self, address: str) -> None:
        self._client = Client(address)

    def stream(self, prompt: Prompt, sampling: Mapping[str, Any], lookahead: Mapping[str, Any]) -> Iterator[Chunk]:
        given: dict[str, Any]
        if isinstance(prompt, str):
            given = {"prompt": prompt}
        elif prompt and isinstance(prompt[0], Mapping):
            given = {"messages": prompt}
        else:
            given = {"token_ids": prompt}
        with self._client.generate(**given, sampling=sampling, lookahead=lookahead) as chunks:
            yield from chunks

    def close(self) -> None:
        self._client.close()
