"""The configs that come with Outrider: run configs load, cluster configs pass the installed Ray's own checks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from runtime.config import Config

ROOT = Path(__file__).resolve().parents[2]
RUN_CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RAY_CONFIGS = sorted((ROOT / "configs" / "ray").glob("*.yaml"))


def name(path: Path) -> str:
    return path.stem


def test_there_is_a_config_for_every_size():
    sizes = {"local", "local-lp2", "gpu-1", "gpu-2", "gpu-4", "gpu-8"}
    assert sizes | {"local-sink", "local-sep"} <= {path.stem for path in RUN_CONFIGS}
    assert {path.stem for path in RAY_CONFIGS} == {"aws", "gcp", "local"}


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=name)
def test_run_config_loads(path):
    config = Config.load(path)
    if path.stem.startswith("gpu-"):
        assert config.parallel.num_workers == int(path.stem.removeprefix("gpu-"))
        assert (config.model.device, config.model.dtype) == ("cuda", "bfloat16")


def test_local_config_is_the_defaults_on_the_cpu():
    assert Config.load(ROOT / "configs" / "local.yaml") == Config.from_dict({"model": {"device": "cpu"}})


@pytest.mark.parametrize("path", RAY_CONFIGS, ids=name)
def test_ray_accepts_the_cluster_config(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(prepared)  # against ray-schema.json
    assert prepared["head_node_type"] in prepared["available_node_types"]
    assert any("setup" in command for command in prepared["head_setup_commands"])
    assert any("setup" in command for command in prepared["worker_setup_commands"])


@pytest.mark.parametrize("path", RAY_CONFIGS, ids=name)
def test_cluster_config_mounts_what_it_uses_and_starts_outrider(path):
    config = yaml.safe_load(path.read_text())
    mounts = config["file_mounts"]
    assert [local for local in mounts.values() if not local.startswith("~") and not (ROOT / local).exists()] == []
    (serve,) = [command for command in config["head_start_ray_commands"] if "outrider serve" in command]
    (run_config,) = re.findall(r"--config ~/outrider/(\S+)", serve)
    settings = re.findall(r"--set ([\w.=]+)", serve)
    parallel = Config.load(ROOT / run_config, settings).parallel
    if "available_node_types" in config:  # the nodes have a GPU for every rank, those of a replica on one of them
        types = config["available_node_types"]
        gpus = [types[config["head_node_type"]]["resources"]["GPU"]]
        gpus += [types["worker"]["resources"]["GPU"]] * types["worker"]["min_workers"]
        assert sum(count // parallel.tp for count in gpus) >= parallel.lp


@pytest.mark.parametrize("path", RAY_CONFIGS, ids=name)
def test_cluster_commands_are_shell(path):
    import subprocess

    config = yaml.safe_load(path.read_text())
    commands = [command for key, value in config.items() if key.endswith("_commands") for command in value]
    assert commands
    for command in commands:
        subprocess.run(["bash", "-n", "-c", f"({command})"], check=True)
