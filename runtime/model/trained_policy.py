"""The cache policy that a checkpoint was trained under: written into its config.json by `outrider train`, and what
serves it where the run's own config names no policy.

    "outrider": {"cache": {"policy": "sink", "num_sinks": 1, "window": 1023}, "num_sinks": 1}

`cache` is the `cache` section that it was trained under. `num_sinks`, where it is there, is what `cache.num_sinks`
defaults to under any policy `sink`: 1 for a model that was trained with a sink token of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from runtime.config import CacheConfig, Config, Section
from runtime.errors import ConfigError
from runtime.files import read_json

KEY = "outrider"
"""Of config.json."""


class TrainedPolicy(Section):
    """What a checkpoint says of how it wants to be served."""

    cache: CacheConfig | None = None
    """None: nothing but the number of sinks."""
    num_sinks: int | None = Field(default=None, ge=0)
    trained_under: str | None = None
    """The name of a policy for training alone, which cannot be served."""

    def to_json(self) -> dict[str, Any]:
        """The value of KEY."""
        written = self.model_dump(mode="json", exclude_none=True, exclude={"cache"})
        return written | (
            {} if self.cache is None else {"cache": self.cache.model_dump(mode="json", exclude_none=True)}
        )


def trained_policy(directory: Path) -> TrainedPolicy:
    """What config.json in `directory` says; nothing where it has no such key. Raises ConfigError for a broken one."""
    path = directory / "config.json"
    given = read_json(path).get(KEY) if path.exists() else None
    if given is None:
        return TrainedPolicy()
    if not isinstance(given, dict):
        problem = f"config.json: {KEY} = {given!r:.60} is not an object"
        raise ConfigError("model.path", str(directory), problem, "Mend the file, or remove the key.")
    try:
        return TrainedPolicy(**given)
    except ConfigError as error:
        problem = f"config.json: {KEY}: {error}"
        raise ConfigError("model.path", str(directory), problem, "Mend the file, or remove the key.") from error


def with_trained_policy(config: Config, directory: Path) -> Config:
    """`config` under the policy that the model in `directory` was trained under, unless it names one itself.

    Settings of a section without `policy` come on top of the model's. Raises ConfigError for a setting that means
    nothing to its policy, and for a model trained under a policy that is not served.
    """
    trained, given = trained_policy(directory), config.cache.given()
    if "policy" not in given and trained.trained_under is not None:
        problem = f"the model was trained under {trained.trained_under}, which is for training only"
        raise ConfigError("cache.policy", None, problem, "Choose a policy to serve it under: full, sink or sep.")
    settings = given
    if "policy" not in given and trained.cache is not None:
        settings = trained.cache.given() | given
    if settings.get("policy") == "sink" and trained.num_sinks is not None:
        settings = {"num_sinks": trained.num_sinks} | settings
    if settings == given:
        return config
    return Config.from_dict({**_sections(config), "cache": settings})


def _sections(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in Config.model_fields}
