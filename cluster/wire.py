"""Between the wire's messages and the runtime's types: requests in, responses and the server's description out."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from cluster.chunks import num_accepted
from runtime.config import Config, LookaheadConfig, SamplingParams
from runtime.engine import Engine, Prompt
from runtime.errors import InvalidRequestError
from runtime.loop import EngineLoop, LoopStats
from runtime.model.spec import ModelSpec
from runtime.pb.outrider.v1 import generation_pb2 as pb
from runtime.request import FinishReason, StepOutput, Usage

MAX_ID_LENGTH = 128

_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
}


def refuse_unknown_fields(message: Message, path: str = "") -> None:
    """Raise InvalidRequestError if the sender set a field that this version's proto does not have."""
    for unknown in UnknownFieldSet(message):
        where, problem = path or "request", f"the message has no field with number {unknown.field_number}"
        remedy = "Leave the field out, or use a server as new as the client."
        raise InvalidRequestError(where, f"field {unknown.field_number}", problem, remedy)
    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE:
            continue
        name = f"{path}.{field.name}" if path else field.name
        if field.is_repeated:
            for index, item in enumerate(value):
                refuse_unknown_fields(item, f"{name}[{index}]")
        else:
            refuse_unknown_fields(value, name)


def read_prompt(request: pb.GenerateRequest | pb.Turn) -> Prompt:
    """The prompt as `Engine.make_request` takes it. Raises InvalidRequestError if it is missing or empty."""
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequestError("prompt", None, "is missing", "Set one of text, messages and token_ids.")
    prompt: Prompt
    if kind == "text":
        prompt = request.text
    elif kind == "messages":
        prompt = [{"role": message.role, "content": message.content} for message in request.messages.messages]
    else:
        prompt = list(request.token_ids.ids)
    if not prompt:
        raise InvalidRequestError(kind, prompt, "is empty", "Send a prompt that is not empty.")
    return prompt


def read_id(request: Message, field: str) -> str | None:
    """The id that the client chose, if it did. Raises InvalidRequestError."""
    if not request.HasField(field):
        return None
    name = str(getattr(request, field))
    if not 1 <= len(name) <= MAX_ID_LENGTH:
        remedy = f"Give 1 to {MAX_ID_LENGTH} characters, or leave it out."
        raise InvalidRequestError(field, name, "is empty or too long", remedy)
    return name


def read_sampling(request: pb.GenerateRequest | pb.Turn, defaults: SamplingParams) -> SamplingParams:
    """`defaults` with the fields that the client set. Raises InvalidRequestError naming the field."""
    return defaults.merged(_set_fields(request.sampling), prefix="sampling.")


def read_lookahead(request: pb.GenerateRequest | pb.Turn, defaults: LookaheadConfig) -> LookaheadConfig:
    """`defaults` with the fields that the client set. Raises InvalidRequestError naming the field."""
    return defaults.merged(_set_fields(request.lookahead), prefix="lookahead.")


def _set_fields(message: Message) -> dict[str, Any]:
    # Lists cannot say that they are unset, so an empty one keeps the default, as the proto states.
    return {field.name: tuple(value) if field.is_repeated else value for field, value in message.ListFields()}


def response(output: StepOutput, text: str) -> pb.GenerateResponse:
    """One step's tokens; `output` must not have ended in cancellation or failure (those are statuses)."""
    return pb.GenerateResponse(request_id=output.request_id, text=text, **_step(output))


def converse_response(session_id: str, turn_index: int, output: StepOutput, text: str) -> pb.ConverseResponse:
    """One step's tokens of a turn; `output` must not have ended in failure (that is a status)."""
    return pb.ConverseResponse(session_id=session_id, turn_index=turn_index, text=text, **_step(output))


def _step(output: StepOutput) -> dict[str, Any]:
    return {
        "token_ids": output.token_ids,
        "num_accepted": num_accepted(output),
        "finish_reason": _FINISH_REASONS[output.finish_reason],
        "usage": _usage(output.usage) if output.finish_reason is not None else None,
    }


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        num_prompt_tokens=usage.num_prompt_tokens,
        num_new_tokens=usage.num_new_tokens,
        num_steps=usage.num_steps,
        tokens_per_step=usage.tokens_per_step,
        num_rows=usage.num_rows,
        rows_per_step=usage.rows_per_step,
        ttft_s=usage.ttft_s,
        latency_s=usage.latency_s,
        kept_last=usage.kept_last,
        kept_sum=usage.kept_sum,
        num_seen_tokens=usage.num_seen_tokens,
    )


def server_info(engine: Engine, loop: EngineLoop, num_refused: int) -> pb.GetServerInfoResponse:
    """What is served, how, and what has happened so far."""
    config, spec, stats, live = engine.config, engine.spec, engine.stats, loop.stats
    outcomes = {str(reason): count for reason, count in live.outcomes.items()}
    return pb.GetServerInfoResponse(
        version=version("outrider"),
        model=pb.ModelInfo(
            name=_model_name(config),
            architecture=spec.architecture,
            dtype=config.model.dtype,
            device=_device_kind(config),
            vocab_size=spec.vocab_size,
            capacity=engine.capacity,
            num_parameters=count_parameters(spec),
        ),
        mesh=pb.MeshInfo(lp=config.parallel.lp, tp=config.parallel.tp, num_workers=config.parallel.num_workers),
        lookahead=pb.LookaheadParams(**config.lookahead.model_dump()),
        sampling=pb.SamplingParams(**config.sampling.model_dump()),
        counters=pb.Counters(
            requests_by_outcome={**outcomes, "refused": num_refused},
            num_running=live.num_running,
            num_waiting=live.num_waiting,
            num_steps=stats.num_steps,
            num_tokens=stats.num_tokens,
            seconds_by_phase=dict(stats.seconds),
            uptime_s=live.uptime_s,
        ),
        cache=cache_info(engine, live),
    )


def cache_info(engine: Engine, live: LoopStats) -> pb.CacheInfo:
    """What sequences keep, what that takes, and who holds it now."""
    return pb.CacheInfo(
        **dataclasses.asdict(engine.cache_report()),
        max_sessions=engine.config.scheduler.session_limit,
        num_sessions=live.num_sessions,
    )


def _model_name(config: Config) -> str:
    if config.model.path is None:
        from runtime.model.gguf import EMBEDDED_FILE

        return f"{Path(EMBEDDED_FILE).stem} (embedded)"
    return config.model.path


def _device_kind(config: Config) -> str:
    from runtime.device import pick_device

    return pick_device(config, 0).type


def count_parameters(spec: ModelSpec) -> int:
    """Weights of the model, tied embeddings counted once."""
    hidden, query, key = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = hidden * (query + 2 * key) + query * hidden
    attention += (query + 2 * key) * spec.qkv_bias + hidden * spec.o_bias + 2 * spec.head_dim * spec.qk_norm
    mlp = 3 * hidden * spec.intermediate_size + (2 * spec.intermediate_size + hidden) * spec.mlp_bias
    layers = spec.num_layers * (attention + mlp + 2 * hidden)
    return layers + hidden + spec.vocab_size * hidden * (1 if spec.tie_embeddings else 2)
