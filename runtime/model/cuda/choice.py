"""Which decoder a GPU gets."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch

from runtime.config import Config
from runtime.errors import ConfigError
from runtime.model.cuda.arrays import DEPTH
from runtime.model.cuda.decoder import CudaDecoder
from runtime.model.cuda.graphs import GraphedDecoder
from runtime.model.cuda.jit import HAS_TRITON, is_interpreted
from runtime.model.decoder import Decoder
from runtime.model.spec import ModelSpec

log = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED_WORKSPACES = (":4096:8", ":16:8")
"""With which cuBLAS gives the same bits whatever else the GPU does."""


def decoder_for_gpu(config: Config, decoder: Decoder) -> Decoder | GraphedDecoder | CudaDecoder:
    """The model on our kernels where they can run it, else on torch's in graphs; on a CPU, as it is.

    Raises ConfigError where `model.kernels` or `model.deterministic` asks for what cannot be had.
    """
    model, on_gpu = config.model, decoder.mesh.device.type == "cuda"
    obstacle = cuda_obstacle(decoder.spec, decoder.dtype, decoder.mesh.device)
    wanted = model.kernels == "triton" or model.kernels == "auto" and on_gpu
    if wanted and obstacle is None:
        min_rows = 1
        if model.deterministic:
            min_rows = fixed_rows(config)
            fix_products()
            check_products(decoder, min_rows)
        return CudaDecoder(decoder, kernels=True, min_rows=min_rows, graphs=model.cuda_graphs)
    if model.kernels == "triton":
        raise ConfigError("model.kernels", "triton", str(obstacle), "Set model.kernels to auto or torch.")
    if model.deterministic:
        problem = f"on a GPU it takes our own kernels, and {obstacle}"
        raise ConfigError("model.deterministic", True, problem, "Mend that, set it to false, or model.device to cpu.")
    if wanted:
        log.info("torch kernels are used: %s", obstacle)
    return GraphedDecoder(decoder) if model.cuda_graphs and on_gpu and decoder.mesh.can_record else decoder


def cuda_obstacle(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels cannot run this model there; None if they can."""
    if device.type != "cuda" and not is_interpreted():
        return f"the device is {device.type}"
    if not HAS_TRITON:
        return "Triton is not installed"
    if spec.beyond_llama:
        return f"they do not have {spec.beyond_llama}"
    if dtype not in DTYPES:
        return f"they do not compute in {str(dtype).removeprefix('torch.')}"
    if spec.head_dim % 2 or spec.head_dim > 256:
        return f"heads of size {spec.head_dim} are not supported"
    if len({window for window in spec.sliding_windows if window is not None}) > 1:
        return "layers have different sliding windows"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def fixed_rows(config: Config) -> int:
    """The row count that every step is filled up to where no bit may depend on it. Raises ConfigError.

    A matrix product's bits depend on the number of rows, so there is one. It is at most the depth down to which
    attention adds up in one order: no path in a step is longer than the step.
    """
    max_rows = config.scheduler.max_rows
    if max_rows > DEPTH:
        problem = f"with model.deterministic a GPU runs every step in the shape of so many rows, at most {DEPTH}"
        raise ConfigError("scheduler.max_rows", max_rows, problem, f"Set it to {DEPTH}; 16 make plain steps cheapest.")
    return max_rows


def check_products(decoder: Decoder, num_rows: int) -> None:
    """Raises ConfigError where this device's products of so many rows by the model's matrices give a row other bits at
    another place."""
    layer = decoder.layers[0]
    known: set[torch.Size] = set()
    for product in (layer.qkv, layer.output.linear, layer.mlp.gate_up, layer.mlp.down.linear, decoder.head):
        shape = product.weight.shape
        if shape in known:
            continue
        known.add(shape)
        rows = torch.randn(num_rows, shape[1], device=decoder.mesh.device).to(decoder.dtype)
        if not same_at_any_place(product, rows):
            problem = (
                f"here a product of {num_rows} rows with a matrix {list(shape)} depends on a row's place among them"
            )
            raise ConfigError(
                "model.deterministic", True, problem, "Try another scheduler.max_rows, or set it to false."
            )


def same_at_any_place(product: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> bool:
    """Whether each of the rows [M, in] gives the same bits wherever it stands among the others."""
    expected, count = product(rows), len(rows)
    shifts = {1, count // 3, count // 2, count - 1} - {0, count}
    moved = all(torch.equal(product(rows.roll(shift, 0)).roll(-shift, 0), expected) for shift in shifts)
    return moved and torch.equal(product(rows[:1].repeat(count, 1)), expected[:1].expand(count, -1))


def fix_products() -> None:
    """Have cuBLAS give the same bits for the same shapes. Before the first product. Raises ConfigError."""
    chosen = os.environ.setdefault(WORKSPACE, FIXED_WORKSPACES[0])
    if chosen not in FIXED_WORKSPACES:
        problem = "with such a workspace cuBLAS may give other bits from run to run"
        raise ConfigError(WORKSPACE, chosen, problem, f"Set it to {FIXED_WORKSPACES[0]}, or unset it.")
    products = torch.backends.cuda.matmul
    products.allow_tf32 = False
    products.allow_fp16_reduced_precision_reduction = False
    products.allow_bf16_reduced_precision_reduction = False
