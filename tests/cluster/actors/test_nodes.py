"""A real Ray cluster of several nodes on this machine: one goes in the middle of an answer, and another comes."""

from __future__ import annotations

import time

import pytest

from cluster.actors import processes
from cluster.client.backends import open_engine
from runtime.config import SamplingParams
from tests.cluster.actors.test_pool import PROMPTS, config_for, leaves_nothing, model

__all__ = ["leaves_nothing", "model"]
pytestmark = [pytest.mark.system, pytest.mark.long, pytest.mark.timeout(240)]


@pytest.fixture
def cluster(monkeypatch, leaves_nothing):
    """Two nodes with a CPU each."""
    from ray._raylet import Config as RaySettings
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    RaySettings.initialize("")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 10**8})
    cluster.add_node(num_cpus=1, object_store_memory=10**8)
    leaves_nothing += processes.descendants()
    yield cluster
    cluster.shutdown()


def test_an_answer_goes_on_without_a_node_and_the_mesh_is_whole_with_another(model, cluster) -> None:
    sampling = SamplingParams(max_new_tokens=120, ignore_eos=True)
    with open_engine(config_for(model)) as engine:
        (alone,) = engine.generate(PROMPTS[0], sampling)
    settings = {"ray": {"address": cluster.address}, "parallel": {"lp": 2}}
    with open_engine(config_for(model, **settings)) as engine:
        outputs = engine.stream(PROMPTS[0], sampling)
        tokens = [*next(outputs).token_ids]
        (other,) = cluster.worker_nodes
        cluster.remove_node(other, allow_graceful=False)
        tokens += [token for output in outputs for token in output.token_ids]
        assert tuple(tokens) == alone.token_ids
        assert engine.executor.num_replicas == 1 and engine.executor.num_lost == 1
        cluster.add_node(num_cpus=1, object_store_memory=10**8)
        deadline = time.monotonic() + 120
        while engine.executor.num_replicas < 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)
            engine.heartbeat()
        assert engine.generate(PROMPTS[0], sampling)[0].token_ids == alone.token_ids
