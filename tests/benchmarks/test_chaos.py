"""What the chaos benchmark makes of answers, and a short run of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.chaos.main import main
from benchmarks.chaos.record import Fault, Report, Stream, Verdict

EXPECTED = (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([1, 2, 3, 4, 5], Verdict()),
        ([1, 2, 3], Verdict(lost=2)),
        ([1, 2, 2, 3, 4, 5], Verdict(repeated=1)),
        ([1, 2, 3, 4, 5, 5], Verdict(repeated=1)),
        ([1, 2, 9, 4, 5], Verdict(changed=3)),
        ([1, 3, 4, 5], Verdict(changed=4)),
        ([], Verdict(lost=5)),
    ],
)
def test_every_difference_counts(found: list[int], verdict: Verdict) -> None:
    judged = Verdict()
    judged.judge(Stream(0, found), EXPECTED)
    assert judged == verdict


def test_an_answer_that_ends_with_an_error_counts_as_one() -> None:
    judged = Verdict()
    judged.judge(Stream(0, [1, 2], error="gone"), EXPECTED)
    assert judged == Verdict(lost=3, errors=1)


def test_a_pause_is_one_of_all_answers_and_belongs_to_the_fault_before_it() -> None:
    faults = [Fault("kill", "2x1", 10.0), Fault("kill", "2x1", 20.0), Fault("stop", "2x1", 30.0)]
    streams = [Stream(0, times=[9.0, 10.1, 12.0, 21.0]), Stream(1, times=[11.0, 14.0, 24.0, 30.5])]
    report = Report(faults, streams)
    assert [report.pause(fault) for fault in faults] == [2.0, 3.0, 0.5]
    assert report.rows() == [("2x1", "kill", 2, 2.5, 3.0), ("2x1", "stop", 1, 0.5, 0.5)]


@pytest.mark.system
@pytest.mark.long
def test_a_short_run_loses_nothing(tiny_model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text * 4}) + "\n" for text in ("ab", "cad", "bed")))
    main(
        meshes="2x1",
        kills=2,
        stops=0,
        server_kills=1,
        streams=3,
        max_new_tokens=24,
        prompts=prompts,
        set_=[f"model.path={tiny_model}", "cache.policy=full"],
    )
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["faults"] == {"kill": 2, "server": 1}
    assert said["lost"] == said["repeated"] == said["changed"] == said["errors"] == 0
    assert said["answers"] >= 3 and len(said["pauses"]) == 2
