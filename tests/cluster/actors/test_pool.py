"""A mesh on a real local Ray: what it answers, what it says when it cannot, and what it leaves behind."""

from __future__ import annotations

import time

import psutil
import pytest

from cluster.actors import processes
from cluster.actors.pool import RayPool
from cluster.client.backends import open_engine
from runtime.config import Config, SamplingParams
from runtime.engine.engine import Engine
from runtime.errors import ConfigError
from runtime.model.directory import load_spec
from tests.models import save_tiny_model

pytestmark = [pytest.mark.system, pytest.mark.slow]

PROMPTS = ["one two one two one", "abcabcabcabc"]
SAMPLING = SamplingParams(max_new_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def config_for(model, **sections) -> Config:
    return Config.from_dict({"model": {"path": str(model), "device": "cpu"}, "ray": {"address": "local"}, **sections})


@pytest.fixture
def leaves_nothing():
    """Fails the test if a process that it started, however remotely, is still there in the end."""
    before = {process.pid for process in processes.descendants()}
    seen: list[psutil.Process] = []
    yield seen
    seen += processes.descendants()
    left = [processes.describe(process) for process in processes.alive(seen) if process.pid not in before]
    assert not left


def test_two_ray_workers_answer_like_one_process(model, leaves_nothing):
    with Engine.from_config(config_for(model)) as engine:
        alone = engine.generate(PROMPTS, SAMPLING)
    with open_engine(config_for(model, parallel={"lp": 2})) as engine:
        together = engine.generate(PROMPTS, SAMPLING)
        leaves_nothing += processes.descendants()
        names = " ".join(processes.describe(process) for process in leaves_nothing)
        assert "raylet" in names and "gcs_server" in names  # it did run on Ray
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


def test_shortfall_names_the_resource_at_once_and_ends_ray(model, leaves_nothing):
    config = config_for(model, parallel={"lp": 9, "tp": 3})
    config = config.model_copy(update={"model": config.model.model_copy(update={"device": "cuda"})})
    pool = RayPool(config)
    leaves_nothing += processes.descendants()
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"asks for 27 GPU \(9 groups of 3 on one node each\), the Ray cluster has"):
        pool.open(config, load_spec(model))
    assert time.monotonic() - started < 10  # and not the 120 seconds that a cluster may take to grow


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"lp": 2}, id="another has the caches"),
        pytest.param({"tp": 2}, id="nobody has", marks=pytest.mark.long),
    ],
)
def test_a_killed_worker_costs_time_and_no_token(model, leaves_nothing, mesh):
    sampling = SamplingParams(max_new_tokens=200, ignore_eos=True)
    with open_engine(config_for(model)) as engine:
        (alone,) = engine.generate(PROMPTS[0], sampling)
    with open_engine(config_for(model, parallel=mesh)) as engine:
        outputs = engine.stream(PROMPTS[0], sampling)
        tokens = [*next(outputs).token_ids]
        leaves_nothing += processes.descendants()
        victim = next(p for p in leaves_nothing if "MeshWorker" in processes.describe(p))
        victim.kill()
        started = time.monotonic()
        tokens += [token for output in outputs for token in output.token_ids]
        assert time.monotonic() - started < 60
        assert engine.executor.num_lost == 1
    assert tuple(tokens) == alone.token_ids


@pytest.fixture(params=["token", "disabled"])
def two_nodes(request, monkeypatch, leaves_nothing):
    """Address of a cluster of two nodes with one CPU each, with Ray's token authentication or without."""
    from ray._raylet import Config as RaySettings
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", request.param)
    RaySettings.initialize("")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 10**8})
    cluster.add_node(num_cpus=1, object_store_memory=10**8)
    leaves_nothing += processes.descendants()
    # What this process has in mind is none of the cluster's business.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled" if request.param == "token" else "token")
    RaySettings.initialize("")
    yield cluster.address
    cluster.shutdown()


def test_joins_a_cluster_and_never_splits_a_tensor_parallel_group(model, two_nodes):
    def config(**parallel) -> Config:
        return config_for(model, ray={"address": two_nodes}, parallel=parallel)

    with pytest.raises(ConfigError, match=r"2 CPU \(1 groups of 2 on one node each\), the Ray cluster has 2 CPU"):
        pool = RayPool(config(tp=2))
        pool.open(config(tp=2), load_spec(model))
    with open_engine(config(lp=2)) as engine:
        (answer,) = engine.generate(PROMPTS[:1], SAMPLING)
    assert len(answer.token_ids) == SAMPLING.max_new_tokens


def test_nobody_at_the_address_is_said_at_once():
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"ray.address = '127.0.0.1:1': no Ray answers there"):
        RayPool(Config.from_dict({"ray": {"address": "127.0.0.1:1"}}))
    with pytest.raises(ConfigError, match="Ray Client"):
        RayPool(Config.from_dict({"ray": {"address": "ray://127.0.0.1:10001"}}))
    assert time.monotonic() - started < 10
