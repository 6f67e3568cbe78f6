"""The policy as transformers' attention: one name, registered as attention function and as mask function.

Both are needed. A model whose attention function has no mask function of its name is given no mask at all, and its
tokens see the future. What a batch's masks are made from does not fit through a model's arguments, so it is announced
(`announced`) around the call; a mask that is asked for without it is an error, never a plain causal one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, flex_attention_mask, sdpa_mask

from runtime.training.visibility import Marks

NAME = "outrider"
Kind = Literal["dense", "flex"]


@dataclass(frozen=True)
class Announced:
    marks: Marks
    kind: Kind


_announced: ContextVar[Announced | None] = ContextVar("announced", default=None)


@contextmanager
def announced(marks: Marks, kind: Kind) -> Iterator[None]:
    """The marks of the batch that a model computes in this block."""
    token = _announced.set(Announced(marks, kind))
    try:
        yield
    finally:
        _announced.reset(token)


@dataclass(frozen=True)
class Masks:
    """What the mask function hands to the attention function: of each rule, the mask that its layers want."""

    of_rule: tuple[Any, ...]
    """[B, 1, T, T] bool, or a BlockMask."""
    rule_of: dict[int, int]
    kind: Kind


def register() -> None:
    """Make NAME known to transformers. Idempotent."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, masks)


def masks(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    **options: Any,
) -> Masks:
    """What the model itself hides (`mask_function`: the future, what is beyond a sliding window of its own), and what
    the policy does."""
    batch = _announced.get()
    if batch is None:
        raise RuntimeError(f"attention {NAME!r}: no batch is announced (runtime.training.attention.announced)")
    shape = tuple(batch.marks.documents.shape)
    if (batch_size, q_length, kv_length, q_offset, kv_offset) != (*shape, shape[1], 0, 0):
        raise RuntimeError(f"attention {NAME!r}: the batch announced has shape {shape}, not {batch_size} x {q_length}")
    make = flex_attention_mask if batch.kind == "flex" else sdpa_mask
    settings = {**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}

    def of_rule(rule: int) -> Any:
        def sees(sample: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
            return batch.marks.sees(rule, sample, query, key)

        function = and_masks(mask_function, sees)
        return make(batch_size, q_length, kv_length, mask_function=function, **settings)

    return Masks(tuple(map(of_rule, range(len(batch.marks.windows)))), batch.marks.rule_of, batch.kind)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The layer's mask is chosen; the rest is transformers' own."""
    if not isinstance(attention_mask, Masks):
        raise RuntimeError(f"attention {NAME!r}: layer {module.layer_idx} got no masks of its mask function")
    mask = attention_mask.of_rule[attention_mask.rule_of[module.layer_idx]]  # type: ignore[index]
    forward = flex_attention_forward if attention_mask.kind == "flex" else sdpa_attention_forward
    return forward(module, query, key, value, mask, **options)
