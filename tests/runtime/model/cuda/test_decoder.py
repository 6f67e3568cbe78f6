"""CudaDecoder computes what Decoder does: every policy, several sequences, tensor-parallel shards; and a step of any
number of sequences is the same work, sent once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from runtime import Config, Engine, LookaheadConfig, SamplingParams
from runtime.mesh.mesh import Mesh
from runtime.model.cuda import attention
from runtime.model.cuda import decoder as decoder_module
from runtime.model.cuda.choice import cuda_decoder, cuda_obstacle
from runtime.model.cuda.decoder import EAGER, CudaDecoder, Operations
from runtime.model.cuda.paged_cache import OutOfPagesError
from runtime.model.decoder import Decoder
from runtime.model.directory import load_spec
from runtime.model.loader import load_decoder
from runtime.retention import layer_groups
from tests.models import save_tiny_model
from tests.oracles import POLICIES, some_text
from tests.runtime.engine.test_engine import PLAIN
from tests.runtime.engine.test_streaming_exact import Stream, difference
from tests.runtime.model.cuda.layer import needs_interpreter
from tests.runtime.model.cuda.test_graphs import step_by_step
from tests.zoo import Runner, make_model, some_tokens

CPU = torch.device("cpu")


def torch_decoder(place: Path, dtype: torch.dtype, mesh: Mesh | None = None) -> Decoder:
    decoder = load_decoder(place, load_spec(place), mesh or Mesh(), dtype, kernels="torch")
    assert isinstance(decoder, Decoder)
    return decoder


@pytest.fixture(scope="module")
def decoder(tiny_model) -> Decoder:
    return torch_decoder(tiny_model, torch.float64)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_equals_the_plain_decoder(decoder, policy) -> None:
    streams = Stream(decoder, POLICIES[policy]), Stream(CudaDecoder(decoder), POLICIES[policy])
    assert step_by_step(*streams, some_text(90, seed=1), seed=2) < 1e-10


@pytest.mark.parametrize("full_layers", [(0,), (0, -1)], ids=str)
def test_layers_that_keep_other_tokens(decoder, full_layers) -> None:
    cache = POLICIES["sep"] | {"full_layers": full_layers}
    streams = Stream(decoder, cache), Stream(CudaDecoder(decoder), cache)
    assert step_by_step(*streams, some_text(90, seed=3), seed=4) < 1e-10


@pytest.mark.parametrize(
    "variant", ["llama-mlp_bias", "llama-gelu", "mistral-window", "qwen3-bias-window", "qwen2-rope-dynamic"]
)
def test_windows_biases_and_rotations_in_float32(tmp_path: Path, variant: str) -> None:
    make_model(variant).save_pretrained(tmp_path)
    plain = torch_decoder(tmp_path, torch.float32)
    runners = [Runner(plain), Runner(CudaDecoder(plain))]
    tokens = some_tokens(60)
    for start, stop in ((0, 30), (30, 31), (31, 47), (47, 60)):
        one, other = (runner.extend(tokens[start:stop], rope_length=30) for runner in runners)
        assert difference(one, other) < 1e-5
    one, other = (runner.rows(tokens[:6], parents=[-1, 0, 0, 1, 2, -1], rope_length=30) for runner in runners)
    assert difference(one, other) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_the_plain_decoder(tiny_model, decoder, dtype) -> None:
    half = torch_decoder(tiny_model, dtype)
    errors = []
    for each in (half, CudaDecoder(half)):
        exact, rounded = (Stream(one, POLICIES["sink"]) for one in (decoder, each))
        errors.append(step_by_step(exact, rounded, some_text(40, seed=5), seed=6))
    assert 0 < errors[1] < 1.5 * errors[0]


def test_several_sequences_in_one_step(decoder) -> None:
    runners = [Runner(each, num_slots=5) for each in (decoder, CudaDecoder(decoder))]
    rng = np.random.default_rng(0)
    for runner in runners:
        for slot in range(5):
            runner.extend(some_tokens(7 * slot + 1, seed=slot), slot)
    for seed in range(3):
        order = rng.permutation(5)
        parents: list[int] = []
        slots: list[int] = []
        for slot in order.tolist():
            start, count = len(slots), int(rng.integers(1, 7))
            drawn = [int(rng.integers(-1, row)) for row in range(count)]
            parents += [parent if parent < 0 else parent + start for parent in drawn]
            slots += [slot] * count
        tokens = some_tokens(len(slots), seed=seed)
        one, other = (runner.rows(tokens, parents, slots) for runner in runners)
        assert difference(one, other) < 1e-10
        for slot in order.tolist():
            first = slots.index(slot)
            for runner in runners:
                runner.commit([0], [tokens[first]], slot)


class Together:
    """The ranks of a group as threads."""

    def __init__(self, size: int) -> None:
        self.barrier, self.tensors = threading.Barrier(size, timeout=60), [torch.zeros(0)] * size

    def rank(self, rank: int) -> Together.Rank:
        return Together.Rank(self, rank)

    class Rank:
        def __init__(self, group: Together, rank: int) -> None:
            self.group, self.own = group, rank

        def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
            self.group.tensors[self.own] = tensor.clone()
            self.group.barrier.wait()
            found = list(self.group.tensors)
            self.group.barrier.wait()
            return found

        def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.copy_(sum(self.all_gather(tensor)))


@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallel_shards(tiny_model, decoder, tp: int) -> None:
    """9 query and 3 KV heads: no split is even."""
    tokens, parents = some_tokens(12), [-1, 0, 0, 1, 2, 3, -1, 6, 6, 7, 8, 9]
    whole = Runner(decoder)
    whole.extend(some_tokens(20, seed=1))
    expected = whole.rows(tokens, parents)
    group, found = Together(tp), [torch.zeros(0)] * tp

    def run(rank: int) -> None:
        mesh = Mesh(tp=tp, shard=rank, tp_group=group.rank(rank))  # type: ignore[arg-type]
        runner = Runner(CudaDecoder(torch_decoder(tiny_model, torch.float64, mesh)))
        runner.extend(some_tokens(20, seed=1))
        found[rank] = runner.rows(tokens, parents)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(tp)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert difference(torch.cat(found, dim=1), expected) < 1e-10


@needs_interpreter
@pytest.mark.parametrize("policy", [pytest.param("sink", marks=pytest.mark.slow), "streaming"])
def test_kernels_in_the_interpreter(tiny_model, policy, monkeypatch) -> None:
    """A prompt, a tree, an accepted branch of it, and the row after it."""
    monkeypatch.setattr(attention, "WANTED_PIECES", 1)  # fewer than a GPU needs: the interpreter is slow
    plain = torch_decoder(tiny_model, torch.float32)
    streams = Stream(plain, POLICIES[policy]), Stream(CudaDecoder(plain, kernels=True), POLICIES[policy])

    def agree(tokens: list[int], parents: list[int]) -> bool:
        return difference(*(stream.rows(tokens, parents) for stream in streams)) < 1e-4

    text = some_text(22, seed=1)
    while text:
        chunk = text[: min(streams[0].room, 8)]
        assert agree(chunk, list(range(-1, len(chunk) - 1)))
        for stream in streams:
            stream.commit(list(range(len(chunk))), chunk)
        text = text[len(chunk) :]
    tokens = some_text(3, seed=2)
    assert streams[0].room >= 2 and agree(tokens, [-1, 0, 0])
    for stream in streams:
        stream.commit([0, 2], [tokens[0], tokens[2]])
    assert agree([7], [-1])


LOOKAHEAD = LookaheadConfig(planner=False, window_size=5, ngram_size=4, row_budget=30)


@pytest.fixture(scope="module")
def talkative(tmp_path_factory) -> Path:
    """Its vocabulary is so small that texts repeat themselves and candidates are accepted."""
    return save_tiny_model(tmp_path_factory.mktemp("talkative"), vocab_size=16, seed=1)


@pytest.mark.parametrize("policy", ["full", "sink", "sep", "streaming"])
@pytest.mark.slow
def test_an_engine_on_paged_caches_gives_the_same_tokens(talkative, policy, monkeypatch) -> None:
    """Greedy alone, with lookahead and without, and sampled in company."""
    cache = POLICIES[policy]
    cache = cache | {"separators": (5, 9, 13)} if cache["policy"] == "sep" else cache
    prompts = [np.random.default_rng(seed).integers(0, 16, length).tolist() for seed, length in ((1, 4), (2, 37))]
    greedy = SamplingParams(max_new_tokens=24, ignore_eos=True)
    sampled = SamplingParams(max_new_tokens=24, ignore_eos=True, temperature=0.5, seed=3)
    settings = {
        "model": {"path": str(talkative)},
        "cache": cache,
        "scheduler": {"max_sequences": 2, "max_rows": 64},
        "lookahead": LOOKAHEAD.model_dump(),
    }

    def outputs(decoder: Decoder | CudaDecoder) -> list[list[int]]:
        with monkeypatch.context() as patch:
            patch.setattr("runtime.workers.worker.load_decoder", lambda *_, **__: decoder)
            engine = Engine.from_config(Config.from_dict(settings))
        with engine:
            alone = [engine.generate([p], greedy, how)[0] for p in prompts for how in (PLAIN, LOOKAHEAD)]
            assert any(one.usage.tokens_per_step > 1.1 for one in alone)
            return [list(one.token_ids) for one in [*alone, *engine.generate(prompts, sampled)]]

    plain = torch_decoder(talkative, torch.float32)
    found = outputs(CudaDecoder(plain))
    assert found[0] == found[1] and found[2] == found[3]
    assert found == outputs(plain)


class Watched(TorchDispatchMode):
    """Every operation, with its scalars and with the sizes and places of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.note(str(func), args, kwargs)
        return func(*args, **(kwargs or {}))

    def note(self, name: str, *arguments: object) -> None:
        def describe(one: object) -> object:
            return (one.shape, one.stride(), one.storage_offset()) if isinstance(one, torch.Tensor) else one

        self.seen.append(f"{name}{tree_map(describe, arguments)}")


def stand_ins(watched: Watched) -> Operations:
    """Operations that are noted as launches and, as kernels on a GPU do, read nothing on the host."""

    def stand_in(name: str) -> Callable[..., object]:
        def launch(*args: object) -> object:
            watched.note(f"launch {name}", tuple(arg for arg in args if isinstance(arg, (torch.Tensor, int))))
            match name, args:
                case "embed", (torch.Tensor() as tokens, torch.Tensor() as table, *_):
                    return table.new_zeros(len(tokens), table.shape[1])
                case "add_norm", (torch.Tensor() as hidden, *_):
                    return torch.zeros_like(hidden)
                case "gated", (torch.Tensor() as gate_up, *_):
                    return gate_up.new_zeros(len(gate_up), gate_up.shape[1] // 2)
            return None

        return launch

    return Operations(**{field.name: stand_in(field.name) for field in fields(Operations)})  # type: ignore[arg-type]


def watched_step(on_gpu: CudaDecoder, run: Callable[[], object], patch: pytest.MonkeyPatch) -> tuple[list[str], int]:
    """What a graph would hold of the step that `run` makes, and how many copies fill its buffers."""
    watched, uploads = Watched(), []
    real_run, real_copy = decoder_module._Step._run, torch.Tensor.copy_

    def copy(to: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        uploads.append(to.shape)
        return real_copy(to, *args, **kwargs)  # type: ignore[arg-type]

    def run_watched(step: object) -> torch.Tensor:
        with watched, pytest.MonkeyPatch.context() as inner:
            inner.delattr(torch, "from_numpy")
            return real_run(step)  # type: ignore[arg-type]

    patch.setattr(torch.Tensor, "copy_", copy)
    patch.setattr(decoder_module._Step, "_run", run_watched)
    on_gpu.operations = stand_ins(watched)
    run()
    on_gpu.operations = EAGER
    return watched.seen, len(uploads)


@pytest.mark.parametrize("policy", ["full", "sink", "sep"])
def test_a_step_of_any_sequences_is_one_upload_and_the_same_launches(tiny_model, policy, monkeypatch) -> None:
    """Of 1, 3 and 64 sequences, however long: nothing in what a graph holds differs, or waits, or reads host memory."""
    on_gpu = CudaDecoder(torch_decoder(tiny_model, torch.float32), min_rows=64)
    groups = layer_groups(Config.from_dict({"cache": POLICIES[policy]}).cache, 3, 512)
    runner = Runner(on_gpu)
    runner.caches = on_gpu.make_caches(groups, num_slots=64, max_staged=64)
    rng = np.random.default_rng(0)
    steps = []
    for count in (1, 3, 64):
        slots = rng.choice(64, count, replace=False).tolist()
        for slot in slots:
            runner.extend(some_tokens(int(rng.integers(1, 12)), seed=slot), slot)
        per_slot = 64 // count
        rows = [slot for slot in slots for _ in range(per_slot)]
        parents = [row - 1 if row % per_slot else -1 for row in range(len(rows))]
        with monkeypatch.context() as patch:
            run = partial(runner.rows, some_tokens(len(rows)), parents, rows)
            steps.append(watched_step(on_gpu, run, patch))
    assert on_gpu.row_counts == [64]
    assert steps[0] == steps[1] == steps[2]
    operations, num_uploads = steps[0]
    assert num_uploads == 1
    assert sum(line.startswith("launch") for line in operations) == len(runner.caches) + 1 + 3 * 5
    names = " ".join(operations)
    assert not [word for word in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh") if word in names]


def test_row_counts_are_powers_of_two_from_min_rows_on(decoder) -> None:
    runner = Runner(CudaDecoder(decoder, min_rows=6))
    for count in (1, 9, 3, 17):
        runner.rows(some_tokens(count))
    assert runner.decoder.row_counts == [8, 16, 32]


def test_sequences_share_the_pages_there_are(decoder) -> None:
    """Eight slots, memory for three: a page that a sequence gives back serves another."""
    on_pages = CudaDecoder(decoder)
    runner = Runner(on_pages, num_slots=8)
    (group,) = layer_groups(Config.from_dict({"cache": {"capacity": 512}}).cache, 3, 512)
    (cache,) = runner.caches = on_pages.make_caches([group], 8, max_staged=64, num_pages=3)
    for slot in range(3):
        runner.extend(some_tokens(20, seed=slot), slot)
    with pytest.raises(OutOfPagesError, match="3 pages"):
        runner.rows([1], slots=[5])
    cache.reset(1)
    expected = Runner(decoder)
    expected.extend(some_tokens(20, seed=5))
    runner.extend(some_tokens(20, seed=5), slot=5)
    assert difference(runner.rows([3, 4], slots=[5, 5]), expected.rows([3, 4])) < 1e-10


def test_kernels_are_chosen_where_they_can_run(decoder) -> None:
    assert cuda_decoder(decoder) is None
    assert "cpu" in (cuda_obstacle(decoder.spec, torch.bfloat16, CPU) or "")
    wide = replace(decoder.spec, head_dim=512)
    assert cuda_obstacle(wide, torch.bfloat16, torch.device("cuda")) is not None
