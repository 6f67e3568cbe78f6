"""The native kernels compute what torch's do, and a row's bits depend on nothing but what the row sees."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime import Config
from runtime.compiler import find_compiler
from runtime.errors import ConfigError
from runtime.mesh.mesh import Mesh
from runtime.model import native
from runtime.model.attention import RowBatch
from runtime.model.decoder import Decoder
from runtime.model.directory import load_spec
from runtime.model.kv_cache import KVCache
from runtime.model.loader import load_decoder
from runtime.model.native import build
from runtime.model.native.decoder import NativeDecoder
from runtime.model.sampler import Logits
from runtime.retention import layer_groups
from tests.models import save_tiny_model
from tests.oracles import POLICIES, some_text
from tests.zoo import VARIANTS, Runner, make_model, some_tokens

WORKS, REASON = native.available()
if not WORKS and not (os.environ.get("CI") and shutil.which("g++")):
    pytest.skip(REASON, allow_module_level=True)

UNSUPPORTED = ("llama-gelu", "llama-attention_bias", "llama-mlp_bias", "qwen3-bias-window")
FAMILIES = ("neox", "olmo2", "gemma3")
"""Those beyond Llama, which torch runs."""
SUPPORTED = [name for name in VARIANTS if name not in UNSUPPORTED and not name.startswith(FAMILIES)]
DTYPES = [torch.float32, torch.bfloat16]


def load(directory: Path, dtype: torch.dtype = torch.float32, kernels: str = "native", mesh: Mesh | None = None):
    decoder = load_decoder(directory, load_spec(directory), mesh or Mesh(), dtype, kernels)
    assert isinstance(decoder, Decoder if kernels == "torch" else NativeDecoder)
    return decoder


def save_variant(directory: Path, variant: str) -> Path:
    make_model(variant).save_pretrained(directory)
    return directory


def random_tree(count: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(rng.integers(-1, row)) for row in range(count)]


# The same numbers as torch's


def run(decoder: Decoder | NativeDecoder) -> torch.Tensor:
    """Two sequences in uneven chunks; then one step with a random tree on each."""
    runner = Runner(decoder, num_slots=2)
    found = [runner.extend(some_tokens(count, seed=count), rope_length=12) for count in (1, 11, 20)]
    found.append(runner.extend(some_tokens(5), slot=1, rope_length=5))
    parents = random_tree(14) + [parent if parent < 0 else parent + 14 for parent in random_tree(9)]
    found.append(runner.rows(some_tokens(23, seed=4), parents, [1] * 14 + [0] * 9, rope_length=12))
    return torch.cat(found)


@pytest.mark.parametrize("variant", SUPPORTED)
def test_native_logits_equal_torch(tmp_path: Path, variant: str) -> None:
    save_variant(tmp_path, variant)
    ours, theirs = run(load(tmp_path)), run(load(tmp_path, kernels="torch"))
    assert ours.dtype == torch.float32 and ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4
    assert theirs.std() > 0.1


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3", "llama-head_dim"])
def test_native_bfloat16_is_as_close_to_float32_as_torch(tmp_path: Path, variant: str) -> None:
    save_variant(tmp_path, variant)
    exact = run(load(tmp_path, kernels="torch"))
    ours, theirs = (run(load(tmp_path, torch.bfloat16, kernels)) for kernels in ("native", "torch"))
    assert 0 < (ours - exact).square().mean() < 1.2 * (theirs - exact).square().mean()


@pytest.mark.parametrize("policy", POLICIES)
def test_native_equals_torch_under_every_policy(tmp_path: Path, policy: str) -> None:
    """Masks, anchors at slots, compactions: in chunks, each followed by a tree."""
    save_tiny_model(tmp_path)
    streams = [Stream(load(tmp_path, kernels=kernels), POLICIES[policy]) for kernels in ("native", "torch")]
    tokens, rng = some_text(90), np.random.default_rng(0)
    while tokens:
        count = min(len(tokens), streams[0].room, int(rng.integers(1, 30)))
        chunk, tokens = tokens[:count], tokens[count:]
        parents = [*range(-1, count - 1), *random_tree(count)]
        ours, theirs = (stream.rows(chunk * 2, parents) for stream in streams)
        assert (ours - theirs).abs().max() < 1e-4
        for stream in streams:
            stream.commit(list(range(count)), chunk)


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_search_finds_what_torch_finds(tmp_path: Path, dtype: torch.dtype, k: int) -> None:
    """The vocabulary fills no whole number of panels; of equal logits the first one is the best."""
    save_tiny_model(tmp_path)
    decoder = load(tmp_path, dtype)
    hidden = torch.randn(9, decoder.spec.hidden_size, generator=torch.Generator().manual_seed(k)) * 3
    hidden[4] = 0  # all logits are equal
    found = decoder.search(hidden, k, keep_all=True)
    assert torch.equal(found.values, decoder.logits(hidden)) and found.values.shape[1] == decoder.spec.vocab_size
    theirs = Logits(found.values)
    assert all(torch.equal(one, other) for one, other in zip(found.best(), theirs.best(), strict=True))
    values, places, whole = found.top(k)
    assert torch.equal(values, theirs.top(k)[0]) and torch.equal(found.values.gather(1, places), values)
    short = -found.values.shape[1] % 32
    largest = torch.nn.functional.pad(found.values, (0, short), value=-torch.inf).unflatten(1, (-1, 32)).amax(2)
    others = largest.scatter(1, largest.topk(k).indices, -torch.inf)
    assert (whole - torch.cat([values, others], dim=1).logsumexp(1)).abs()[torch.arange(9) != 4].max() < 1e-4
    few = decoder.search(hidden, k, keep_all=False)
    assert all(torch.equal(one, other) for one, other in zip(few.top(k), found.top(k), strict=True))


class _Joined(Mesh):
    """A rank of a TP group whose ranks are threads of this process."""

    def meet(self, barrier: threading.Barrier, parts: list[torch.Tensor]) -> _Joined:
        object.__setattr__(self, "barrier", barrier)
        object.__setattr__(self, "parts", parts)
        return self

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.parts[self.shard] = tensor.clone()
        self.barrier.wait()
        tensor.copy_(sum(self.parts))
        self.barrier.wait()
        return tensor


@pytest.mark.parametrize("tp", [2, 3, 5])
@pytest.mark.parametrize("variant", ["llama-tied", "qwen2", "qwen3"])
def test_native_shards_add_up(tmp_path: Path, variant: str, tp: int) -> None:
    """Heads, inner features and vocabulary divide by none of them, so that head rectangles are filled up."""
    save_variant(tmp_path, variant)
    barrier, parts, found = threading.Barrier(tp, timeout=60), [torch.empty(0)] * tp, [torch.empty(0)] * tp

    def rank(shard: int) -> None:
        found[shard] = run(load(tmp_path, mesh=_Joined(tp=tp, shard=shard).meet(barrier, parts)))

    threads = [threading.Thread(target=rank, args=(shard,)) for shard in range(tp)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (torch.cat(found, dim=1) - run(load(tmp_path))).abs().max() < 1e-4


# The same bits, whatever stands beside a row


class Stream:
    """One sequence through a decoder, over caches of a policy."""

    def __init__(self, decoder: Decoder | NativeDecoder, cache: dict) -> None:
        section = Config.from_dict({"cache": cache}).cache
        groups = layer_groups(section, decoder.spec.num_layers, 512)
        self.decoder = decoder
        self.caches: tuple[KVCache, ...] = decoder.make_caches(groups, num_slots=2, max_staged=200)
        self.length = 0

    @property
    def room(self) -> int:
        """How deep the next step's rows may go."""
        return min(cache.retained[1].horizon for cache in self.caches) - self.length

    def rows(self, tokens: list[int], parents: list[int]) -> torch.Tensor:
        depths: list[int] = []
        for parent in parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        count = len(tokens)
        columns = tokens, np.add(depths, self.length), parents, [1] * count, [0] * count
        batch = RowBatch.build(*(np.array(column) for column in columns), device=torch.device("cpu"))
        return self.decoder.logits(self.decoder.forward(batch, self.caches))

    def commit(self, rows: list[int], tokens: list[int]) -> None:
        for cache in self.caches:
            cache.commit(1, rows, tokens)
        self.length += len(tokens)


def tree_around(path: int, count: int, room: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Parents of a random tree of `count` rows, none deeper than `room`, and the rows of a path in it, that long:
    the first ones, as where a prompt's end has guesses behind it, or any."""
    on_path = list(range(path)) if rng.random() < 0.3 else sorted(rng.choice(count, path, replace=False).tolist())
    parents, depths = [], []
    for row in range(count):
        if row in on_path:
            place = on_path.index(row)
            parent = on_path[place - 1] if place else -1
        else:
            fitting = [-1, *(other for other in range(row) if depths[other] + 1 < room)]
            parent = int(rng.choice(fitting))
        parents.append(parent)
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return parents, on_path


def assert_same_bits(decoder: NativeDecoder, cache: dict, tokens: list[int], seed: int = 0) -> None:
    """Every token alone in its step, and on a path of a random tree of 1 to 200 rows; chains among them."""
    rng = np.random.default_rng(seed)
    alone, beside = Stream(decoder, cache), Stream(decoder, cache)
    while tokens:
        path = min(len(tokens), beside.room, int(rng.integers(1, rng.choice([14, 14, 70]))))
        count = int(rng.choice([path, path + 1, path + int(rng.integers(2, 24)), int(rng.integers(path, 201))]))
        parents, on_path = tree_around(path, count, beside.room, rng)
        ids = some_text(count, seed=len(tokens))
        for row, token in zip(on_path, tokens, strict=False):
            ids[row] = token
        rows = beside.rows(ids, parents)
        beside.commit(on_path, tokens[:path])
        for place, row in enumerate(on_path):
            expected = alone.rows(tokens[place : place + 1], [-1])[0]
            alone.commit([0], tokens[place : place + 1])
            assert torch.equal(rows[row], expected), f"row {row} of {count} at position {alone.length - 1}"
        tokens = tokens[path:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_bits_do_not_depend_on_the_step(tmp_path: Path, policy: str, dtype: torch.dtype) -> None:
    save_tiny_model(tmp_path)
    assert_same_bits(load(tmp_path, dtype), POLICIES[policy], some_text(160))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["qwen3", "qwen2", "mistral-window", "llama-head_dim", "llama-one_kv_head"])
def test_bits_do_not_depend_on_the_step_in_any_architecture(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    assert_same_bits(load(save_variant(tmp_path, variant), dtype), POLICIES["full"], some_text(90), seed=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_full_layers_beside_others(tmp_path: Path, dtype: torch.dtype) -> None:
    save_tiny_model(tmp_path)
    assert_same_bits(load(tmp_path, dtype), POLICIES["sep"] | {"full_layers": (0, -1)}, some_text(60), seed=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(tmp_path: Path, dtype: torch.dtype) -> None:
    save_tiny_model(tmp_path, hidden_size=144, head_dim=64, intermediate_size=300)
    decoder, before = load(tmp_path, dtype), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            stream = Stream(decoder, POLICIES["full"])
            first = stream.rows(some_text(150), list(range(-1, 149)))
            stream.commit(list(range(150)), some_text(150))
            found.append(torch.cat([first, stream.rows(some_text(40), random_tree(40))]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_bits_do_not_depend_on_other_sequences(tmp_path: Path) -> None:
    decoder = load(save_variant(tmp_path, "llama"), torch.bfloat16)
    alone, beside = Runner(decoder, num_slots=2), Runner(decoder, num_slots=2)
    for runner in (alone, beside):
        runner.extend(some_tokens(30), slot=0)
    beside.extend(some_tokens(17, seed=1), slot=1)
    tokens, parents = some_tokens(12, seed=2), [-1, 0, 1, -1, 3, 4]
    mixed = beside.rows(tokens, [*parents, -1, 6, 7, -1, 9, 10], [1] * 6 + [0] * 6)
    assert torch.equal(mixed[6:], alone.rows(tokens[6:], parents))


# Where there are none


@pytest.mark.parametrize("variant", [*UNSUPPORTED, *FAMILIES])
def test_models_that_the_kernels_lack_run_on_torch(tmp_path: Path, variant: str) -> None:
    save_variant(tmp_path, variant)
    assert isinstance(load_decoder(tmp_path, load_spec(tmp_path), Mesh(), torch.float32), Decoder)
    with pytest.raises(ConfigError, match=r"model\.kernels.*(activation|bias|do not have).*auto or torch"):
        load(tmp_path)


def test_other_dtypes_run_on_torch(tiny_model: Path) -> None:
    for dtype in (torch.float16, torch.float64):
        assert isinstance(load_decoder(tiny_model, load_spec(tiny_model), Mesh(), dtype), Decoder)
    with pytest.raises(ConfigError, match=r"model\.kernels.*float16"):
        load(tiny_model, torch.float16)


BROKEN = """#!/bin/sh
[ "$1" = --version ] && echo "broken 1.0" && exit
echo "kernels.cpp:1: error: out of order" >&2
exit 1
"""


@pytest.mark.parametrize(("script", "problem"), [(None, "no C\\+\\+ compiler found"), (BROKEN, "out of order")])
def test_without_a_working_compiler_torch_runs(tmp_path: Path, tiny_model: Path, monkeypatch, script, problem) -> None:
    compiler = tmp_path / "c++"
    if script is not None:
        compiler.write_text(script)
        compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "cache"))
    build._loaded.cache_clear()
    try:
        works, reason = native.available()
        assert not works
        assert isinstance(load_decoder(tiny_model, load_spec(tiny_model), Mesh(), torch.float32), Decoder)
        with pytest.raises(ConfigError, match=problem):
            load(tiny_model)
    finally:
        build._loaded.cache_clear()


@pytest.mark.system
def test_processes_that_build_at_once_build_once(tmp_path: Path) -> None:
    code = "from runtime.model import native; works, where = native.available(); assert works, where"
    compiler = " ".join(find_compiler(os.environ.get("CXX")).command)
    counting = tmp_path / "counting-compiler"
    counting.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo "$*" >> {tmp_path}/log\nexec {compiler} "$@"\n')
    counting.chmod(0o755)
    environment = os.environ | {"OUTRIDER_CACHE": str(tmp_path), "CXX": str(counting)}
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    messages = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], messages
    assert (tmp_path / "log").read_text().count("kernels.cpp") == 1
    kernels = [path for path in (tmp_path / "native").iterdir() if path.name.startswith("kernels")]
    assert sorted(path.suffix for path in kernels) == [".lock", ".so"]
