"""Models from the Hugging Face hub: only the files that are read are fetched, and only once."""

from __future__ import annotations

import hashlib
from pathlib import Path

from runtime.disk import cache_root, kept, locked
from runtime.errors import ConfigError
from runtime.files import read_json
from runtime.model.spec import architecture_name
from runtime.model.weights import INDEX, SINGLE, listed_files

SMALL = (".json", ".jinja", ".model", ".txt")
"""Endings of the config's and the tokenizer's files."""
REMEDY = "Name a local directory, a .gguf file or a hub id such as org/name; null is the embedded model."


def fetched(hub_id: str) -> Path:
    """The model's directory in the hub's cache, downloaded if need be.

    The config comes first, and a model that cannot be run is refused by it; then the small files; last the weights,
    those that the index names, or model.safetensors. A model that was fetched whole once is not asked for again, so
    all ranks see the same one; remove it from the hub's cache (`hf cache rm`) for a newer one. Several processes may
    call this at once: one downloads, the others wait.

    Raises ConfigError for what the hub does not have, or does not give.
    """
    from huggingface_hub import constants, errors

    # One note per hub and cache: where the model lies.
    key = hashlib.sha256(f"{constants.ENDPOINT}:{constants.HF_HUB_CACHE}:{hub_id}".encode()).hexdigest()[:16]
    note = cache_root() / "hub" / key
    try:
        if place := _noted(note):
            return place
        with locked(note.with_suffix(".lock")):
            if place := _noted(note):
                return place
            place = _from_cache(hub_id) if constants.HF_HUB_OFFLINE else _downloaded(hub_id)
            with kept(note) as scratch:
                scratch.write_text(str(place))
            return place
    except errors.HFValidationError as error:
        raise ConfigError("model.path", hub_id, "no such directory, and not a hub id", REMEDY) from error
    except errors.GatedRepoError as error:
        problem = "the hub gives this model only to accounts that have accepted its terms"
        raise ConfigError("model.path", hub_id, problem, "Accept them there and log in, or name another.") from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError("model.path", hub_id, "no such directory, and the hub has no such model", REMEDY) from error
    except (errors.LocalEntryNotFoundError, errors.HTTPError, ConnectionError) as error:
        if place := _whole_in_cache(hub_id):
            return place
        problem = "no such directory, and the hub cannot be reached from here to look for it there"
        raise ConfigError("model.path", hub_id, problem, REMEDY) from error
    except OSError as error:
        problem = f"cannot be fetched from the hub ({error.strerror or error})"
        raise ConfigError("model.path", hub_id, problem, "Make room, or mend the hub's cache folder.") from error


def _noted(note: Path) -> Path | None:
    """The directory that a note names, if it is there still and whole."""
    try:
        place = Path(note.read_text())
    except OSError:
        return None
    return place if _is_whole(place) else None


def _is_whole(place: Path) -> bool:
    try:
        return (place / "config.json").exists() and bool(listed_files(place))
    except ConfigError:
        return False


def _whole_in_cache(hub_id: str) -> Path | None:
    from huggingface_hub import errors

    try:
        place = _from_cache(hub_id)
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None
    return place if _is_whole(place) else None


def _from_cache(hub_id: str) -> Path:
    """What the hub's cache has of the model, without asking the hub; what is missing is named when it is read."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub_id, allow_patterns=["config.json"], local_files_only=True))


def _downloaded(hub_id: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    files = [name for name in HfApi().list_repo_files(hub_id) if "/" not in name]
    if "config.json" not in files:
        ggufs = [name for name in files if name.endswith(".gguf")]
        problem = "the hub's repository has no config.json" + (f", only GGUF files such as {ggufs[0]}" if ggufs else "")
        raise ConfigError("model.path", hub_id, problem, "Download a GGUF file and name it, or name another model.")
    architecture_name(read_json(Path(hf_hub_download(hub_id, "config.json"))))
    if INDEX in files:
        index = read_json(Path(hf_hub_download(hub_id, INDEX))).get("weight_map")
        weights = sorted({str(name) for name in index.values()}) if isinstance(index, dict) else []
        if missing := [name for name in weights if name not in files] or ([] if weights else ["any file"]):
            problem = f"the hub's repository does not have {missing[0]}, which its {INDEX} should name"
            raise ConfigError("model.path", hub_id, problem, "Name another model.")
    elif SINGLE in files:
        weights = [SINGLE]
    else:
        problem = f"the hub's repository has neither {SINGLE} nor {INDEX}"
        raise ConfigError("model.path", hub_id, problem, "Name a model whose weights are safetensors.")
    small = [n for n in files if n.endswith(SMALL) and (n == INDEX or not n.endswith(".index.json"))]
    snapshot_download(hub_id, allow_patterns=small)
    return Path(snapshot_download(hub_id, allow_patterns=[*small, *weights]))
