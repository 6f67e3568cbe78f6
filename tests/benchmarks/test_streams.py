"""A small run of the benchmark of many streams."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.streams import main


def test_both_parts_on_a_tiny_model(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "in.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": text * 9}) for text in ("abc", "xyz ", "12")))
    settings = [f"model.path={tiny_model}", "model.device=cpu"]
    main(
        part=["throughput", "stall"],
        prompts=prompts,
        counts="1,5",
        max_new_tokens=12,
        rounds=1,
        answers=2,
        long_tokens=300,
        num_long=1,
        config=None,
        set_=settings,
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [each["streams"] for each in result["throughput"]] == [1, 5]
    assert all(each["off"] > 0 and each["on"] > 0 and each["rows_per_step"] >= 1 for each in result["throughput"])
    none, chunks, halves = result["stall"]
    assert none["first_token_s"] == 0 < chunks["first_token_s"] and halves["first_token_s"] > 0
    assert all(0 < each["median_s"] <= each["p99_s"] for each in result["stall"])
