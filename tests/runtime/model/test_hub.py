"""From the hub comes what is read, once; what cannot be run is refused before its weights are fetched."""

from __future__ import annotations

import fnmatch
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors

from runtime.errors import ConfigError
from runtime.model.directory import load_spec, resolve_model
from runtime.model.weights import check_weights
from tests.models import save_byte_tokenizer
from tests.zoo import make_model

COPIES = ("consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin", "model.onnx")


class Hub:
    """One repository; what is fetched of it comes to lie in `cache`."""

    def __init__(self, place: Path, cache: Path) -> None:
        self.place, self.cache = place, cache
        self.fetched: list[str] = []
        self.num_calls, self.is_up = 0, True

    def files(self, *_: Any) -> list[str]:
        self._called()
        return sorted(str(path.relative_to(self.place)) for path in self.place.rglob("*") if path.is_file())

    def one(self, repo: str, name: str) -> str:
        self._called()
        self._fetch(name)
        return str(self.cache / name)

    def snapshot(self, repo: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if local_files_only:
            if not self.cache.exists():
                raise errors.LocalEntryNotFoundError("not in the cache")
            return str(self.cache)
        for name in self.files():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                self._fetch(name)
        return str(self.cache)

    def _called(self) -> None:
        self.num_calls += 1
        if not self.is_up:
            raise errors.OfflineModeIsEnabled("no connection")

    def _fetch(self, name: str) -> None:
        if name not in self.fetched:
            self.fetched.append(name)
            (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
            (self.cache / name).write_bytes((self.place / name).read_bytes())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "repository", tmp_path / "snapshot")
    make_model("llama").save_pretrained(found.place)
    save_byte_tokenizer(found.place)
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", found.files)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", found.one)
    monkeypatch.setattr("huggingface_hub.snapshot_download", found.snapshot)
    return found


def shard(hub: Hub) -> None:
    (hub.place / "model.safetensors").unlink()
    make_model("llama").save_pretrained(hub.place, max_shard_size="40KB")


@pytest.mark.parametrize("is_sharded", [False, True])
def test_only_what_is_read_is_fetched(hub: Hub, is_sharded: bool) -> None:
    if is_sharded:
        shard(hub)
    wanted = set(hub.files())
    for name in COPIES:
        (hub.place / name).parent.mkdir(exist_ok=True)
        (hub.place / name).write_text("large")
    directory = resolve_model("org/name")
    assert set(hub.fetched) == wanted
    check_weights(directory, load_spec(directory))


def test_the_hub_is_asked_once(hub: Hub) -> None:
    with ThreadPoolExecutor(4) as pool:  # the lock is the one that processes share
        assert len(set(pool.map(resolve_model, ["org/name"] * 4))) == 1
    calls, hub.is_up = hub.num_calls, False
    assert resolve_model("org/name") == hub.cache and hub.num_calls == calls
    (hub.cache / "model.safetensors").unlink()  # cleared away
    hub.is_up = True
    hub.fetched.remove("model.safetensors")
    check_weights(resolve_model("org/name"), load_spec(hub.cache))


@pytest.mark.parametrize("is_known_offline", [True, False])
def test_a_whole_model_in_the_hubs_cache_needs_no_hub(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, is_known_offline: bool
) -> None:
    for name in hub.files():
        hub._fetch(name)
    hub.is_up = False
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", is_known_offline)
    assert resolve_model("org/name") == hub.cache


def test_what_is_not_there_without_a_hub_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.is_up = False
    with pytest.raises(ConfigError, match="the hub cannot be reached"):
        resolve_model("org/name")
    hub.cache.mkdir()
    (hub.cache / "config.json").write_bytes((hub.place / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="the hub cannot be reached"):
        resolve_model("org/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="holds neither"):  # named when it is read
        check_weights(resolve_model("org/name"), load_spec(hub.cache))


def test_an_architecture_that_cannot_be_run_is_refused_by_its_config_alone(hub: Hub) -> None:
    raw = json.loads((hub.place / "config.json").read_text()) | {"architectures": ["MambaForCausalLM"]}
    (hub.place / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="MambaForCausalLM"):
        resolve_model("org/name")
    assert hub.fetched == ["config.json"]


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("model.safetensors", "has neither model.safetensors nor"),
        ("config.json", "has no config.json, only GGUF files"),
    ],
)
def test_a_repository_without_what_is_needed_is_refused_at_once(hub: Hub, lost: str, said: str) -> None:
    (hub.place / lost).rename(hub.place / "some.gguf")
    with pytest.raises(ConfigError, match=said):
        resolve_model("org/name")
    assert set(hub.fetched) <= {"config.json"}


def test_a_shard_that_the_hub_lacks_is_named_before_the_others_are_fetched(hub: Hub) -> None:
    shard(hub)
    lost = sorted(hub.place.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ConfigError, match=f"does not have {lost.name}"):
        resolve_model("org/name")
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]
