"""What the kernels become on GPUs, without one.

`python -m runtime.model.cuda.compiled` compiles every launch for compute capabilities 8.0 and 9.0, in the types and
head sizes that models have, and prints registers, shared memory and spills.

The launches are those that the functions beside the kernels make, for tensors without contents, so sizes, warps and
stages are the real ones. Needs Triton, which has the assembler with it, and must not run under TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from runtime.model.cuda.activation import gated
from runtime.model.cuda.arrays import CacheArrays, ChoiceArrays, RowArrays
from runtime.model.cuda.attention import Parts, Tiling, attend
from runtime.model.cuda.draw import draw, least_kept
from runtime.model.cuda.embedding import embed
from runtime.model.cuda.heads import rotate_and_store
from runtime.model.cuda.jit import HAS_TRITON, is_interpreted
from runtime.model.cuda.moves import move
from runtime.model.cuda.norm import Norm, add_norm
from runtime.model.cuda.top import top

TARGETS = (80, 90)
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
}
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 80, 96, 128, 256)
ROW_COUNTS = (1, 64)
"""Small and large tiles."""
GROUP, NUM_KV, HIDDEN, VOCABULARY = 4, 8, 4096, 128256

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Compiled:
    """One kernel on one target."""

    kernel: str
    case: str
    capability: int
    registers: int
    """Per thread; a GPU has at most 255."""
    shared: int
    """Bytes per program; 8.0 has 166,912 at most, 9.0 232,448."""
    spills: int
    """Bytes per thread that went to memory, stores and loads."""
    warps: int


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases(dtypes: Sequence[torch.dtype], head_dims: Sequence[int]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and calls that launch each kernel in the way that it is to be compiled."""
    ints = partial(empty, dtype=torch.int32)
    for dtype in dtypes:
        name = TYPES[dtype]
        norm = Norm(None, empty(HIDDEN, dtype=dtype), 0.04, 64.0)  # type: ignore[arg-type]
        hidden = empty(64, HIDDEN, dtype=dtype)
        yield name, partial(add_norm, hidden, hidden, norm)
        yield f"{name} silu", partial(gated, empty(64, 28672, dtype=dtype), "silu")
        yield f"{name} gelu", partial(gated, empty(64, 28672, dtype=dtype), "gelu")
        yield name, partial(embed, ints(64), empty(VOCABULARY, HIDDEN, dtype=dtype), 0, VOCABULARY)
        for head_dim in head_dims:
            yield f"{name} d={head_dim}", partial(_move, dtype, head_dim)
            yield f"{name} d={head_dim}", partial(_heads, dtype, head_dim)
            for num_rows in ROW_COUNTS:
                for window in (None, 4096):
                    what = f"{name} d={head_dim} T={num_rows}" + (" window" if window else "")
                    yield what, partial(_attend, dtype, head_dim, num_rows, window)
    yield "k=8", partial(top, empty(64, VOCABULARY), 8)
    yield "k=1", partial(top, empty(1, VOCABULARY), 1)
    choices = ChoiceArrays(*[ints(64)] * 7)
    yield "", partial(least_kept, empty(64, VOCABULARY), choices)
    yield "", partial(draw, empty(64, VOCABULARY), None, choices, 0)
    yield "filtered", partial(draw, empty(64, VOCABULARY), empty(64), choices, 0)


def _move(dtype: torch.dtype, head_dim: int) -> None:
    header, lists = empty(2, dtype=torch.int32), empty(1024, dtype=torch.int32)
    move(empty(32, 2, NUM_KV, 4096, head_dim, dtype=dtype), header, lists)


def _heads(dtype: torch.dtype, head_dim: int) -> None:
    num_heads = GROUP * NUM_KV
    keys, queries = empty(NUM_KV, 4096, head_dim, dtype=dtype), empty(64, num_heads, head_dim, dtype=dtype)
    qkv, turns = empty(64, (num_heads + 2 * NUM_KV) * head_dim, dtype=dtype), empty(64, head_dim // 2, 2)
    norm = Norm(None, empty(num_heads + NUM_KV, head_dim, dtype=dtype), 1e-4, head_dim**0.5)  # type: ignore[arg-type]
    rotate_and_store(qkv, turns, turns, norm, _cache_arrays(64), keys, keys, queries, queries)


def _attend(dtype: torch.dtype, head_dim: int, num_rows: int, window: int | None) -> None:
    num_heads = GROUP * NUM_KV
    keys, queries = empty(NUM_KV, 4096, head_dim, dtype=dtype), empty(num_rows, num_heads, head_dim, dtype=dtype)
    tiling = Tiling.of(num_rows, NUM_KV, GROUP, head_dim)
    parts = Parts.empty(num_rows, num_heads, head_dim, tiling.num_parts, torch.device("meta"))
    one = empty(num_rows, dtype=torch.int32)
    lists = empty(1024, dtype=torch.int32)
    rows = RowArrays(one, one, one, one, one, one, one, one, lists)
    attend(queries, queries, keys, keys, rows, _cache_arrays(num_rows), window, True, tiling, parts, queries)


def _cache_arrays(num_rows: int) -> CacheArrays:
    return CacheArrays(*[empty(num_rows, dtype=torch.int32)] * 8)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches are noted down instead of made."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    real, JITFunction.run = JITFunction.run, run
    try:
        yield launches
    finally:
        JITFunction.run = real


def compile_all(dtypes: Sequence[torch.dtype] = DTYPES, head_dims: Sequence[int] = HEAD_DIMS) -> Iterator[Compiled]:
    """Every kernel in every case on every target."""
    assert HAS_TRITON and not is_interpreted(), "Triton is needed, and TRITON_INTERPRET must not be set"
    for case, call in cases(dtypes, head_dims):
        with recorded() as launches:
            call()
        for kernel, args, kwargs in launches:
            for capability in TARGETS:
                yield _compile(kernel, case, args, kwargs, capability)


def _compile(kernel: Any, case: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], capability: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k not in options}
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
    constants |= {
        name: value for name, value in values.items() if type(value) is int and value == 1
    }  # as a launch does
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        signature[name] = "constexpr" if name in constants else _type(value)
        is_aligned = isinstance(value, torch.Tensor) or isinstance(value, int) and value % 16 == 0
        if name not in constants and is_aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spills = _assembled(binary.asm["ptx"], capability)
    name = kernel.fn.__name__.lstrip("_")
    return Compiled(name, case, capability, registers, binary.metadata.shared, spills, binary.metadata.num_warps)


def _type(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def _assembled(ptx: str, capability: int) -> tuple[int, int]:
    """Registers, and bytes spilled, as the assembler reports them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file, tempfile.NamedTemporaryFile() as out:
        file.write(ptx)
        file.flush()
        architecture = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={architecture}", file.name, "-o", out.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = sum(int(size) for size in re.findall(r"(\d+) bytes spill", report))
    return max(int(count) for count in re.findall(r"Used (\d+) registers", report)), spills


def table(found: list[Compiled]) -> str:
    """For people: one line per kernel and case, the targets side by side."""
    lines = [
        "| kernel | case | warps | registers 8.0, 9.0 | shared bytes 8.0, 9.0 | spills |",
        "|---|---|---|---|---|---|",
    ]
    by_case: dict[tuple[str, str], list[Compiled]] = {}
    for one in found:
        by_case.setdefault((one.kernel, one.case), []).append(one)
    for (kernel, case), both in by_case.items():
        columns = [", ".join(f"{getattr(one, name):,}" for one in both) for name in ("registers", "shared")]
        spills = sum(one.spills for one in both)
        lines.append(f"| `{kernel}` | {case} | {both[0].warps} | {columns[0]} | {columns[1]} | {spills} |")
    return "\n".join(lines)


def parse(output: str) -> list[Compiled]:
    """What `main` printed on stdout."""
    return [Compiled(**one) for one in json.loads(output)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, help="of this head size only")
    parser.add_argument("--dtype", choices=[TYPES[dtype] for dtype in DTYPES], help="of this type only")
    options = parser.parse_args()
    dtypes = [dtype for dtype in DTYPES if options.dtype in (None, TYPES[dtype])]
    head_dims = [size for size in HEAD_DIMS if options.head_dim in (None, size)]
    found = list(compile_all(dtypes, head_dims))
    print(table(found), file=sys.stderr)
    print(json.dumps([asdict(one) for one in found]))


if __name__ == "__main__":
    main()
