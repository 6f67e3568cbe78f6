"""Reading slices of tensors from a safetensors checkpoint, in one file or sharded."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from runtime.errors import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """An open checkpoint directory; reads only the bytes asked for. A context manager."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Tensors come back as `dtype` on `device`. Raises ConfigError if there are no safetensors."""
        self.directory = directory
        self.dtype, self.device = dtype, device
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        if (directory / INDEX).is_file():
            names = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
        elif (directory / SINGLE).is_file():
            names = [SINGLE]
        else:
            remedy = "Save the model with safe_serialization, or name a GGUF file."
            raise ConfigError("model.path", str(directory), f"holds neither {SINGLE} nor {INDEX}", remedy)
        for name in names:
            try:
                file = self._stack.enter_context(safe_open(directory / name, framework="pt"))
            except (OSError, SafetensorError) as error:
                problem = f"{name} cannot be read ({error})"
                raise ConfigError("model.path", str(directory), problem, "Fetch the checkpoint again.") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def rows(self, name: str, shape: tuple[int, ...], start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows start .. stop-1 of a tensor that must have `shape` as a whole."""
        return self._convert(self._slice(name, shape)[start:stop])

    def columns(self, name: str, shape: tuple[int, int], start: int, stop: int) -> torch.Tensor:
        """Columns start .. stop-1 of a matrix that must have `shape` as a whole."""
        return self._convert(self._slice(name, shape)[:, start:stop])

    def _slice(self, name: str, shape: tuple[int, ...]) -> Any:
        if name not in self._files:
            problem = f"the checkpoint has no tensor {name}"
            raise ConfigError("model.path", str(self.directory), problem, "Its config.json describes another model.")
        found = self._files[name].get_slice(name)
        if tuple(found.get_shape()) != shape:
            problem = f"tensor {name} has shape {tuple(found.get_shape())}, config.json asks for {shape}"
            raise ConfigError("model.path", str(self.directory), problem, "Its config.json describes another model.")
        return found

    def _convert(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, self.dtype).contiguous()
