"""Which decoder a GPU gets."""

from __future__ import annotations

import torch

from runtime.model.cuda.decoder import CudaDecoder
from runtime.model.cuda.jit import HAS_TRITON
from runtime.model.decoder import Decoder
from runtime.model.spec import ModelSpec

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def cuda_obstacle(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels cannot run this model there; None if they can."""
    if device.type != "cuda":
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
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def cuda_decoder(decoder: Decoder, min_rows: int = 1) -> CudaDecoder | None:
    """The decoder on our kernels for GPUs, where they can run it."""
    if cuda_obstacle(decoder.spec, decoder.dtype, decoder.mesh.device) is not None:
        return None
    return CudaDecoder(decoder, min_rows=min_rows)
