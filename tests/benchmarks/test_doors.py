"""The measurement of the doors: every step of both arrives, and is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import doors


@pytest.mark.system
@pytest.mark.slow
def test_a_small_run_times_every_chunk_of_both_doors(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doors.main(rounds=1, tokens=12, model=str(tiny_model))
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures["doors"]) == {"grpc", "http"}
    assert all(0 < each["p10_ms"] <= each["median_ms"] <= each["p90_ms"] for each in figures["doors"].values())
