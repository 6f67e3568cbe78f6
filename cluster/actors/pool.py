"""RayPool: the mesh's ranks as Ray actors, one device each, a tensor-parallel group never split over machines."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import ray
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray._raylet import Config as RaySettings  # type: ignore[attr-defined]
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors import folder, processes
from runtime.config import Config
from runtime.errors import ConfigError
from runtime.model.spec import ModelSpec
from runtime.workers.pool import WORKER_ENVIRONMENT
from runtime.workers.roster import Place

STOP_GRACE_S = 5.0
"""How long workers that were told to stop may take before they are killed."""
CONNECT_TIMEOUT_S = 5.0
REPORT_TIMEOUT_S = 15.0
"""How long a new cluster may take to report its node types."""
OBJECT_STORE_BYTES = 128 * 2**20
"""Object store of a local Ray. Nothing but the actors' arguments passes through it."""


@dataclass(frozen=True)
class _Actor:
    actor: Any
    place: ray.ObjectRef
    """MeshWorker.place"""
    run: ray.ObjectRef


class RayPool:
    """Workers as actors of the cluster that `ray.address` or RAY_ADDRESS names, else of a local Ray.

    Raises ConfigError where the cluster cannot be reached, and from `open` where it has too little room.
    """

    own_devices = True

    def __init__(self, config: Config) -> None:
        self._workers: dict[int, _Actor] = {}
        self._groups: list[PlacementGroup] = []
        self._closed = False
        self._connected_before = ray.is_initialized()
        address = config.ray.address or os.environ.get("RAY_ADDRESS") or "local"
        self._local = not self._connected_before and address == "local"
        self._auth_mode = os.environ.get("RAY_AUTH_MODE")
        self._folder: Path | None = None
        if self._local:
            self._folder = folder.make()
            try:
                _start_local(config, self._folder)
            except BaseException:
                folder.remove(self._folder)
                raise
        elif not self._connected_before:
            _join(address)
        self.host: str = "127.0.0.1" if self._local else ray.util.get_node_ip_address()
        """This machine's address, as the workers see it."""

    def open(self, config: Config, spec: ModelSpec) -> None:
        """Reserve every worker's place.

        Raises ConfigError naming what is missing where the places cannot be had within `ray.startup_timeout_s`.
        """
        try:
            self._config, self._spec = _with_device(config), spec
            self._reserve(self._config)
        except BaseException:
            self.close()
            raise
        if not self._local:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_of(self.host))

    def start(self, place: Place) -> None:
        """Where its bundle is; where the node of that has gone, the worker starts once Ray has found another."""
        config, tp = self._config, self._config.parallel.tp
        replica, shard = divmod(place.position, tp)
        nodes = [placement_group_table(group)["bundles_to_node_id"] for group in self._groups]
        workers_on = Counter(node for bundles in nodes for node in bundles.values())
        node = nodes[replica].get(shard, "")
        threads = config.parallel.threads_each(_cores(node), max(workers_on[node], 1))
        resource, amount = _demand(config)
        actor = (
            ray.remote(MeshWorker)
            .options(
                num_cpus=amount if resource == "CPU" else 0,
                num_gpus=amount if resource == "GPU" else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._groups[replica], placement_group_bundle_index=shard
                ),
                max_restarts=0,
                runtime_env={} if self._local else {"env_vars": _environment(threads)},
            )
            .remote()
        )
        parallel = config.parallel.model_copy(update={"threads": threads})
        where = actor.place.remote()
        run = actor.run.remote(config.model_copy(update={"parallel": parallel}), self._spec, place, self._local)
        self._workers[place.worker] = _Actor(actor, where, run)

    def failures(self) -> dict[int, str]:
        by_run = {worker.run: number for number, worker in self._workers.items()}
        if not by_run:
            return {}
        done, _ = ray.wait(list(by_run), num_returns=len(by_run), timeout=0)
        for run in done:
            del self._workers[by_run[run]]
        return {by_run[run]: _cause(run) for run in done}

    def end(self, worker: int) -> None:
        ended = self._workers.pop(worker)
        ray.kill(ended.actor)
        with suppress(RayError, OSError):  # a process that is stopped would keep its place for long
            node, pid = ray.get(ended.place, timeout=0)
            if node == ray.get_runtime_context().get_node_id():
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """End the actors, give back their places, and end Ray where this pool started it. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            self._end_actors()
        finally:
            if self._local:
                started = processes.descendants()  # Ray's daemons and, below them, its workers
                ray_processes = [process for process in started if _is_ray(process, started)]
                ray.shutdown()
                processes.end(ray_processes, STOP_GRACE_S)
                assert self._folder is not None
                folder.remove(self._folder)
            elif not self._connected_before:
                ray.shutdown()
                _restore("RAY_AUTH_MODE", self._auth_mode)

    def _reserve(self, config: Config) -> None:
        """One placement group per replica, its tp bundles on one node."""
        lp, tp = config.parallel.lp, config.parallel.tp
        resource, amount = _demand(config)
        if _replicas_that_fit(resource, amount * tp) < lp and (self._local or not _can_grow()):
            raise _shortfall(config, "this cluster does not grow")
        if not self._connected_before and not self._local:
            print(f"waiting for {lp * tp * amount:g} {resource}s of the Ray cluster ...", file=sys.stderr)
        self._groups = [placement_group([{resource: amount}] * tp, strategy="STRICT_PACK") for _ in range(lp)]
        deadline = time.monotonic() + config.ray.startup_timeout_s
        for group in self._groups:
            if not group.wait(max(deadline - time.monotonic(), 0.1)):
                raise _shortfall(config, f"they were not free within {config.ray.startup_timeout_s:g} s")

    def _end_actors(self) -> None:
        if not ray.is_initialized():
            return
        with suppress(Exception):  # a Ray that has fallen over holds no actors, and cannot say so
            runs = [worker.run for worker in self._workers.values()]
            if runs:
                ray.wait(runs, num_returns=len(runs), timeout=STOP_GRACE_S)
            for worker in self._workers.values():
                ray.kill(worker.actor)
            if runs:
                ray.wait(runs, num_returns=len(runs), timeout=STOP_GRACE_S)
            for group in self._groups:
                remove_placement_group(group)


class MeshWorker:
    """The actor: one rank in a process of its own."""

    def place(self) -> tuple[str, int]:
        """The node's id, and that of the process there."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def run(self, config: Config, spec: ModelSpec, place: Place, local: bool) -> None:
        """Be the worker until the coordinator says stop. A lasting call: its end tells the pool about failures."""
        if not local:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_of(ray.util.get_node_ip_address()))
        from runtime.workers.worker import serve

        serve(config, spec, place)


def _environment(threads: int) -> dict[str, str]:
    """Of a worker. Read when torch is imported, so it must be there before the process starts."""
    return WORKER_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}


def _start_local(config: Config, place: Path) -> None:
    """A Ray of this machine, with as many logical CPUs as the mesh asks for: workers may outnumber the cores.

    Workers have its environment: one of their own would cost each another start of Python.
    """
    num_workers = config.parallel.num_workers
    environment = _environment(config.parallel.threads_each(_own_cores(), num_workers))
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        ray.init(
            address="local",
            num_cpus=max(1, math.ceil(num_workers * config.ray.cpus_per_worker)),
            include_dashboard=False,
            _temp_dir=str(place),
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
            # Idle processes started ahead would only take the cores from those that work.
            _system_config={"enable_worker_prestart": False, "prestart_worker_first_driver": False},
        )
    finally:
        for name, value in before.items():
            _restore(name, value)


def _restore(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value


def _join(address: str) -> None:
    if address.startswith("ray://"):
        remedy = "Run on a node of the cluster and name its GCS address (host:6379) or auto."
        raise ConfigError("ray.address", address, "is a Ray Client address", remedy)
    if ":" in address:
        _match_auth_mode(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        remedy = "Start the cluster (ray up, ray start --head), and give this node its token (ray get-auth-token)."
        raise ConfigError("ray.address", address, f"no Ray cluster can be joined ({error})", remedy) from error


def _match_auth_mode(address: str) -> None:
    """Turn Ray's token mode on or off as the cluster has it. Raises ConfigError if no cluster answers.

    Left alone, Ray waits minutes for an address where nobody answers, does not find an authenticated cluster, and in
    token mode loses its actors on one without. A driver is in token mode by chance: by having had a local Ray before.
    """
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:  # as Ray's own have it
        try:
            stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=CONNECT_TIMEOUT_S)
            mode = "disabled"
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                remedy = "Name the GCS address of a running cluster (host:6379), or unset it for a local Ray."
                raise ConfigError(
                    "ray.address", address, f"no Ray answers there ({error.details()})", remedy
                ) from error
            mode = "token"
    os.environ["RAY_AUTH_MODE"] = mode
    # Ray has read its environment when it was imported, and keeps the token that it found.
    RaySettings.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _with_device(config: Config) -> Config:
    """`auto` made definite, the same for every rank: cuda where the cluster has a GPU for each."""
    if config.model.device != "auto":
        return config
    gpus = ray.cluster_resources().get("GPU", 0)
    device = "cuda" if gpus >= config.parallel.num_workers else "cpu"
    return config.model_copy(update={"model": config.model.model_copy(update={"device": device})})


def _demand(config: Config) -> tuple[str, float]:
    """(resource, amount) that one rank reserves."""
    return ("GPU", 1) if config.model.device == "cuda" else ("CPU", config.ray.cpus_per_worker)


def _living_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _replicas_that_fit(resource: str, amount: float) -> int:
    """How many bundles of `amount` the nodes have room for when nothing else runs."""
    return sum(int(node["Resources"].get(resource, 0) // amount) for node in _living_nodes())


def _can_grow() -> bool:
    """Whether an autoscaler may add nodes: then a shortfall is no reason to give up yet.

    A cluster started by hand reports node types that are made up from its nodes' ids. One that has
    just been started reports nothing for some seconds; one that keeps silent is given the benefit of the doubt.
    """
    deadline = time.monotonic() + REPORT_TIMEOUT_S
    while time.monotonic() < deadline:
        report = json.loads(_internal_kv_get(b"__autoscaling_status") or b"{}").get("autoscaler_report")
        if report:
            made_up = {f"node_{node['NodeID']}" for node in ray.nodes()}
            return any(node_type not in made_up for node_type in report["active_nodes"])
        time.sleep(0.2)
    return True


def _shortfall(config: Config, why: str) -> ConfigError:
    lp, tp = config.parallel.lp, config.parallel.tp
    resource, amount = _demand(config)
    total = ray.cluster_resources().get(resource, 0)
    free = ray.available_resources().get(resource, 0)
    each = ", ".join(
        f"{node['NodeManagerAddress']}: {node['Resources'].get(resource, 0):g}" for node in _living_nodes()
    )
    groups = f" ({lp} groups of {tp * amount:g} on one node each)" if tp > 1 else ""
    problem = (
        f"the mesh asks for {lp * tp * amount:g} {resource}{groups}, the Ray cluster has {total:g} {resource}, "
        f"{free:g} free ({each}), and {why}"
    )
    remedy = "Lower parallel.lp or parallel.tp, free the resource, or add nodes."
    return ConfigError("parallel", f"lp={lp} tp={tp}", problem, remedy)


def _cores(node_id: str) -> int:
    """CPU cores of a node; this one is asked itself, for its logical CPUs may be more than it has."""
    if node_id == ray.get_runtime_context().get_node_id():
        return _own_cores()
    return next((int(n["Resources"].get("CPU", 1)) for n in ray.nodes() if n["NodeID"] == node_id), 1)


def _own_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _interface_of(address: str) -> str:
    """The network interface with this IP address: gloo would take whatever the host name resolves to."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    raise ConfigError("ray.address", address, "is no address of this machine", "Set GLOO_SOCKET_IFNAME.")


def _cause(run: ray.ObjectRef) -> str:
    """The last lines of why the run ended."""
    try:
        ray.get(run, timeout=CONNECT_TIMEOUT_S)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return "\n".join(lines[-6:])
    return "it left its loop"


def _is_ray(process: psutil.Process, started: list[psutil.Process]) -> bool:
    """Whether it is one of Ray's own processes or was started by one."""
    ids = {other.pid for other in started}
    while True:
        try:
            command = " ".join(process.cmdline())
            parent = process.parent()
        except psutil.Error:
            return False
        if "/ray/" in command or command.startswith("ray::"):
            return True
        if parent is None or parent.pid not in ids:
            return False
        process = parent
