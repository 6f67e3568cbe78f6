"""Two oracles for the cache policies, simple and slow on purpose; they share no code with the runtime.

`seen` says which tokens a token sees and how far away each seems, by playing the cache with lists, one token at
a time. `Dense` runs a whole text through a Llama, Qwen2 or Qwen3 model in float64 with an explicit mask and explicit
distances, whatever they are. Together they give the logits that a streaming cache must give.

`cache` is the run's `cache` section as a mapping, separators as token ids, every setting that is not at its default
given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

SEPARATORS = (5, 9, 77)

_STREAMING = {"policy": "sep", "design": "streaming", "separators": SEPARATORS}
_SMALL = _STREAMING | {"num_initial": 3, "max_separators": 4, "local": 8, "capacity": 20}
POLICIES: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "sink": {"policy": "sink", "num_sinks": 4, "window": 12},
    "sink-original": {"policy": "sink", "num_sinks": 4, "window": 12, "positions": "original"},
    "sink-none": {"policy": "sink", "num_sinks": 0, "window": 9},
    "sink-many": {"policy": "sink", "num_sinks": 21, "window": 8},
    "sep": {"policy": "sep", "separators": SEPARATORS, "num_initial": 3, "num_neighbors": 8},
    "sep-no-initial": {"policy": "sep", "separators": SEPARATORS, "num_initial": 0, "num_neighbors": 11},
    "streaming": _SMALL,
    "streaming-after": _SMALL | {"compact_at": "after"},
    "streaming-original": _SMALL | {"positions": "original"},
    "streaming-after-original": _SMALL | {"compact_at": "after", "positions": "original"},
    "streaming-tight": _STREAMING | {"num_initial": 2, "max_separators": 5, "local": 8, "capacity": 16},
    "streaming-no-initial": _STREAMING | {"num_initial": 0, "max_separators": 3, "local": 9, "capacity": 17},
    "streaming-recent": _STREAMING | {"num_initial": 0, "max_separators": 0, "local": 8, "capacity": 16},
}
"""Every policy, so small that texts of a few dozen tokens are evicted and compacted many times."""


def some_text(length: int, seed: int = 0, separators: float = 0.2, vocabulary: int = 101) -> list[int]:
    """Random ids, about this share of them separators."""
    rng = np.random.default_rng(seed)
    others = np.setdiff1d(np.arange(vocabulary), SEPARATORS)
    drawn = np.where(rng.random(length) < separators, rng.choice(SEPARATORS, length), rng.choice(others, length))
    return drawn.tolist()


Seen = list[dict[int, int]]
"""For every position of a text: the positions it sees, itself included, each with its rotary distance."""

DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("full", ""): {},
    ("sink", ""): {"num_sinks": 4, "window": 1020, "positions": "slot", "evict": "token"},
    ("sep", "fundamental"): {"num_initial": 4, "num_neighbors": 256},
    ("sep", "streaming"): {
        "num_initial": 4,
        "max_separators": 64,
        "local": 256,
        "capacity": 800,
        "compact_at": "before",
        "positions": "slot",
        "evict": "token",
    },
}


def seen(cache: Mapping[str, Any], tokens: Sequence[int], turns: Mapping[int, int] | None = None) -> Seen:
    """What each of `tokens` sees under a policy.

    `turns`, read where `evict` is `turn`: the position at which each turn starts, and how many tokens are to come in
    it.
    Raises OverflowError where a turn does not fit.
    """
    policy = cache["policy"]
    design = cache.get("design", "fundamental") if policy == "sep" else ""
    settings = DEFAULTS[policy, design] | dict(cache)
    separators = set(settings.get("separators", ()))
    if policy == "full":
        return [{j: p - j for j in range(p + 1)} for p in range(len(tokens))]
    if design == "fundamental":
        return [_fundamental(settings, tokens, separators, p) for p in range(len(tokens))]
    store = Sink(settings) if policy == "sink" else Separators(settings, tokens, separators)
    found: Seen = []
    for p in range(len(tokens)):
        if settings["evict"] == "turn" and turns and p in turns:
            store.start_turn(turns[p])
        store.add(p)
        query = store.stored.index(p)
        found.append(
            {j: p - j if settings["positions"] == "original" else query - slot for slot, j in enumerate(store.stored)}
        )
        if settings["evict"] == "token":
            store.after_attention()
    return found


def _fundamental(settings: Mapping[str, Any], tokens: Sequence[int], separators: set[int], p: int) -> dict[int, int]:
    visible = {}
    for j in range(p + 1):
        is_initial = j < settings["num_initial"]
        is_separator = tokens[j] in separators
        is_neighbor = p - j < settings["num_neighbors"]
        if is_initial or is_separator or is_neighbor:
            visible[j] = p - j
    return visible


class Sink:
    """StreamingLLM's cache: the positions it holds, oldest first. The newest has entered when attention runs."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.num_sinks, self.window, self.evict = settings["num_sinks"], settings["window"], settings["evict"]
        self.stored: list[int] = []

    def add(self, p: int) -> None:
        self.stored.append(p)
        if self.evict == "token" and len(self.stored) > self.num_sinks + self.window:
            del self.stored[self.num_sinks]

    def after_attention(self) -> None:
        pass

    def start_turn(self, coming: int) -> None:
        size = self.num_sinks + self.window
        while len(self.stored) + coming > size and len(self.stored) > self.num_sinks:
            del self.stored[self.num_sinks]
        if len(self.stored) + coming > size:
            raise OverflowError(f"{coming} tokens to come do not fit")


class Separators:
    """SepLLM's streaming cache: initial tokens, kept separators, and a run of recent tokens."""

    def __init__(self, settings: Mapping[str, Any], tokens: Sequence[int], separators: set[int]) -> None:
        self.settings, self.tokens, self.separators = settings, tokens, separators
        self.initial: list[int] = []
        self.kept: list[int] = []
        self.recent: list[int] = []

    @property
    def stored(self) -> list[int]:
        return self.initial + self.kept + self.recent

    def add(self, p: int) -> None:
        (self.initial if p < self.settings["num_initial"] else self.recent).append(p)

    def after_attention(self) -> None:
        late = self.settings["compact_at"] == "after"
        if len(self.stored) == self.settings["capacity"] + late:
            self.compact()

    def start_turn(self, coming: int) -> None:
        if len(self.stored) + coming > self.settings["capacity"]:
            self.compact()
        if len(self.stored) + coming > self.settings["capacity"]:
            raise OverflowError(f"{coming} tokens to come do not fit")

    def compact(self) -> None:
        past = []
        while len(self.recent) > self.settings["local"]:
            past.append(self.recent.pop(0))
        self.kept += [j for j in past if self.tokens[j] in self.separators]
        while len(self.kept) > self.settings["max_separators"]:
            self.kept.pop(0)


def kept_ratios(views: Seen) -> tuple[float, float]:
    """How much of the text is seen: by its last token, and over all its tokens together."""
    sizes = [len(view) for view in views]
    return sizes[-1] / len(sizes), sum(sizes) / sum(range(1, len(sizes) + 1))


class Dense:
    """A small model in float64: every token of a text at once, with any mask and any distances.

    Raises ValueError for rotary scalings whose frequencies depend on the length.
    """

    def __init__(self, directory: str | Path) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.config = config = model.config
        self.weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kind, theta = config.rope_parameters["rope_type"], config.rope_parameters["rope_theta"]
        if kind == "dynamic":
            raise ValueError("dynamic RoPE has no fixed frequencies")
        if kind == "default":
            exponents = torch.arange(0, self.head_dim, 2).float() / self.head_dim
            frequencies, self.rope_scale = 1.0 / theta**exponents, 1.0
        else:
            frequencies, self.rope_scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        self.frequencies = frequencies.double()  # [d / 2], rounded to float32 as Hugging Face has them

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], views: Seen, full_layers: Sequence[int] = ()) -> torch.Tensor:
        """[t, V]: the logits at every position. Layers in `full_layers` see every token before at its true distance."""
        config, num_layers = self.config, self.config.num_hidden_layers
        limited, unlimited = self._attends(views), self._attends(seen({"policy": "full"}, tokens))
        whole = {layer % num_layers for layer in full_layers}
        hidden = self.weights["model.embed_tokens.weight"][torch.tensor(list(tokens))]
        for layer in range(num_layers):
            name = f"model.layers.{layer}"
            normed = self._norm(hidden, f"{name}.input_layernorm")
            hidden = hidden + self._attention(normed, f"{name}.self_attn", *(unlimited if layer in whole else limited))
            normed = self._norm(hidden, f"{name}.post_attention_layernorm")
            gate = torch.nn.functional.silu(self._linear(normed, f"{name}.mlp.gate_proj"))
            hidden = hidden + self._linear(gate * self._linear(normed, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        return self._linear(self._norm(hidden, "model.norm"), head)

    def _attends(self, views: Seen) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask [t, t] and rotations [t, t, d / 2] of every query and key."""
        count = len(views)
        mask, distances = torch.zeros(count, count, dtype=torch.bool), torch.zeros(count, count, dtype=torch.float64)
        for query, view in enumerate(views):
            for key, distance in view.items():
                mask[query, key], distances[query, key] = True, distance
        angles = distances[..., None] * self.frequencies
        return mask, torch.polar(torch.full_like(angles, self.rope_scale**2), angles)

    def _attention(self, hidden: torch.Tensor, name: str, mask: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        config = self.config
        groups = config.num_attention_heads // config.num_key_value_heads
        query, key, value = (
            self._linear(hidden, f"{name}.{part}_proj").unflatten(-1, (-1, self.head_dim)) for part in "qkv"
        )
        if f"{name}.q_norm.weight" in self.weights:
            query, key = self._norm(query, f"{name}.q_norm"), self._norm(key, f"{name}.k_norm")
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        # A pair (i, i + d/2) is a complex number; q at m and k at n have the product Re(q conj(k) e^(i f (m - n))).
        query, key = (torch.complex(*heads.chunk(2, -1)) for heads in (query, key))
        scores = torch.einsum("ihf,jhf,ijf->hij", query, key.conj(), turns).real * self.head_dim**-0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return self._linear(torch.einsum("hij,jhd->ihd", weights, value).flatten(1), f"{name}.o_proj")

    def _linear(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(hidden, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        scale = (hidden.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt()
        return hidden * scale * self.weights[f"{name}.weight"]

    def gap_under(self, cache: Mapping[str, Any]) -> Callable[[Sequence[int], int, int], float]:
        """Distance of two tokens' logits behind a context under a policy, for runtime.equality."""

        def gap_of(context: Sequence[int], one: int, other: int) -> float:
            logits = self.logits(context, seen(cache, context), cache.get("full_layers", ()))[-1]
            return abs(float(logits[one] - logits[other]))

        return gap_of
