"""What a section of the check is given, and how it reports."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Setting:
    """Where the check runs, how large, and until when."""

    device: torch.device
    is_tiny: bool
    """Everything so small that a CPU does it in seconds: it tries the check out, and says nothing about a GPU."""
    model: Path | None
    """A trained model, where one was brought along."""
    deadline: float
    """time.monotonic() at which a section is to leave out what is left."""
    is_short: bool = False
    """As `outrider doctor` runs it: what decides, and no more."""
    table: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What speed is measured in."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self.deadline

    def row(self, what: str, result: str, note: str = "") -> None:
        """A line of the table, at once."""
        self.table.append((what, result, note))
        print(f"  {what:<46} {result:<28} {note}".rstrip(), flush=True)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


Report = dict[str, Any]


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
