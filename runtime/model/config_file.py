"""config.json and generation_config.json as they were written: every value that a model depends on is looked at
before transformers reads it, which fills in a default of its own for what is missing and for much of what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.errors import ConfigError

COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
MOST_LAYERS = 10_000
"""More is a broken file, and would take its time to be found out."""
OPTIONAL_COUNTS = ("num_key_value_heads", "head_dim", "sliding_window", "max_window_layers")
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)


class Values:
    """The object in a JSON file; refuses by the file's name and the key's."""

    def __init__(self, raw: Mapping[str, Any], name: str, source: Path) -> None:
        self.raw, self.name, self.source = raw, name, source

    def refused(self, key: str, problem: str) -> ConfigError:
        """An error about one key, `a.b` being key b of object a."""
        value: Any = self.raw
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return ConfigError(self.name, str(self.source), f"{key} = {value!r:.60} {problem}", "Mend the file.")

    def check(
        self, norm_eps: str = "rms_norm_eps", may_be_partial: bool = False, layer_types: tuple[str, ...] = ()
    ) -> None:
        """`norm_eps`: the key of what norms add to a variance; `may_be_partial`: heads may be rotated in part;
        `layer_types`: those whose layers may have a rotation of their own.

        Raises ConfigError for a value that is missing, or is not what its key wants."""
        for key in (*COUNTS, norm_eps):
            if key not in self.raw:
                raise ConfigError(self.name, str(self.source), f"{key} is missing", "Mend the file.")
        for key in (*COUNTS, *OPTIONAL_COUNTS):
            value: Any = self.raw.get(key)
            if value is None and key not in COUNTS:
                continue
            least = 0 if key == "max_window_layers" else 1
            if not _is_number(value) or value != int(value) or value < least:
                raise self.refused(key, "is not a positive whole number")
        if self.raw["num_hidden_layers"] > MOST_LAYERS:
            raise self.refused("num_hidden_layers", f"is more than {MOST_LAYERS}")
        for key in SWITCHES:
            if key in self.raw and not isinstance(self.raw[key], bool):
                raise self.refused(key, "is neither true nor false")
        if not _is_number(self.raw[norm_eps]) or self.raw[norm_eps] < 0:
            raise self.refused(norm_eps, "is not a number of at least 0")
        if "hidden_act" in self.raw and not isinstance(self.raw["hidden_act"], str):
            raise self.refused("hidden_act", "is not a name")
        heads, width = self.raw["num_attention_heads"], self.raw["hidden_size"]
        if self.raw.get("head_dim") is None and width % heads:
            raise self.refused("hidden_size", f"(the hidden size) is not a multiple of num_attention_heads = {heads}")
        if (self.raw.get("head_dim") or width // heads) % 2:
            raise self.refused("head_dim", "is odd, and features are rotated in pairs")
        self._check_rope(may_be_partial, layer_types)

    def _check_rope(self, may_be_partial: bool, layer_types: tuple[str, ...]) -> None:
        for key in ("partial_rotary_factor", "rotary_pct"):
            if may_be_partial and self.raw.get(key) is not None:
                self._positive(key)
                if self.raw[key] > 1:
                    raise self.refused(key, "is more than 1")
            elif self.raw.get(key) not in (None, 1):
                raise self.refused(key, "is not supported: heads are rotated whole")
        for key in ("rope_theta", "rotary_emb_base", "rope_local_base_freq", "query_pre_attn_scalar"):
            if key in self.raw:
                self._positive(key)
        newer, older = self.raw.get("rope_parameters"), self.raw.get("rope_scaling")
        if newer and older and newer != older:
            raise self.refused("rope_scaling", "says otherwise than rope_parameters")
        for key in ("rope_parameters", "rope_scaling"):
            given = self.raw.get(key)
            if given is None:
                continue
            if not isinstance(given, Mapping):
                raise self.refused(key, "is not an object")
            by_layer = bool(layer_types) and any(isinstance(value, Mapping) for value in given.values())
            if by_layer and set(given) != set(layer_types):
                raise self.refused(key, f"has not the keys {' and '.join(layer_types)}")
            for part in [f"{key}.{name}" for name in given] if by_layer else [key]:
                self._check_rotation(part)

    def _check_rotation(self, key: str) -> None:
        """One object under rope_parameters or rope_scaling, or that of some layers there."""
        given: Any = self.raw
        for part in key.split("."):
            given = given[part]
        if not isinstance(given, Mapping):
            raise self.refused(key, "is not an object")
        for name, value in given.items():
            if isinstance(value, Mapping):
                raise self.refused(f"{key}.{name}", "is for some layers only, which is not supported")
        kind = given.get("rope_type", given.get("type", "default"))
        if not isinstance(kind, str):
            raise self.refused(f"{key}.rope_type", "is not a name")
        theta = given.get("rope_theta")
        if theta is not None and "." not in key and self.raw.get("rope_theta", theta) != theta:
            raise self.refused(f"{key}.rope_theta", f"says otherwise than rope_theta = {self.raw['rope_theta']!r}")
        if given.get("type", kind) != kind:
            raise self.refused(f"{key}.type", f"says otherwise than rope_type = {kind!r}")
        if kind == "default" and given.get("factor") not in (None, 1):
            raise self.refused(f"{key}.factor", "goes with a rope_type, such as linear, and there is none")
        if not isinstance(given.get("truncate", True), bool):
            raise self.refused(f"{key}.truncate", "is neither true nor false")
        for number in ROPE_NUMBERS:
            if number in given and not (given[number] is None and number not in ROPE_NEEDS.get(kind, ())):
                self._positive(f"{key}.{number}")
        for needed in ROPE_NEEDS.get(kind, ()):
            if needed not in given and not (needed.startswith("original_") and needed in self.raw):
                raise self.refused(f"{key}.{needed}", f"is missing, and {kind} scaling needs it")
        factor = given.get("factor")
        if factor is not None and factor < 1:
            raise self.refused(f"{key}.factor", "is below 1")
        if kind == "llama3" and not given["low_freq_factor"] < given["high_freq_factor"]:
            raise self.refused(f"{key}.low_freq_factor", "is not below high_freq_factor")

    def _positive(self, key: str) -> None:
        value: Any = self.raw
        for part in key.split("."):
            value = value[part]
        if not _is_number(value) or value <= 0:
            raise self.refused(key, "is not a positive number")

    def end_tokens(self, vocab_size: int) -> tuple[int, ...]:
        """The ids under eos_token_id, ascending; none where the key is missing, null or an empty list."""
        given = self.raw.get("eos_token_id")
        ids = given if isinstance(given, list) else [] if given is None else [given]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise self.refused("eos_token_id", f"is not a token id, or a list of them, from 0 to {vocab_size - 1}")
        return tuple(sorted(set(ids)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
