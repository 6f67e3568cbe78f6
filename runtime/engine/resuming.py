"""Requests that are resumed: whether what the caller has of an answer can be the beginning of one."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Collection
from dataclasses import replace

from runtime.config import Config
from runtime.core import Constraint
from runtime.engine.grammar import Grammar
from runtime.errors import InvalidRequestError, OutriderError
from runtime.lookahead.sequence import Watch
from runtime.model.directory import resolve_model
from runtime.model.spec import ModelSpec
from runtime.request import Request, forks
from runtime.retention import Ledger

KEY_BYTES = 12
REMEDY = "Send all tokens that came, in their order, with the prompt and the parameters of the first call."


def identity_of(config: Config, spec: ModelSpec) -> str:
    """Stands for the model, as far as its config and its files' names and sizes tell it, its numbers and the cache."""
    try:
        files = sorted((file.name, file.stat().st_size) for file in resolve_model(config.model.path).iterdir())
    except (OutriderError, OSError):
        files = []
    return _digest(repr((spec, files, config.model.dtype, config.cache)).encode())


def check_key(identity: str, request: Request, given: str | None) -> str:
    """The key of the request's answers. Raises InvalidRequestError if the one that its caller has is another."""
    decides = identity, request.sampling.model_dump_json(), request.session_id
    key = _digest(repr(decides).encode(), array("q", request.prompt_ids).tobytes())
    if given is not None and given != key:
        problem = f"what was begun would go on otherwise here, where the key is {key}"
        remedy = "Ask a server with the same model, cache and defaults, with the same prompt and parameters."
        raise InvalidRequestError("resume_key", given, problem, remedy)
    return key


def _digest(*parts: bytes) -> str:
    found = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        found.update(part)
    return found.hexdigest()


def check(
    request: Request,
    eos_token_ids: Collection[int],
    make_ledger: Callable[[], Ledger],
    beside: Callable[[Request], tuple[Watch | None, Constraint | None]],
) -> None:
    """Raise InvalidRequestError where no answer to this request begins with what its caller has.

    `beside` makes what looks at the text of an answer, new each time.
    """
    if not request.so_far:
        return
    indices = [so_far.index for so_far in request.so_far]
    for index in indices:
        if not 0 <= index < request.sampling.n:
            problem = f"names answer {index}, and {request.sampling.n} are asked for"
            raise InvalidRequestError("resume_from.index", index, problem, REMEDY)
        if indices.count(index) > 1:
            raise InvalidRequestError("resume_from.index", index, f"answer {index} stands there twice", REMEDY)
    if all(so_far.has_ended for so_far in request.so_far) and len(indices) == request.sampling.n:
        problem, remedy = "says that every answer has ended", "There is nothing to resume."
        raise InvalidRequestError("resume_from.has_ended", True, problem, remedy)
    for each in forks(request):
        if each.resume_from:
            _check_one(each, eos_token_ids, make_ledger(), *beside(replace(each, so_far=())))


def _check_one(
    request: Request, eos_token_ids: Collection[int], ledger: Ledger, watch: Watch | None, constraint: Constraint | None
) -> None:
    given, sampling = request.resume_from, request.sampling
    shown = f"{len(given)} tokens"
    if len(given) >= sampling.max_new_tokens:
        problem = f"the answer was whole with sampling.max_new_tokens = {sampling.max_new_tokens}"
        raise InvalidRequestError("resume_from", shown, problem, REMEDY)
    ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)}
    if found := ends.intersection(given):
        problem = f"token {min(found)} ends an answer, so there is nothing behind it"
        raise InvalidRequestError("resume_from", shown, problem, REMEDY)
    if watch is not None and (end := watch.first_end(given)) is not None:
        problem = f"a text of sampling.stop is complete with its token {end}, so the answer has ended"
        raise InvalidRequestError("resume_from", shown, problem, REMEDY)
    if isinstance(constraint, Grammar):
        constraint.accept(given)
        if constraint.error is not None:
            assert sampling.structure is not None
            problem = f"is not what sampling.{sampling.structure[0]} allows"
            raise InvalidRequestError("resume_from", shown, problem, REMEDY)
    text = (*request.prompt_ids, *given)
    if request.session_id is None and ledger.full_at(text) < len(text):
        raise InvalidRequestError("resume_from", shown, "the answer ended with them: the cache was full", REMEDY)
