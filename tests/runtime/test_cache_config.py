"""The cache section of the config: every policy's settings, and refusals that name the field and the way out."""

from __future__ import annotations

import pytest

from runtime import Config, Engine
from runtime.errors import ConfigError
from runtime.tokenizer import Tokenizer

FUNDAMENTAL = {"policy": "sep", "design": "fundamental"}
STREAMING = {"policy": "sep", "design": "streaming"}


def cache(**settings):
    return Config.from_dict({"cache": settings}).cache


def test_settings_left_out_take_the_papers_values() -> None:
    assert cache().policy == "full"
    sink = cache(policy="sink")
    assert (sink.num_sinks, sink.window, sink.positions, sink.evict) == (4, 1020, "slot", "token")
    fundamental = cache(policy="sep")
    assert fundamental == cache(**FUNDAMENTAL)
    assert (fundamental.num_initial, fundamental.num_neighbors, fundamental.separators) == (4, 256, "paper")
    assert (fundamental.merged_separators, fundamental.full_layers, fundamental.positions) == (False, (), "original")
    streaming = cache(**STREAMING)
    assert (streaming.num_initial, streaming.max_separators, streaming.local, streaming.capacity) == (4, 64, 256, 800)
    assert (streaming.compact_at, streaming.positions, streaming.evict) == ("before", "slot", "token")


@pytest.mark.parametrize("settings", [{}, {"policy": "sink"}, FUNDAMENTAL, STREAMING], ids=str)
def test_a_config_survives_being_written_and_read(settings) -> None:
    config = Config.from_dict({"cache": settings})
    assert Config.from_dict(config.model_dump()) == config
    assert config.cache.merged({}) == config.cache


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"policy": "lru"}, "policy"),
        ({"policy": ["sink"]}, "policy"),
        ({"policy": "sep", "design": "other"}, "design"),
        # settings of another policy or design
        ({"window": 100}, "window"),
        ({"positions": "slot"}, "positions"),
        ({"evict": "turn"}, "evict"),
        ({"policy": "sink", "capacity": 100}, "capacity"),
        ({"policy": "sink", "design": "streaming"}, "design"),
        ({"policy": "sink", "separators": "paper"}, "separators"),
        ({**FUNDAMENTAL, "window": 100}, "window"),
        ({**FUNDAMENTAL, "local": 100}, "local"),
        ({**FUNDAMENTAL, "evict": "turn"}, "evict"),
        ({**FUNDAMENTAL, "positions": "slot"}, "positions"),
        ({**FUNDAMENTAL, "compact_at": "after"}, "compact_at"),
        ({**STREAMING, "num_neighbors": 100}, "num_neighbors"),
        ({**STREAMING, "full_layers": [0]}, "full_layers"),
        ({**STREAMING, "num_sinks": 4}, "num_sinks"),
        # sizes that cannot be
        ({"capacity": 0}, "capacity"),
        ({"policy": "sink", "num_sinks": -1}, "num_sinks"),
        ({"policy": "sink", "window": 0}, "window"),
        ({**FUNDAMENTAL, "num_initial": -1}, "num_initial"),
        ({**FUNDAMENTAL, "num_neighbors": 0}, "num_neighbors"),
        ({**STREAMING, "max_separators": -1}, "max_separators"),
        ({**STREAMING, "local": 0}, "local"),
        ({**STREAMING, "capacity": 4 + 64 + 256}, "capacity"),
        ({**STREAMING, "local": 800}, "capacity"),
        # values that are none
        ({"policy": "sink", "positions": "rotated"}, "positions"),
        ({"policy": "sink", "evict": "never"}, "evict"),
        ({**STREAMING, "compact_at": "during"}, "compact_at"),
        ({**FUNDAMENTAL, "separators": "commas"}, "separators"),
        ({**FUNDAMENTAL, "separators": [".", 5]}, "separators"),
        ({**FUNDAMENTAL, "separators": 5}, "separators"),
        ({**FUNDAMENTAL, "full_layers": [1, 1]}, "full_layers"),
        ({"windows": 100}, "windows"),
    ],
    ids=str,
)
def test_contradictions_name_the_field_and_the_remedy(settings, field) -> None:
    with pytest.raises(ConfigError) as error:
        cache(**settings)
    assert error.value.field == f"cache.{field}" and error.value.remedy


def test_one_more_than_its_parts_is_room_enough() -> None:
    assert cache(**STREAMING, capacity=4 + 64 + 256 + 1).capacity == 325
    assert cache(**STREAMING, num_initial=0, max_separators=0, local=8, capacity=16).capacity == 16


@pytest.mark.parametrize(
    ("settings", "field", "named"),
    [
        ({"full_layers": [3]}, "full_layers", "3"),
        ({"full_layers": [0, -4]}, "full_layers", "-4"),
        ({"separators": [".", "。"]}, "separators", "。"),  # three tokens of the byte-level tokenizer
        ({"separators": ["ab"]}, "separators", "ab"),
        ({"separators": [46, 262]}, "separators", "262"),
        ({"separators": [-1]}, "separators", "-1"),
        ({"separators": []}, "separators", ""),
    ],
    ids=str,
)
def test_what_the_model_does_not_have_is_refused_when_it_is_known(tiny_model, settings, field, named) -> None:
    with pytest.raises(ConfigError) as error:
        Engine.from_config({"model": {"path": str(tiny_model)}, "cache": {**FUNDAMENTAL, **settings}}).close()
    assert error.value.field == f"cache.{field}" and error.value.remedy
    assert named in str(error.value)


def test_separators_are_texts_of_single_tokens_or_any_ids(tiny_model) -> None:
    """A text stands for its token; one that takes several can be given by their ids."""

    def separators_of(given) -> tuple[int, ...]:
        config = {"model": {"path": str(tiny_model)}, "cache": {**FUNDAMENTAL, "separators": given}}
        with Engine.from_config(config) as engine:
            return engine.config.cache.separators

    tokenizer = Tokenizer(tiny_model)
    dot, newline = tokenizer.encode(".")[0], tokenizer.encode("\n")[0]
    assert separators_of(["\n", "."]) == separators_of([newline, dot]) == tuple(sorted((dot, newline)))
    pieces = tokenizer.encode("。")
    assert len(pieces) == 3 and separators_of(pieces) == tuple(sorted(pieces))
    assert separators_of("paper") == tuple(sorted(tokenizer.encode(".,?!;: \t\n")))
