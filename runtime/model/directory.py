"""From a model's name to its directory, and what its config says, checked. Reads no weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from runtime.config import Config
from runtime.disk import cache_root, kept
from runtime.errors import ConfigError
from runtime.files import read_json
from runtime.model.gguf_file import is_gguf
from runtime.model.spec import ModelSpec, read_spec
from runtime.model.trained_policy import with_trained_policy
from runtime.model.weights import check_weights

_SPEC = TypeAdapter(ModelSpec)


def resolve_model(path: str | None) -> Path:
    """The directory in Hugging Face layout behind `model.path`.

    None is the embedded model; a GGUF file is converted once; a directory is itself; anything else is
    a hub id, downloaded if need be. Safe to call from several processes at once. Raises ConfigError.
    """
    from runtime.model.gguf import converted, embedded_file
    from runtime.model.hub import fetched

    if path is None:
        return converted(embedded_file())
    try:
        local = Path(path).expanduser()
        is_directory, is_there = local.is_dir(), local.exists()
        path.encode()
    except (OSError, RuntimeError, UnicodeError) as error:  # a name too long, a home that is not there, odd bytes
        problem = f"cannot be looked for ({getattr(error, 'strerror', None) or error})"
        raise ConfigError("model.path", path, problem, "Check the path.") from error
    if is_directory:
        return local
    if is_there and is_gguf(local):
        return converted(local)
    if is_there:
        raise ConfigError("model.path", path, "is neither a directory nor a GGUF file", "Name the model's directory.")
    if local.suffix.lower() == ".gguf":
        raise ConfigError("model.path", path, "no such file", "Check the path.")
    return fetched(path)


def load_spec(directory: Path) -> ModelSpec:
    """Read config.json and generation_config.json. Raises ConfigError for a model Outrider cannot run.

    What transformers makes of them is kept: its configuration classes take seconds to import.
    """
    path = directory / "generation_config.json"
    raw, generation = _read_config(directory), read_json(path) if path.exists() else {}
    known = cache_root() / "specs" / f"{_fingerprint(raw, generation)}.json"
    with contextlib.suppress(OSError, ValueError):  # not there, or not whole
        return _SPEC.validate_json(known.read_bytes())
    spec = read_spec(raw, generation, directory)
    with kept(known) as scratch:
        scratch.write_bytes(_SPEC.dump_json(spec))
    return spec


def _fingerprint(*files: Mapping[str, Any]) -> str:
    """Of what a spec follows from: the files' contents, and the code that reads them."""
    digest = hashlib.sha256(json.dumps([version("transformers"), *files]).encode())
    for name in ("spec.py", "config_file.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:32]


def _read_config(directory: Path) -> dict[str, Any]:
    if not (directory / "config.json").exists():
        remedy = "Name a model directory in Hugging Face layout."
        raise ConfigError("model.path", str(directory), "config.json: No such file or directory", remedy)
    return read_json(directory / "config.json")


def for_model(config: Config) -> Config:
    """`config` under the cache policy that its model was trained under, where it names none. Raises ConfigError."""
    return with_trained_policy(config, resolve_model(config.model.path))


def checked_model(config: Config) -> tuple[Path, ModelSpec]:
    """The model's directory and spec, once all is known to be there and to fit `config`: what every start does before
    work is spent. Reads no weights. Raises ConfigError."""
    directory = resolve_model(config.model.path)
    spec = load_spec(directory)
    spec.check_tp(config.parallel.tp)
    spec.check_cache(config.cache)
    check_weights(directory, spec)
    return directory, spec
