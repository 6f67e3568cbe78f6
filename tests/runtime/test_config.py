"""The config tree: strict keys, typed errors that name field, value and remedy, frozen values."""

from __future__ import annotations

import pytest
import yaml
from pydantic import ValidationError

from runtime import Config, ConfigError, InvalidRequestError, LookaheadConfig, SamplingParams


def test_yaml_and_overrides_make_one_tree(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("parallel: {lp: 2}\nlookahead:\n  window_size: 7\nsampling:\nserver:\n")
    config = Config.load(file, ["lookahead.ngram_size=3", "parallel.tp=3", "sampling.temperature=0.5"])
    assert (config.parallel.lp, config.parallel.tp, config.parallel.num_workers) == (2, 3, 6)
    assert (config.lookahead.window_size, config.lookahead.ngram_size) == (7, 3)
    assert config.sampling.temperature == 0.5
    assert Config.from_dict(config.model_dump()) == config


@pytest.mark.parametrize(
    ("override", "field", "words"),
    [
        ("parallel.lp=0", "parallel.lp", "greater than or equal to 1"),
        ("parallel.ranks=2", "parallel.ranks", "lp, tp"),
        ("paralel.lp=2", "paralel", "parallel"),
        ("model.dtype=int4", "model.dtype", "bfloat16"),
        ("lookahead.sources=[psychic]", "lookahead.sources.0", "suffix"),
        ("lookahead.sources=[suffix, suffix]", "lookahead.sources", "repeated"),
        ("lookahead={planner: false, row_budget: 3}", "lookahead.row_budget", "W*(N-1)"),
        ("parallel={split: auto, lp: 2}", "parallel.split", "Leave them out"),
        ("parallel={workers: 3, lp: 2}", "parallel.workers", "not lp"),
        ("scheduler.max_sequences=256", "scheduler.max_rows", "twice"),
        ("sampling.temperature=.nan", "sampling.temperature", "finite"),
        ("sampling.top_p=0", "sampling.top_p", "greater than 0"),
        ("cache.policy=infinite", "cache.policy", "full"),
        ("lookahead=3", "lookahead", "dictionary"),
        ("model.path.x=[1", "model.path.x", "YAML"),
        ("just-words", "--set", "key.path=value"),
    ],
)
def test_errors_name_the_field_and_the_remedy(override, field, words):
    overrides = [override, "scheduler.max_rows=300"] if "max_sequences" in override else [override]
    with pytest.raises(ConfigError) as error:
        Config.load(None, overrides)
    assert error.value.field == field
    assert words in str(error.value) and error.value.remedy


def test_files_that_are_no_config_are_refused(tmp_path):
    for text, words in (("a: [", "not YAML"), ("- 1", "mapping")):
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            Config.load(file)
    with pytest.raises(ConfigError, match="No such file"):
        Config.load(tmp_path / "none.yaml")


def test_parallel_auto_is_short_for_an_automatic_split():
    parallel = Config.load(None, ["parallel=auto"]).parallel
    assert parallel.split == "auto" and parallel.workers is None
    assert Config.load(None, ["parallel.split=auto", "parallel.workers=6"]).parallel.workers == 6


def test_a_window_must_fit_into_a_step():
    with pytest.raises(ConfigError, match="scheduler.max_rows"):
        Config.load(None, ["lookahead.planner=false", "lookahead.window_size=200", "lookahead.ngram_size=4"])
    narrow = LookaheadConfig(window_size=1, ngram_size=16)
    assert narrow.window_rows == 64  # a narrow, tall window needs more rows while it fills than W*(N-1) = 15
    assert LookaheadConfig(window_size=15, ngram_size=5).window_rows == 60
    assert LookaheadConfig(sources=("suffix",)).window_rows == 1


def test_a_request_overrides_what_it_names():
    defaults = SamplingParams(max_new_tokens=5, temperature=0.3)
    assert defaults.merged({"temperature": 0.0}) == SamplingParams(max_new_tokens=5)
    with pytest.raises(InvalidRequestError, match=r"sampling.max_new_tokens = 0"):
        defaults.merged({"max_new_tokens": 0}, "sampling.")
    with pytest.raises(InvalidRequestError, match="unknown key"):
        LookaheadConfig().merged({"windw": 1})


def test_configs_are_frozen():
    config = Config()
    with pytest.raises(ValidationError):
        config.parallel.lp = 3  # type: ignore[misc]
    yaml.safe_dump(config.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("sampling.temperature", "1e-1", 0.1),
        ("sampling.temperature", ".5", 0.5),
        ("sampling.max_new_tokens", "1e3", 1000),
        ("sampling.max_new_tokens", "010", 10),
        ("sampling.max_new_tokens", "0x10", 16),
        ("sampling.seed", "12_000", 12000),
        ("sampling.stop_token_ids", "1,2", (1, 2)),
        ("sampling.stop_token_ids", "7", (7,)),
        ("sampling.stop_token_ids", "[1, 2]", (1, 2)),
        ("lookahead.enabled", "no", False),
        ("lookahead.enabled", "ON", True),
        ("lookahead.row_budget", "null", None),
        ("lookahead.row_budget", "~", None),
        ("lookahead.row_budget", "", None),
        ("lookahead.sources", "suffix", ("suffix",)),
        ("lookahead.sources", "suffix, recycle", ("suffix", "recycle")),
        ("model.path", "no", "no"),
        ("model.path", "NO", "NO"),
        ("model.path", "123", "123"),
        ("model.path", "1e-1", "1e-1"),
        ("model.path", "12:30", "12:30"),
        ("model.path", "2024-01-01", "2024-01-01"),
        ("model.path", "'null'", "null"),
        ("model.path", "/α=β", "/α=β"),
        ("server.host", "::1", "::1"),
    ],
)
def test_a_value_is_what_its_field_takes_it_for(tmp_path, key, text, value):
    """On the command line and in a file alike."""
    section, leaf = key.split(".")
    file = tmp_path / "run.yaml"
    file.write_text(f"{section}:\n  {leaf}: {f'[{text}]' if ', ' in text and text[0] != '[' else text}\n")
    for config in (Config.load(None, [f"{key}={text}"]), Config.load(None, [f" {key} = {text} "]), Config.load(file)):
        assert getattr(getattr(config, section), leaf) == value


@pytest.mark.parametrize(
    "override",
    [
        "sampling.max_new_tokens=12:30",
        "sampling.max_new_tokens=7.5",
        "sampling.max_new_tokens=1e999999999",
        "sampling.max_new_tokens=",
        "sampling.temperature=1,5",
        "sampling.temperature=inf",
        "lookahead.enabled=maybe",
        "lookahead.sources=psychic",
        "server.host=",
    ],
)
def test_what_a_field_cannot_take_is_refused_by_name(override):
    with pytest.raises(ConfigError) as error:
        Config.load(None, [override])
    assert error.value.field.startswith(override.partition("=")[0])


def test_values_on_the_command_line_may_have_characters_of_yaml():
    assert Config.load(None, ["server.host=[::1]"]).server.host == "::1"
    assert Config.load(None, ["model.path=/a b/#3 {x"]).model.path == "/a b/#3 {x"
    parallel = Config.load(None, ["parallel=auto", "parallel.workers=2"]).parallel
    assert (parallel.split, parallel.workers) == ("auto", 2)
    separators = Config.load(None, ["cache.policy=sep", 'cache.separators=[".", "1"]']).cache.separators
    assert separators == (".", "1")
    assert Config.load(None, ["cache.policy=sep", "cache.separators=30,28"]).cache.separators == (30, 28)


def test_files_in_any_unicode_encoding_and_no_key_twice(tmp_path):
    file = tmp_path / "run.yaml"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        file.write_bytes("model:\n  path: /modèle\n".encode(encoding))
        assert Config.load(file).model.path == "/modèle"
    for content in (b"model: {path: a}\nmodel: {dtype: auto}", b"model:\n  path: a\n  path: b\n", b"\xff\xfe\xff"):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="not YAML"):
            Config.load(file)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("lp=2", "parallel.lp"),
        ("lookahead.windowsize=3", "lookahead.window_size"),
        ("sampling.max-new-tokens=3", "sampling.max_new_tokens"),
        ("paralel.lp=2", "parallel"),
    ],
)
def test_an_unknown_key_is_asked_about(override, meant):
    with pytest.raises(ConfigError, match=rf"Did you mean {meant}\?"):
        Config.load(None, [override])


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: SamplingParams(max_new_tokens=True), "max_new_tokens"),
        (lambda: SamplingParams(temperature=True), "temperature"),
        (lambda: SamplingParams(stop_token_ids=[1, True]), "stop_token_ids"),
        (lambda: SamplingParams(max_tokens=5), "max_tokens"),
        (lambda: SamplingParams(top_p=1.5), "top_p"),
        (lambda: LookaheadConfig(sources="suffix"), "sources"),
        (lambda: SamplingParams().merged({"seed": False}), "seed"),
        (lambda: SamplingParams().merged({"temperature": "0.5"}), "temperature"),
    ],
)
def test_a_request_made_in_python_is_refused_by_field_value_and_remedy(make, field):
    with pytest.raises(InvalidRequestError) as caught:
        make()
    assert caught.value.field == field and caught.value.remedy


def test_a_switch_is_no_number_in_a_config_either():
    for tree in ({"parallel": {"lp": True}}, {"server": {"session_idle_timeout_s": True}}):
        with pytest.raises(ConfigError, match="neither true nor false"):
            Config.from_dict(tree)
    assert Config.from_dict({"lookahead": {"enabled": False}}).lookahead.enabled is False
    with pytest.raises(ConfigError, match="threads = 1000000000"):
        Config.load(None, ["parallel.threads=1e9"])


def test_a_path_may_be_a_path(tmp_path):
    assert Config.from_dict({"model": {"path": tmp_path}}).model.path == str(tmp_path)
