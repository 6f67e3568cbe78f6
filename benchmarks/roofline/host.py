"""What a step takes around the devices, as `python -m benchmarks.overhead` measured it: read from its output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import ConfigError

OPTION = "--overhead"
MAKE = "Make one: python -m benchmarks.overhead > FILE"


@dataclass(frozen=True)
class HostPath:
    """Seconds by rows of one sequence's steps, per mesh (lp, tp) that was measured."""

    points: Mapping[tuple[int, int], tuple[tuple[float, float], ...]]
    """(rows, seconds), ascending."""
    source: str

    @classmethod
    def load(cls, path: Path) -> HostPath:
        """From a file whose last line is the benchmark's. Raises ConfigError naming the option."""
        try:
            found = json.loads(path.read_text().strip().splitlines()[-1])
            if found["benchmark"] != "overhead":
                raise ValueError(f"is of the benchmark {found['benchmark']}")
            return cls.of(found["cells"], str(path))
        except OSError as error:
            raise ConfigError(OPTION, str(path), error.strerror or "cannot be read", MAKE) from error
        except (IndexError, KeyError, TypeError, ValueError) as error:
            problem = f"is not what benchmarks.overhead prints ({type(error).__name__}: {error})"
            raise ConfigError(OPTION, str(path), problem, MAKE) from error

    @classmethod
    def of(cls, cells: list[dict[str, Any]], source: str) -> HostPath:
        """Raises ValueError where one process was not measured."""
        points: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for cell in cells:
            if cell["sequences"] == 1:
                points.setdefault((cell["lp"], cell["tp"]), []).append((float(cell["rows"]), cell["ms"] / 1000))
        if (1, 1) not in points:
            raise ValueError("it has no steps of one sequence in one process")
        return cls({mesh: tuple(sorted(found)) for mesh, found in points.items()}, source)

    def has(self, lp: int, tp: int) -> bool:
        """Whether this mesh was measured, transport and all."""
        return (lp, tp) in self.points

    def seconds(self, rows: float, lp: int = 1, tp: int = 1) -> float:
        """A straight line between the numbers of rows measured, and on behind the last."""
        points = self.points[lp, tp]
        if len(points) == 1 or rows <= points[0][0]:
            return points[0][1]
        after = next((index for index, (at, _) in enumerate(points) if at >= rows), len(points) - 1)
        (x0, y0), (x1, y1) = points[after - 1], points[after]
        return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)
