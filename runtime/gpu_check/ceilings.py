"""The device, the versions, and the two ceilings: how fast it copies, and how fast it multiplies."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import partial

import torch

from runtime.gpu_check.setting import Report, Setting
from runtime.model.cuda.jit import HAS_TRITON


def check(setting: Setting) -> Report:
    """Names and numbers; `bytes_per_s` counts what is read and what is written."""
    found: Report = {"python": platform.python_version(), "torch": torch.__version__}
    if setting.on_gpu:
        card = torch.cuda.get_device_properties(setting.device)
        found |= {
            "name": card.name,
            "memory": card.total_memory,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
            "gpus": torch.cuda.device_count(),
        }
    else:
        found |= {"name": f"CPU ({platform.machine()})"}
    if HAS_TRITON:
        import triton

        found["triton"] = triton.__version__
    setting.row("device", str(found["name"]), f"torch {torch.__version__}, Triton {found.get('triton', 'none')}")
    found |= ceilings(setting)
    setting.row("copy", f"{found['bytes_per_s'] / 1e9:,.0f} GB/s", "read and written")
    setting.row("matrix product", f"{found['flops'] / 1e12:,.1f} TFLOP/s", f"{setting.dtype}, square, random")
    return found


def ceilings(setting: Setting) -> dict[str, float]:
    """Bytes per second of a copy, operations per second of a large product."""
    size = 1 << (20 if setting.is_tiny else 32)
    source = torch.empty(size // 4, dtype=torch.int32, device=setting.device).fill_(1)
    target = torch.empty_like(source)
    copy_s = timed(setting, partial(target.copy_, source))
    source = target = source[:0]  # the memory is for others
    side = 128 if setting.is_tiny else 8192
    one, other = (torch.randn(side, side, device=setting.device).to(setting.dtype) for _ in range(2))
    product_s = timed(setting, lambda: one @ other)
    return {"bytes_per_s": 2 * size / copy_s, "flops": 2 * side**3 / product_s}


def timed(setting: Setting, run: Callable[[], object], rounds: int = 5, repeats: int = 4) -> float:
    """Seconds of one, the best of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        setting.wait()
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        setting.wait()
        best = min(best, (time.perf_counter() - started) / repeats)
    return best
