"""What a step takes: models of 1B and 8B sizes with random weights, by rows and context, beside the time in which the
memory could read what a step must read; by part; and the price of one row shape."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from runtime.gpu_check.ceilings import ceilings
from runtime.gpu_check.models import SHAPES, TINY, Running, random_decoder, random_tokens
from runtime.gpu_check.setting import Report, Setting, median
from runtime.model.cuda.decoder import Choosing, CudaDecoder
from runtime.model.spec import ModelSpec

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXTS = (1024, 8192)
TOP_K = 8
ROUNDS = 12
SHAPED = (16, 64)
"""Row shapes whose price is told."""


def check(setting: Setting) -> Report:
    """Milliseconds by model, context and rows."""
    rates = ceilings(setting)
    shapes = {name: SHAPES[name] for name in ("8B", "1B")}
    contexts: Sequence[int] = CONTEXTS
    counts: Sequence[int] = ROWS
    if setting.is_tiny:
        shapes, contexts, counts = {"tiny": TINY}, (32, 64), ROWS[:4]
    elif setting.is_short:
        shapes, contexts, counts = {"1B": SHAPES["1B"]}, CONTEXTS[:1], (1, *SHAPED)
    found: Report = {"models": {}}
    for name, spec in shapes.items():
        if setting.is_late:
            setting.row(f"{name}", "left out: no time left")
            continue
        decoder = CudaDecoder(random_decoder(spec, setting.device, setting.dtype), kernels=setting.on_gpu)
        of_model: Report = {}
        for context in contexts:
            of_model[str(context)] = times(decoder, name, context, counts, rates["bytes_per_s"], setting)
        found["models"][name] = of_model
        found["summary"] = summary(name, of_model)
        del decoder
        gc.collect()
        if setting.on_gpu:
            torch.cuda.empty_cache()
    return found


def summary(name: str, of_model: Report) -> str:
    """Of a model at its shortest context."""
    times = next(iter(of_model.values()))
    plain = times["ms"]["1"]
    prices = "".join(f", {price:.2f} x in the shape of {shape} rows" for shape, price in times["price"].items())
    return f"{name}: a plain step {plain:.2f} ms, {plain / times['floor_ms']:.2f} x the memory floor{prices}"


def times(
    decoder: CudaDecoder, name: str, context: int, counts: Sequence[int], bytes_per_s: float, setting: Setting
) -> Report:
    """Of one model at one context."""
    running = Running(decoder, {"capacity": context + 1024}, max_rows=max(counts), max_positions=context + 1024)
    running.fill(context)
    found: Report = {"floor_ms": floor_bytes(decoder.spec, context, setting.dtype.itemsize) / bytes_per_s * 1000}
    milliseconds: dict[str, float] = {}
    for count in counts:
        if setting.is_late:
            break
        milliseconds[str(count)] = step_ms(running, count, setting)
    found["ms"] = milliseconds
    plain = milliseconds.get("1", float("nan"))
    ratio = plain / found["floor_ms"]
    setting.row(f"{name}, context {context:,}: plain step", f"{plain:.3f} ms", f"{ratio:.2f} x the memory floor")
    for rows, ms in milliseconds.items():
        if rows != "1":
            setting.row(f"{'':4}{rows} rows", f"{ms:.3f} ms", f"{ms / plain:.2f} x plain")
    found["parts_ms"] = {str(count): parts_ms(running, count, setting) for count in (1, min(64, max(counts)))}
    for count, parts in found["parts_ms"].items():
        shown = ", ".join(f"{part} {ms:.3f}" for part, ms in parts.items())
        setting.row(f"{'':4}{count} rows by part", shown, "ms")
    found["price"] = {str(shape): milliseconds[str(shape)] / plain for shape in SHAPED if str(shape) in milliseconds}
    for shape, price in found["price"].items():
        setting.row(f"{'':4}deterministic, scheduler.max_rows={shape}", f"plain steps take {price:.2f} x")
    for step in decoder._steps.values():
        step._runs.clear()
    decoder._steps.clear()
    return found


def floor_bytes(spec: ModelSpec, context: int, item_bytes: int) -> float:
    """What a plain step must read: the matrices, and the keys and values."""
    heads = spec.num_heads + spec.num_kv_heads
    layer = spec.hidden_size * spec.head_dim * 2 * heads + 3 * spec.hidden_size * spec.intermediate_size
    weights = spec.num_layers * layer + spec.hidden_size * spec.vocab_size
    return item_bytes * (weights + 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * context)


def inputs(running: Running, count: int) -> tuple[Any, ...]:
    """A tree of rows, all of which choose."""
    tokens = random_tokens(count, running.decoder.spec.vocab_size, count)
    batch = running.batch(tokens, [-1, *((row - 1) // 2 for row in range(1, count))])
    return batch, running.caches, np.arange(count, dtype=np.int64), TOP_K


def step_ms(running: Running, count: int, setting: Setting) -> float:
    """Median of whole steps: from the batch to the chosen tokens on the host."""
    given = inputs(running, count)
    found = []
    for number in range(ROUNDS + 3):  # the first ones make kernels and record
        started = time.perf_counter()
        running.decoder.step(*given)
        if number >= 3:
            found.append((time.perf_counter() - started) * 1000)
    return median(found)


@torch.inference_mode()
def parts_ms(running: Running, count: int, setting: Setting) -> dict[str, float]:
    """Medians: describing the step and sending it; the device's work; fetching the results."""
    batch, caches, wanted, top_k = inputs(running, count)
    decoder: CudaDecoder = running.decoder
    step = decoder._step_of(batch, caches)
    run = step._run_of(Choosing(decoder.padded(count), top_k, False, False))
    found: dict[str, list[float]] = {"host and upload": [], "device": [], "download": []}
    for _ in range(ROUNDS):
        marks = [time.perf_counter()]
        step.buffer.load(batch, caches, wanted)
        setting.wait()
        marks.append(time.perf_counter())
        result = run()
        setting.wait()
        marks.append(time.perf_counter())
        result.cpu()
        marks.append(time.perf_counter())
        for part, start, stop in zip(found, marks, marks[1:], strict=False):
            found[part].append((stop - start) * 1000)
    return {part: median(values) for part, values in found.items()}
