"""Every (lp, tp) shape gives the tokens of one process, with real gloo workers on this machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime import Config, Engine, LookaheadConfig, SamplingParams, WorkerError
from runtime.core import Sliding
from runtime.equality import Equality, hugging_face_gap
from runtime.model.cuda.paged_cache import pages_of_slot
from runtime.model.directory import checked_model
from runtime.step import Row
from runtime.tokenizer import Tokenizer
from runtime.workers.mesh_executor import MeshExecutor
from runtime.workers.pool import ProcessPool
from tests.runtime.engine.test_engine import PLAIN, make_prompts

pytestmark = pytest.mark.system

PROMPTS = [*make_prompts(3, seed=11), *make_prompts(1, longest=400, seed=12)]
SAMPLING = {
    "greedy": SamplingParams(max_new_tokens=40),
    "sampled": SamplingParams(max_new_tokens=40, temperature=0.9, seed=5),
    "nucleus": SamplingParams(max_new_tokens=40, temperature=1.2, top_k=50, top_p=0.9, seed=6),
}


def make_config(directory, lp: int = 1, tp: int = 1) -> Config:
    return Config.from_dict(
        {
            "model": {"path": str(directory)},
            "parallel": {"lp": lp, "tp": tp},
            "lookahead": {"planner": False, "window_size": 6, "ngram_size": 4, "guess_set_size": 6},
            "scheduler": {"max_sequences": 4, "max_rows": 128},
        }
    )


@pytest.fixture(scope="module")
def alone(tiny_model):
    """What one process without lookahead gives, prompt by prompt."""
    with Engine.from_config(make_config(tiny_model)) as engine:
        return {
            name: [engine.generate([prompt], sampling, PLAIN)[0] for prompt in PROMPTS]
            for name, sampling in SAMPLING.items()
        }


@pytest.mark.parametrize(("lp", "tp"), [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2), (8, 1), (1, 8)])
def test_every_mesh_equals_one_process(tiny_model, alone, lp, tp):
    gap_of = hugging_face_gap(tiny_model)
    greedy, sampled = Equality(gap_of), Equality(gap_of, tolerance=0.0)
    with Engine.from_config(make_config(tiny_model, lp, tp)) as engine:
        for name, sampling in SAMPLING.items():
            for lookahead in (None, PLAIN):
                together = engine.generate(PROMPTS, sampling, lookahead)
                for prompt, one, other in zip(PROMPTS, alone[name], together, strict=True):
                    equality = greedy if name == "greedy" else sampled
                    equality.compare(prompt, one.token_ids, other.token_ids, f"{name} lp={lp} tp={tp}")
        seconds = engine.stats.seconds
    assert seconds["broadcast"] > 0 and seconds["gather"] > 0
    assert greedy.lossless and sampled.lossless, (greedy, sampled)
    assert greedy.num_tokens > 200 and len(greedy.divergences) <= 1


def test_lookahead_parallel_replicas_share_the_rows(tiny_model):
    """The rows of a step are divided: each replica runs fewer than all, together they run every one."""
    with Engine.from_config(make_config(tiny_model, lp=2)) as engine:
        executor = engine.executor
        assert isinstance(executor, MeshExecutor)
        shares = []
        execute = executor.execute

        def record(plan, *rest):
            shares.append((plan.num_rows, *(len(plan.local_rows(replica)) for replica in range(2))))
            return execute(plan, *rest)

        executor.execute = record
        engine.generate([PROMPTS[0]], SAMPLING["greedy"], LookaheadConfig(planner=False, window_size=12, ngram_size=4))
    wide = [share for share in shares[1:] if share[0] > 30]  # the first step is the prompt's chain, on one replica
    assert wide
    for total, first, second in wide:
        assert max(first, second) < 0.75 * total and first + second >= total


def test_a_worker_that_cannot_start_says_why(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.model.directory.check_weights", lambda directory, spec: None)  # whole here, not there
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(WorkerError, match="safetensors"):
        Engine.from_config(make_config(broken, lp=2))


def test_an_automatic_split_measures_each_and_runs_the_fastest(tiny_model, alone, capsys):
    settings = {
        "model": {"path": str(tiny_model)},
        "parallel": {"split": "auto", "workers": 2},
        "scheduler": {"max_sequences": 2, "max_rows": 40},
    }
    with Engine.from_config(settings) as engine:
        chosen = engine.config.parallel
        assert chosen.num_workers == 2 and chosen.split == "fixed"
        answers = engine.generate(PROMPTS[:2], SAMPLING["greedy"])
    measured = capsys.readouterr().err
    assert "lp=2 tp=1" in measured and "lp=1 tp=2" in measured
    equality = Equality(hugging_face_gap(tiny_model))
    for prompt, one, other in zip(PROMPTS, alone["greedy"], answers, strict=False):
        equality.compare(prompt, one.token_ids, other.token_ids)
    assert equality.lossless and len(equality.divergences) <= 1, equality


def test_each_source_set_and_budget_is_shared_by_eight_replicas(tiny_model, alone):
    """Lossless, and no replica runs many more than its share of the rows."""
    config = make_config(tiny_model, lp=8).merged({"scheduler": {"max_sequences": 4, "max_rows": 300}})
    equality = Equality(hugging_face_gap(tiny_model))
    shares: list[tuple[int, int, int]] = []
    with Engine.from_config(config) as engine:
        execute = engine.executor.execute

        def record(plan, *rest):
            depth = np.ptp(plan.rows[:, Row.POSITION]) + 1 if plan.num_rows else 0
            shares.append((plan.num_rows, plan.most_local_rows(8), int(depth)))
            return execute(plan, *rest)

        engine.executor.execute = record
        for sources in (("jacobi",), ("suffix",), ("recycle",), ("jacobi", "suffix", "recycle")):
            for budget in (16, 300):
                lookahead = LookaheadConfig(
                    planner=False, sources=sources, row_budget=budget, window_size=4, ngram_size=4
                )
                for name in ("greedy", "sampled"):
                    answer = engine.generate([PROMPTS[0]], SAMPLING[name], lookahead)[0]
                    expected = alone[name][0].token_ids
                    if name == "greedy":
                        equality.compare(PROMPTS[0], expected, answer.token_ids, f"{sources} {budget}")
                    else:
                        assert answer.token_ids == expected
        planned = engine.generate([PROMPTS[1]], SAMPLING["greedy"], LookaheadConfig())[0]
        equality.compare(PROMPTS[1], alone["greedy"][1].token_ids, planned.token_ids, "planner")
    assert equality.lossless and len(equality.divergences) <= 1, equality
    wide = [share for share in shares if share[0] > 150]
    assert len(wide) > 10
    assert all(most <= total / 8 + depth for total, most, depth in wide)  # its share, and one path to where that begins


def paged_decoder(config: Config, spec, mesh):
    """A worker.DecoderMaker: what GPUs compute with, its kernels' places taken by torch."""
    from runtime.model.cuda.decoder import CudaDecoder
    from runtime.model.directory import resolve_model
    from runtime.model.loader import load_decoder

    return CudaDecoder(load_decoder(resolve_model(config.model.path), spec, mesh, torch.float32, "torch"))


@pytest.mark.parametrize(("lp", "tp"), [(2, 1), (1, 2)])
def test_ranks_on_paged_caches_equal_one_process(tiny_model, alone, lp, tp):
    """Accepted rows are copied from page to page; shards draw over slices of the vocabulary; pages are counted."""
    gap_of = hugging_face_gap(tiny_model)
    config = make_config(tiny_model, lp, tp)
    directory, spec = checked_model(config)
    executor = MeshExecutor(config, spec, ProcessPool(paged_decoder))
    assert executor.num_pages == (4 * pages_of_slot(Sliding(None, 512, slot=False), 128),)
    with Engine(config, spec, Tokenizer(directory), executor) as engine:
        for name in ("greedy", "nucleus"):
            equality = Equality(gap_of, tolerance=1e-4 if name == "greedy" else 0.0)
            answers = engine.generate(PROMPTS[:1], SAMPLING[name])
            for prompt, one, other in zip(PROMPTS[:1], alone[name][:1], answers, strict=True):
                equality.compare(prompt, one.token_ids, other.token_ids, f"{name} lp={lp} tp={tp}")
            assert equality.lossless, equality
