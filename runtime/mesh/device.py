"""Which device a rank computes on, and how data gets there."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.config import Config
from runtime.errors import ConfigError


def pick_device(config: Config, index: int) -> torch.device:
    """The device of the rank with this index on its machine. Raises ConfigError where CUDA is asked for and absent."""
    wanted = config.model.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device", wanted, "torch finds no CUDA device here", "Set model.device to cpu or auto.")
    if wanted == "cuda" or wanted == "auto" and torch.cuda.is_available():
        return torch.device("cuda", index)
    return torch.device("cpu")


def pinned(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """A host array as a tensor, from which copies to this device need not be waited for (`non_blocking`)."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def upload(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """A host array on the device; the host does not wait."""
    if device.type == "cpu":
        return torch.from_numpy(array)
    return pinned(array, device).to(device, non_blocking=True)
