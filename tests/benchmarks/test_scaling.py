"""The scaling benchmark: its arithmetic, its projections and their labels, its fits, and whole runs on a tiny model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from benchmarks.common import Run, parse_try
from benchmarks.costs import Shape, splits, step_cost
from benchmarks.roofline import published
from benchmarks.roofline.host import HostPath
from benchmarks.roofline.roofline import (
    DEVICES,
    EAGER,
    GRAPH,
    MODELS,
    TRANSPORT,
    StepTime,
    attention_bytes,
    fits,
    step_seconds,
)
from benchmarks.scaling import main as scaling
from benchmarks.scaling import plots as scaling_plots
from benchmarks.scaling import report as scaling_report
from benchmarks.scaling.cells import OFF, SOURCE_SETS, Cell, Store, grid, key_of, parse_numbers, parse_sources
from benchmarks.scaling.fits import expected_tokens, fit_acceptance, fit_line
from benchmarks.scaling.projection import project
from benchmarks.scaling.run import largest_part
from benchmarks.speed.main import outrider_methods, plain_step_seconds
from benchmarks.speed.peers import gguf_source, hugging_face_dtypes
from benchmarks.speed.report import Floor, Method, verdict
from runtime.config import Config, LookaheadConfig, ModelConfig
from runtime.engine.engine import Engine
from runtime.equality import Equality
from runtime.errors import ConfigError
from runtime.model.directory import load_spec
from runtime.model.shard import HeadShard
from runtime.request import Completion, FinishReason, Usage
from tests.models import save_tiny_model

SEVEN, EIGHT, SEVENTY = MODELS["llama-2-7b"], MODELS["llama-3-8b"], MODELS["llama-2-70b"]
A100, H100, H200 = DEVICES["a100"], DEVICES["h100"], DEVICES["h200"]
SMOL = Shape("smol", 30, 576, 9, 3, 64, 1536, 49152, tied=True)


# Costs


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-2-7b", 6.74), ("llama-3-8b", 8.03), ("llama-2-13b", 13.02), ("llama-2-70b", 68.98)]
)
def test_shapes_have_the_published_numbers_of_parameters(name: str, billions: float):
    assert MODELS[name].num_parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_kv_bytes_of_a_token():
    assert SEVEN.kv_bytes(2) == 512 * 1024 and EIGHT.kv_bytes(2) == 128 * 1024


@pytest.mark.parametrize("tp", range(1, 10))
def test_a_shard_is_the_busiest_rank_of_the_runtime(tp: int):
    ranks = [HeadShard.of(SMOL.num_heads, SMOL.num_kv_heads, rank, tp) for rank in range(tp)]
    shard = SMOL.shard(tp)
    assert shard.num_kv_heads == max(rank.num_kv_heads for rank in ranks)
    assert shard.num_heads == max(rank.query_stop - rank.query_start for rank in ranks)


def test_a_shard_needs_a_query_head():
    with pytest.raises(ValueError, match="9 query heads"):
        SMOL.shard(10)


def test_step_cost_counts_rows_weights_and_messages():
    cost = step_cost(SEVEN, [10, 14], context=100, tp=2, item_bytes=2, commit_rows=3, plan_bytes=1000, result_bytes=50)
    weights = 32 * SEVEN.layer_weights + 4096 * 32000
    assert cost.flops == 2 * weights * 24 + 4 * 32 * 4096 * 24 * 100
    assert cost.bytes_moved == 2 * (2 * weights + 100 * SEVEN.kv_bytes(2))
    assert cost.plan_bytes == 4000 and cost.result_bytes == 100
    assert cost.all_reduce_bytes == 65 * 24 * 4096 * 2
    assert cost.commit_bytes == 3 * SEVEN.kv_bytes(2)
    assert cost.communication_bytes == sum([4000, 100, cost.all_reduce_bytes, cost.commit_bytes])


def test_one_worker_sends_nothing():
    assert step_cost(SEVEN, [24], 100, commit_rows=3, plan_bytes=1000, result_bytes=50).communication_bytes == 0


def test_splits_are_all_meshes_up_to_the_query_heads():
    assert splits(8, 64) == [(8, 1), (4, 2), (2, 4), (1, 8)]
    assert splits(8, 3) == [(8, 1), (4, 2)] and splits(1, 9) == [(1, 1)]


# Roofline


def test_a_plain_step_reads_the_weights_at_the_reached_bandwidth():
    step = step_seconds(A100, SEVEN, 1, 0)
    assert step.linear == pytest.approx(32 * SEVEN.layer_weights * 2 / (2.039e12 * 0.83))
    assert step.head == pytest.approx(4096 * 32000 * 2 / (2.039e12 * 0.83))
    assert step.kernels == pytest.approx(32 * 10 * 4e-6)
    assert step.attention == step.all_reduce == step.broadcast == step.gather == step.commit == step.host == 0
    assert step.total == pytest.approx(sum(step.parts().values()))
    assert set(step.parts()) == {field.name for field in dataclasses.fields(StepTime)}


def test_many_rows_are_bound_by_multiplication():
    step = step_seconds(A100, SEVEN, 1000, 0)
    assert step.linear == pytest.approx(2 * 32 * SEVEN.layer_weights * 1000 / (312e12 * 0.6))
    assert step_seconds(A100, SEVEN, 1000, 0, item_bytes=4).linear == pytest.approx(2 * step.linear)
    with pytest.raises(ValueError, match="item_bytes=1"):
        step_seconds(A100, SEVEN, 1, 0, item_bytes=1)


@pytest.mark.parametrize("device", DEVICES.values(), ids=str)
def test_latency_grows_with_rows_and_context_and_shrinks_with_better_devices(device):
    by_rows = [step_seconds(device, SEVEN, rows, 512).total for rows in (1, 16, 64, 256, 1024)]
    by_context = [step_seconds(device, SEVEN, 16, context).total for context in (0, 512, 4096, 65536)]
    assert by_rows == sorted(by_rows) and by_context == sorted(by_context)
    assert by_rows[0] < by_rows[-1] and by_context[0] < by_context[-1]
    assert by_rows[1] < 1.05 * by_rows[0], "a few rows ride along with the weights"


def test_devices_and_models_are_ordered_as_their_sizes_are():
    assert step_seconds(H200, SEVEN, 1, 512).total < step_seconds(H100, SEVEN, 1, 512).total
    assert step_seconds(H100, SEVEN, 1, 512).total < step_seconds(A100, SEVEN, 1, 512).total
    assert step_seconds(A100, SEVEN, 1, 512).total < step_seconds(A100, MODELS["llama-2-13b"], 1, 512).total


def test_parallelism_pays_for_its_messages():
    alone, tensor = step_seconds(H100, SEVEN, 64, 512), step_seconds(H100, SEVEN, 64, 512, tp=4)
    assert tensor.linear == pytest.approx(alone.linear / 4)
    sums, chosen = TRANSPORT.all_reduce(64 * 4096 * 2, 4, H100), TRANSPORT.all_reduce(64 * 16, 4, H100)
    assert tensor.all_reduce == pytest.approx(65 * sums + chosen) and sums > chosen > 0
    replicas = step_seconds(H100, SEVEN, 16, 512, lp=4, commit_rows=3)
    assert replicas.linear <= alone.linear and replicas.all_reduce == 0
    assert min(replicas.broadcast, replicas.gather, replicas.commit) > 0
    reduces = [TRANSPORT.all_reduce(1e5, tp, H100) for tp in (1, 2, 4, 8)]
    assert reduces == sorted(reduces) and reduces[0] == 0
    assert TRANSPORT.broadcast(1e4, 8) > TRANSPORT.broadcast(1e4, 2) > TRANSPORT.broadcast(1e4, 1) == 0


def test_eager_steps_wait_for_the_host():
    eager = step_seconds(A100, SEVEN, 1, 512, software=EAGER)
    assert eager.total == pytest.approx(32 * 33 * 20e-6)
    assert eager.total > step_seconds(A100, SEVEN, 1, 512, software=GRAPH).total


def test_a_model_has_to_fit_the_memory():
    assert not fits(H100, SEVENTY, 1, 512) and fits(H100, SEVENTY, 2, 512) and fits(A100, SEVEN, 1, 4096)
    assert not fits(A100, SEVEN, 1, 200_000)


def test_published_figures_are_met_within_ten_percent(capsys: pytest.CaptureFixture[str]):
    for check in published.checks():
        assert abs(check.error) < 0.10, check
    published.main()
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["kind"] == "projected" and len(result["checks"]) == len(published.checks())
    shown = "\n".join(lines[:-1])
    assert all(check.name in shown and check.source in shown for check in published.checks())


def test_an_error_is_the_distance_from_the_published_range():
    check = published.Check("x", "tokens/s", (30, 45), 54.0, "somewhere")
    assert check.error == pytest.approx(0.2) and check.verdict == "+20%"
    assert dataclasses.replace(check, projected=24.0).error == pytest.approx(-0.2)
    assert dataclasses.replace(check, projected=40.0).verdict == "inside"


# Fits


def test_the_line_recovers_what_doubling_the_flops_adds():
    flops = 1e9 * 2.0 ** np.arange(6)
    line = fit_line(flops, 1.2 + 0.3 * np.log2(flops / 1e9))
    assert line is not None and line.slope == pytest.approx(0.3) and line.r_squared == pytest.approx(1)
    assert line.at(8e9) == pytest.approx(2.1)
    assert fit_line([1e9, 1e9], [1.0, 2.0]) is None
    flat = fit_line([1e9, 2e9, 4e9], [1.5, 1.5, 1.5])
    assert flat is not None and np.isnan(flat.r_squared)


def test_expected_tokens_at_its_limits():
    assert expected_tokens(0.5, [1], 1)[0] == pytest.approx(1.5)  # 2 - (1 - 0.5)
    assert expected_tokens(1e-12, [8], 4)[0] == pytest.approx(1)
    assert expected_tokens(0.999999, [8], 4)[0] == pytest.approx(5, abs=1e-4)
    values = expected_tokens(0.4, [1, 2, 8, 64, 1e6], 4)
    assert list(values) == sorted(values) and values[-1] == pytest.approx(5)


@pytest.mark.parametrize(("alpha", "f"), [(0.2, 1.0), (0.35, 2.5), (0.6, 3.0)])
def test_the_acceptance_fit_recovers_alpha_and_f(alpha: float, f: float):
    candidates = [1, 2, 4, 8, 16, 32, 64]
    values = (f - 1 + expected_tokens(alpha, candidates, 4)) / f
    fit = fit_acceptance(candidates, values, 4)
    assert fit is not None and fit.alpha == pytest.approx(alpha, abs=2e-3) and fit.f == pytest.approx(f, rel=2e-2)
    assert fit.rms_error < 1e-3 and fit.max_error < 2e-3 and fit.at(8) == pytest.approx(values[3], abs=2e-3)
    assert fit_acceptance([4], [1.5], 4) is None


# The grid, and resuming


@pytest.mark.parametrize("sources", SOURCE_SETS)
@pytest.mark.parametrize("budget", [8, 16, 32, 64, 100, 128, 256, 512, 1024])
def test_every_cell_is_a_valid_setting_that_keeps_to_its_budget(sources: str, budget: int):
    lookahead = Cell(2, 1, sources, budget).lookahead(LookaheadConfig())
    assert lookahead.row_budget == budget and lookahead.window_rows <= budget
    assert not lookahead.planner and not lookahead.share and lookahead.sources == tuple(sources.split("+"))
    if sources == "jacobi":  # the paper's: W = G, N = 5, window and verification branch together the budget
        assert lookahead.window_size == lookahead.guess_set_size
        assert budget - 8 < lookahead.window_size * 4 + lookahead.guess_set_size * 4 <= budget


def test_the_grid_has_the_baselines():
    cells = grid([2, 4], [16, 64], ["jacobi", "suffix"], num_heads=9)
    assert list(cells) == [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]
    assert {mesh for mesh, group in cells.items() if any(cell.sources == OFF for cell in group)} == {
        (1, 1),
        (1, 2),
        (1, 4),
    }
    assert Cell(4, 1, "jacobi", 64) in cells[4, 1] and len(cells[2, 2]) == 4
    assert not Cell(1, 1, OFF).lookahead(LookaheadConfig()).enabled


def test_options_that_mean_nothing_are_refused():
    assert parse_numbers("64, 16,16", "--budgets") == [16, 64]
    assert parse_sources("jacobi, suffix+recycle") == ["jacobi", "suffix+recycle"]
    for wrong in (
        lambda: parse_numbers("many", "--workers"),
        lambda: parse_numbers("4", "--budgets", 8),
        lambda: parse_sources("suffix+oracle"),
        lambda: scaling.check_projection(["b200"], ["llama-2-7b"], [1]),
        lambda: scaling.check_projection(["h100"], ["gpt-5"], [1]),
        lambda: scaling.check_projection(["h100"], ["llama-2-7b"], [3]),
    ):
        with pytest.raises(typer.BadParameter):
            wrong()


def test_keys_are_of_contents_not_of_order():
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1}) != key_of({"a": 1, "b": [3]})


def test_a_store_keeps_what_is_finished_and_forgets_a_torn_line(tmp_path: Path):
    file = tmp_path / "out" / "answers.jsonl"
    Store(file, resume=True).add({"key": "a", "value": 1})
    with file.open("a") as torn:
        torn.write('{"key": "b", "val')
    again = Store(file, resume=True)
    assert again.missing(["a", "b"]) == ["b"] and again.records["a"]["value"] == 1
    fresh = Store(file, resume=False)
    assert fresh.missing(["a"]) == ["a"] and file.with_name("answers.jsonl.old").exists()


def test_the_largest_part_is_the_pace_of_a_mesh():
    chain, star = np.arange(-1, 7), np.array([-1, *[0] * 8])
    assert [largest_part(chain, lp) for lp in (2, 4, 8)] == [8, 8, 8]  # a chain cannot be cut
    assert [largest_part(star, lp) for lp in (2, 4, 8)] == [5, 3, 2]  # the root is everywhere


# Projection


def figures(
    sources: str = "jacobi", budget: int = 64, tokens_per_step: float = 2.0, rows: float = 60.0
) -> dict[str, Any]:
    return {
        "workers": 1,
        "sources": sources,
        "budget": budget,
        "tokens_per_step": tokens_per_step,
        "rows_per_step": rows,
        "largest_replica_rows_at": {"2": rows / 2 + 2, "4": rows / 4 + 3, "8": rows / 8 + 4},
        "plan_bytes": 8000,
        "result_bytes": 400,
        "parts_ms": {"plan": 0.5, "broadcast": 0.0, "forward": 50.0, "gather": 0.0, "verify": 0.25},
    }


def test_projections_say_that_they_are_and_where_s_comes_from():
    measured = [figures(OFF, 1, 1.0, 1.0), figures()]
    records = project(measured, H100, SEVEN, [1, 2, 8], 1024, "tiny float32")
    assert all(record["kind"] == "projected" for record in records)
    assert {record["tokens_per_step_measured_with"] for record in records} == {"tiny float32"}
    meshes = [(1, 1), (2, 1), (1, 2), (8, 1), (4, 2), (2, 4), (1, 8)]
    assert list(dict.fromkeys((record["lp"], record["tp"]) for record in records)) == meshes
    assert {(r["lp"], r["tp"]) for r in records if r["sources"] == OFF} == {(1, 1), (1, 2), (1, 8)}
    for record in records:
        assert record["tokens_per_s"] == pytest.approx(1e3 * record["tokens_per_step"] / record["step_ms"])
        assert sum(record["parts_ms"].values()) == pytest.approx(record["step_ms"])
        assert record["parts_ms"]["host"] == 0 and record["host_path"] == "not counted"
    assert next(r for r in records if r["lp"] == 8)["largest_replica_rows"] == 60 / 8 + 4
    cells = [
        {"lp": 1, "tp": 1, "sequences": 1, "rows": 1, "ms": 0.1},
        {"lp": 1, "tp": 1, "sequences": 1, "rows": 101, "ms": 0.3},
        {"lp": 1, "tp": 1, "sequences": 8, "rows": 101, "ms": 9.0},
        {"lp": 8, "tp": 1, "sequences": 1, "rows": 1, "ms": 2.0},
    ]
    counted = project(measured, H100, SEVEN, [1, 8], 1024, "tiny float32", host=HostPath.of(cells, "here"))
    found = {(r["lp"], r["tp"], r["sources"]): r for r in counted}
    off, ahead, replicas = found[1, 1, OFF], found[1, 1, "jacobi"], found[8, 1, "jacobi"]
    assert off["parts_ms"]["host"] == pytest.approx(0.1)
    assert ahead["parts_ms"]["host"] == pytest.approx(0.1 + 0.2 * 59 / 100) and ahead["host_path"] == "measured"
    assert replicas["parts_ms"]["host"] == pytest.approx(2.0) and replicas["parts_ms"]["broadcast"] == 0
    tensor = found[1, 8, "jacobi"]  # this mesh was not measured
    assert tensor["parts_ms"]["host"] == ahead["parts_ms"]["host"] and tensor["parts_ms"]["broadcast"] > 0
    assert tensor["host_path"] == "one process measured, transport assumed"


def test_the_host_path_is_what_overhead_printed(tmp_path: Path):
    path = tmp_path / "overhead.txt"
    cells = [{"lp": 1, "tp": 1, "sequences": 1, "rows": rows, "ms": rows / 100} for rows in (16, 1, 512)]
    path.write_text("a table\n" + json.dumps({"benchmark": "overhead", "cells": cells}) + "\n")
    host = HostPath.load(path)
    assert [host.seconds(rows) * 100 for rows in (0.5, 1, 8, 512, 1024)] == pytest.approx(
        [1e-3, 1e-3, 8e-3, 0.512, 1.024]
    )
    for text, words in (
        ("", "IndexError"),
        ("not JSON", "is not what benchmarks.overhead prints"),
        (json.dumps({"benchmark": "speed"}), "is of the benchmark speed"),
        (json.dumps({"benchmark": "overhead", "cells": []}), "no steps of one sequence in one process"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            HostPath.load(path)
    with pytest.raises(ConfigError, match="--overhead = .*No such file"):
        HostPath.load(tmp_path / "none")


def test_attention_moves_what_its_kernels_do():
    """One row reads the cache once; each further tile reads the dense part again, each row its own tail."""
    shard = MODELS["llama-3-8b"].shard(1)
    once, scratch = attention_bytes(shard, 1, 4096, 2)
    assert once == shard.kv_read_bytes(4096, 2)
    assert scratch == 8 * 32 * 32 * 32 * (128 + 2)  # layers, heads, parts
    sixteen, again = attention_bytes(shard, 32, 4096, 2)  # two tiles of 16 rows, 4 heads of a group each
    partial = 8 * 32 * 32 * 32 * 16 * (128 + 2)
    assert sixteen == once and again == shard.kv_read_bytes(4000 + 31 * 96, 2) + partial
    assert attention_bytes(shard, 8, 0, 2) == (0, 0)


def test_splits_that_do_not_fit_are_not_projected():
    records = project([figures(OFF, 1, 1.0, 1.0)], H100, SEVENTY, [1, 2], 1024, "tiny float32")
    assert [(record["lp"], record["tp"]) for record in records] == [(1, 2)]


def test_projected_rows_and_lines_are_labelled(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    measured = [figures(OFF, 1, 1.0, 1.0), figures(), figures("suffix", 64, 2.5)]
    for record in measured:
        record |= {
            "kind": "measured",
            "model": "tiny",
            "lp": 1,
            "tp": 1,
            "ms_per_token": 20 / record["tokens_per_step"],
        }
    records = project(measured, A100, SEVEN, [1, 2], 1024, "tiny float32")
    scaling_report.print_projected(records)
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if "llama-2-7b" in line]
    assert rows and all("projected" in row for row in rows) and "PROJECTED, not measured" in shown
    assert any("jacobi 64" in row for row in rows), "the paper's method stands beside the best one"
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        scaling_plots, "plot_lines", lambda path, title, labels, lines, styles, **_: drawn.update(styles)
    )
    scaling_plots.draw_latency(measured, records, Path("unused.png"))
    for name, style in drawn.items():
        is_projected = "PROJECTED" in name
        assert is_projected != ("measured" in name)
        assert (style["linestyle"] == "--") == is_projected == (style["markerfacecolor"] == "white")


# Whole runs on a tiny model


def run_scaling(tmp_path: Path, **changes: Any) -> int:
    options: dict[str, Any] = {
        "prompts": tmp_path / "prompts.jsonl",
        "limit": None,
        "max_new_tokens": 16,
        "workers": "1",
        "budgets": "16,32,64",
        "sources": "jacobi,suffix+recycle",
        "everything": False,
        "threads": 1,
        "processes": True,
        "project": ["h100"],
        "project_model": ["llama-2-7b"],
        "project_workers": "1,2,4,8",
        "project_context": 512,
        "overhead": None,
        "config": None,
        "set_": [f"model.path={tmp_path / 'model'}"],
        "resume": True,
        "out": tmp_path / "out",
    }
    with pytest.raises(typer.Exit) as exit_:
        scaling.main(**(options | changes))
    return exit_.value.exit_code


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model")
    lines = [{"id": name, "prompt": f"{name} and {name} and"} for name in ("one", "two")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_scaling_measures_fits_and_projects_and_resumes(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert run_scaling(tiny) == 0
    result = last_json(capsys)
    measured = result["measured"]
    assert [(record["sources"], record["budget"]) for record in measured] == [
        (OFF, 1),
        *((sources, budget) for sources in ("jacobi", "suffix+recycle") for budget in (16, 32, 64)),
    ]
    for record in measured:
        assert record["kind"] == "measured" and record["lossless"] and record["num_tokens"] > 0
        assert 1 <= record["rows_per_step"] <= record["budget"] and record["tokens_per_step"] >= 1
        assert record["largest_replica_rows"] == pytest.approx(record["rows_per_step"])
        assert record["communication_bytes_per_step"] == 0 and record["flops_per_token"] > 0
        cuts = record["largest_replica_rows_at"]
        assert record["rows_per_step"] >= cuts["2"] >= cuts["4"] >= cuts["8"] > 0
    off = measured[0]
    assert off["tokens_per_step"] == off["rows_per_step"] == 1
    shape = Shape.of("tiny", load_spec(tiny / "model"))
    assert off["flops_per_step"] == pytest.approx(step_cost(shape, [1], off["context"]).flops)
    assert set(result["fits"]) == {"jacobi", "suffix+recycle"}
    assert all(record["kind"] == "projected" for record in result["projected"]) and result["projected"]
    assert all(Path(plot).stat().st_size > 0 for plot in result["plots"])

    lines = (tiny / "out" / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 7
    ran = []
    monkeypatch.setattr(scaling, "answer", lambda *given, real=scaling.answer: ran.append(given) or real(*given))
    assert run_scaling(tiny, project=[]) == 0
    again = last_json(capsys)
    assert not ran and again["measured"] == measured and again["projected"] == []
    assert run_scaling(tiny, budgets="16,32") == 0 and not ran, "a part of the grid is there already"
    last_json(capsys)
    assert run_scaling(tiny, max_new_tokens=8, budgets="64", sources="jacobi") == 0
    assert len([given for given in ran if given[-1] == 8]) == 2 * 2, "what answers depend on is in their keys"


@pytest.mark.slow
def test_scaling_runs_a_mesh_of_processes(tiny: Path, capsys: pytest.CaptureFixture[str]):
    assert run_scaling(tiny, workers="2", budgets="32", sources="jacobi", limit=1, project=[]) == 0
    measured = {(r["lp"], r["tp"], r["sources"]): r for r in last_json(capsys)["measured"]}
    assert set(measured) == {(1, 1, OFF), (1, 1, "jacobi"), (2, 1, "jacobi"), (1, 2, OFF), (1, 2, "jacobi")}
    alone, replicas, shards = (measured[mesh] for mesh in ((1, 1, "jacobi"), (2, 1, "jacobi"), (1, 2, "jacobi")))
    assert replicas["tokens_per_step"] == alone["tokens_per_step"] == shards["tokens_per_step"]
    assert replicas["largest_replica_rows"] == pytest.approx(alone["largest_replica_rows_at"]["2"])
    assert replicas["communication"]["plan"] > 0 < replicas["communication"]["commit"]
    assert shards["communication"]["all_reduce"] > 0 == replicas["communication"]["all_reduce"]


def test_a_token_that_is_not_the_models_is_not_lossless():
    answers = {Cell(1, 1, OFF): [{"prompt_ids": [1], "token_ids": [5, 6]}]}
    answers[Cell(1, 1, "jacobi", 16)] = [{"prompt_ids": [1], "token_ids": [5, 7]}]
    for gap, lossless, ties in ((0.5, False, 0), (1e-6, True, 1)):
        records: list[dict[str, Any]] = [{}, {}]
        scaling.check_lossless(records, answers, lambda *_, gap=gap: gap, 1e-4)
        assert records[0]["lossless"] and records[1]["lossless"] is lossless and records[1]["near_ties"] == ties


# The speed benchmark's additions


def test_try_sets_any_lookahead_key():
    name, values = parse_try("x=sources:suffix+recycle,planner:false,row_budget:32,share:true")
    assert name == "x"
    assert values == {"sources": ["suffix", "recycle"], "planner": False, "row_budget": 32, "share": True}
    assert parse_try("y=sources:suffix")[1] == {"sources": ["suffix"]} and parse_try("z=row_budget:null")[1] == {
        "row_budget": None
    }
    for wrong in ("x=planner", "x=", "=planner:true"):
        with pytest.raises(typer.BadParameter):
            parse_try(wrong)


def test_try_settings_become_methods(tmp_path: Path):
    config = Config(model=ModelConfig(path=str(save_tiny_model(tmp_path))), lookahead=LookaheadConfig(planner=False))
    with Engine.from_config(config) as engine:
        methods = outrider_methods(engine, 24, ["one=planner:false,row_budget:40,sources:recycle"])
        assert [method.name for method in methods] == ["lookahead off", "lookahead", "one"]
        first, second = ([method.run([10, 11, 12]) for method in methods] for _ in range(2))
        assert {run.token_ids for run in (*first, *second)} == {first[0].token_ids} and len(first[0].token_ids) == 24
        steps = [[run.completion.usage.num_steps for run in runs if run.completion] for runs in (first, second)]
        assert steps[0][0] == steps[1][0] == 24 and steps[1][1] < steps[0][1] and steps[1][2] < steps[0][2]
        fresh = outrider_methods(engine, 24, ["one=planner:false,row_budget:40,sources:recycle"])[-1]
        alone = fresh.run([10, 11, 12]).completion
        assert alone and alone.usage.num_steps == steps[0][2], "methods teach themselves only"


def test_hugging_face_is_measured_in_both_dtypes_unless_told():
    assert hugging_face_dtypes("auto") == ("bfloat16", "float32") and hugging_face_dtypes("float32") == ("float32",)
    with pytest.raises(typer.BadParameter):
        hugging_face_dtypes("int8")


def test_llama_cpp_wants_a_gguf_file(tmp_path: Path):
    assert gguf_source(None).suffix == ".gguf" and gguf_source("a/b.gguf") == Path("a/b.gguf")
    with pytest.raises(typer.BadParameter, match="not a GGUF"):
        gguf_source(str(tmp_path))


def test_another_engines_rounding_is_told_but_is_no_error():
    equality = Equality(lambda *_: 0.7)
    equality.compare([1], [2, 3, 4], [2, 3, 5])
    assert verdict(equality, peer=False).startswith("NO") and verdict(equality, peer=True) == "first 2 (gaps 7e-01)"


def test_the_floor_is_compared_with_a_plain_decoding_step():
    usage = Usage(num_prompt_tokens=3, num_new_tokens=11, num_steps=11, ttft_s=1.0, latency_s=3.0)
    completion = Completion("r", (1,), tuple(range(11)), "", FinishReason.LENGTH, usage, (1,) * 11)
    baseline = Method("lookahead off", lambda ids: Run((), 1.0), runs=[Run(completion.token_ids, 3.0, completion)])
    assert plain_step_seconds(baseline) == pytest.approx(0.2)
    floor = Floor(bandwidth=10e9, weight_bytes=1e9, plain_step_s=0.2)
    assert floor.seconds == pytest.approx(0.1) and floor.ratio == pytest.approx(2)
