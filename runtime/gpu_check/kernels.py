"""Our kernels beside a float64 model, steps with graphs and without, drawn tokens beside the reference's, and texts
with lookahead and without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from runtime.config import Config, LookaheadConfig, SamplingParams
from runtime.engine.engine import Engine
from runtime.gpu_check.models import SMALL, TINY, Running, converted, random_decoder, random_tokens, random_tree
from runtime.gpu_check.setting import Report, Setting
from runtime.mesh.mesh import Mesh
from runtime.model.cuda.arrays import DEPTH, ChoiceArrays
from runtime.model.cuda.decoder import EAGER, KERNELS, CudaDecoder
from runtime.model.cuda.jit import HAS_TRITON
from runtime.model.cuda.step_buffer import SAMPLING
from runtime.model.decoder import Decoder
from runtime.model.sampler import Logits, Sampled, choose_tokens
from runtime.request import Request
from runtime.step import Row, Seq
from runtime.workers.executor import LocalExecutor

SEPARATORS = (5, 9, 17)
POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "sink": {"policy": "sink", "num_sinks": 4, "window": 300},
    "sep": {"policy": "sep", "separators": SEPARATORS, "num_initial": 4, "num_neighbors": 200},
    "streaming": {
        "policy": "sep",
        "design": "streaming",
        "separators": SEPARATORS,
        "local": 256,
        "capacity": 400,
        "max_separators": 64,
    },
}
ALLOWED, SANE = 2.0, 0.5
"""Errors may be so many times those of torch's operations in the same type, whose own are no larger than this; logits
are of size 1."""
NEW_TOKENS = 96


def check(setting: Setting) -> Report:
    """Raises nothing that a wrong number could: `ok` says whether all was right."""
    spec = TINY if setting.is_tiny else SMALL
    exact = random_decoder(spec, torch.device("cpu"), torch.float64, bits=torch.bfloat16)
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if setting.on_gpu else (torch.float32,)
    dtypes = dtypes[:1] if setting.is_short else dtypes
    found: Report = {"errors": {}}
    oks = []
    for dtype in dtypes:
        plain = converted(exact, setting.device, dtype)
        ours = CudaDecoder(plain, kernels=setting.on_gpu)
        for name in policies(dtype, setting):
            policy = POLICIES[name]
            error, of_torch = errors(exact, [ours, plain], policy, 600 if setting.on_gpu else 40)
            ok = error <= ALLOWED * of_torch + 1e-5 and of_torch < SANE
            oks.append(ok)
            kind = str(dtype).removeprefix("torch.")
            found["errors"][f"{kind} {name}"] = {"kernels": error, "torch": of_torch, "ok": ok}
            note = f"torch's {of_torch:.1e}"
            setting.row(f"logits, {kind}, {name}", f"{'' if ok else 'WRONG '}within {error:.1e}", note)
    found["graphs_equal"] = graphs_equal(converted(exact, setting.device, setting.dtype), setting.on_gpu)
    setting.row("graphs on and off", "same bits" if found["graphs_equal"] else "WRONG: other bits")
    found["draws_equal"] = draws_equal(setting)
    setting.row("drawn tokens", "the reference's" if found["draws_equal"] else "WRONG: others")
    texts = converted(exact, setting.device, setting.dtype)
    for kind, min_rows in (("one row shape", DEPTH), ("shapes as they come", 1)):
        same, num_steps = lookahead_equal(texts, min_rows, setting)
        found[f"lookahead_equal_{min_rows}"] = same
        note = f"{same[1]} tokens in {num_steps} steps"
        setting.row(f"lookahead on and off, {kind}", f"{same[0]} of {same[1]} tokens alike", note)
    exactly = found[f"lookahead_equal_{DEPTH}"]
    found["summary"] = f"logits within {max(each['kernels'] for each in found['errors'].values()):.1e}, "
    found["summary"] += f"lookahead changes {exactly[1] - exactly[0]} of {exactly[1]} tokens in one row shape"
    found["ok"] = all(oks) and found["graphs_equal"] and found["draws_equal"] and exactly[0] == exactly[1]
    return found


def policies(dtype: torch.dtype, setting: Setting) -> Sequence[str]:
    """All in the first type; then those that take other kernels. Each costs seconds of compiling."""
    if setting.is_short or setting.on_gpu and dtype != torch.bfloat16:
        return ("full", "streaming")
    return tuple(POLICIES)


def errors(exact: Decoder, others: Sequence[Any], policy: dict[str, Any], length: int) -> list[float]:
    """Largest difference of each one's logits from the exact ones: a prompt, trees, branches accepted."""
    runs = [Running(each, policy, max_rows=64, max_positions=2048) for each in (exact, *others)]
    vocabulary = exact.spec.vocab_size
    for run in runs:
        run.read(random_tokens(length, vocabulary, 1), 64)
    worst = [0.0] * len(others)
    for step in range(4):
        count = min((1, 24, 7, 60)[step], runs[0].room)
        tokens, parents = random_tokens(count, vocabulary, 2 + step), random_tree(count, 2 + step)
        expected, *found = (run.logits(tokens, parents).cpu().double() for run in runs)
        for index, logits in enumerate(found):
            difference = float((logits - expected).abs().max())
            worst[index] = max(worst[index], difference if difference == difference else float("inf"))
        path = [count - 1]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        for run in runs:
            run.commit(path, [tokens[row] for row in path])
    return worst


def graphs_equal(decoder: Decoder, kernels: bool) -> bool:
    """The same bits, step after step, replayed and launched one by one."""
    runs = [Running(CudaDecoder(decoder, kernels, graphs=graphs), {}, max_rows=64) for graphs in (True, False)]
    vocabulary, alike = decoder.spec.vocab_size, True
    for step in range(8):  # a shape is recorded when it comes a second time
        tokens, parents = random_tokens(17, vocabulary, step), random_tree(17, step)
        one, other = (run.logits(tokens, parents) for run in runs)
        alike = alike and torch.equal(one, other)
        one_token, other_token = (run.chosen(tokens, parents) for run in runs)
        alike = alike and one_token == other_token
        for run in runs:
            run.commit([0], tokens[:1])
    return alike


def draws_equal(setting: Setting) -> bool:
    """Tokens drawn by the kernels, and by the reference on the CPU, from the same logits."""
    num_rows, size = 16, 500 if setting.is_tiny else 128256
    logits = (torch.randn(num_rows, size, generator=torch.Generator().manual_seed(0)) * 24).round() / 8
    sequences = np.zeros((num_rows, len(Seq)), np.int32)
    sequences[:, Seq.TEMPERATURE] = np.linspace(0, 1.5, num_rows, dtype=np.float32).view(np.int32)
    sequences[:, Seq.TOP_P] = np.array([1, 1, 0.9, 0.6] * 4, np.float32).view(np.int32)
    sequences[:, Seq.TOP_K] = [0, 50, 0, 2000] * 4
    sequences[:, Seq.SEED_LOW] = np.arange(num_rows) * 7919
    rows = np.zeros((num_rows, len(Row)), np.int32)
    rows[:, Row.POSITION] = np.arange(num_rows) * 31
    sampled = Sampled(np.arange(1, num_rows), rows[1:], sequences[1:])
    expected = choose_tokens(Logits(logits), sampled, Mesh(), (0, size))
    columns = [torch.zeros(num_rows, dtype=torch.int32), *torch.from_numpy(sequences[:, SAMPLING].T.copy())]
    columns.append(torch.from_numpy(rows[:, Row.POSITION] + 1))
    choices = ChoiceArrays(*(column.to(setting.device) for column in columns))
    operations = KERNELS if setting.on_gpu and HAS_TRITON else EAGER
    there = logits.to(setting.device)
    _, places = operations.draw(there, operations.least_kept(there, choices), choices, 0)
    return places.cpu().tolist() == expected.tolist()


def lookahead_equal(decoder: Decoder, min_rows: int, setting: Setting) -> tuple[tuple[int, int], int]:
    """How many tokens are alike before the first that is not, greedy and drawn, of how many; steps with lookahead."""
    ours = CudaDecoder(decoder, kernels=setting.on_gpu, min_rows=min_rows)
    alike = total = num_steps = 0
    count = 12 if setting.is_tiny else NEW_TOKENS
    for temperature in (0.0, 0.3):
        sampling = SamplingParams(max_new_tokens=count, temperature=temperature, seed=1, ignore_eos=True)
        prompt = random_tokens(20, decoder.spec.vocab_size, 3) * 2
        with engine_around(ours, setting, prompt) as engine:
            (one, steps), (other, _) = (
                run(engine, prompt, sampling, LookaheadConfig(enabled=on, planner=False, row_budget=48, window_size=6))
                for on in (True, False)
            )
        total += len(other)
        num_steps += steps
        alike += next((i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(other))
    return (alike, total), num_steps


def engine_around(decoder: CudaDecoder, setting: Setting, prompt: Sequence[int]) -> Engine:
    config = Config.from_dict(
        {
            "model": {"device": setting.device.type},
            "cache": {"capacity": 1024},
            "scheduler": {"max_sequences": 1, "max_rows": DEPTH},
            "lookahead": {"planner": False, "row_budget": 48, "window_size": 6},
        }
    )
    executor = LocalExecutor(config, decoder.spec, lambda *_: decoder)
    return Engine(config, decoder.spec, NoText(), executor)  # type: ignore[arg-type]


class NoText:
    """In a tokenizer's place, where all is token ids."""

    turn_end_id = None


def run(
    engine: Engine, prompt: Sequence[int], sampling: SamplingParams, lookahead: LookaheadConfig
) -> tuple[list[int], int]:
    """The tokens of one request, and its steps."""
    engine.add_request(Request("one", tuple(prompt), sampling, lookahead))
    tokens: list[int] = []
    steps = 0
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids
            steps = output.usage.num_steps
    return tokens, steps
