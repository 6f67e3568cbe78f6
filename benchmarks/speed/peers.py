"""Other engines on the same weights, as methods of the speed benchmark: transformers, and llama.cpp if it is installed.

llama-cpp-python is no dependency. On a machine whose own instruction set its build gets wrong, name the sets:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=ON
    -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON" pip install --no-deps llama-cpp-python diskcache
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import typer

from benchmarks.common import HuggingFace, Run, stderr
from runtime.config import ModelConfig
from runtime.disk import cache_root
from runtime.model.directory import resolve_model
from runtime.model.gguf import embedded_file

DTYPES = {"auto": ("bfloat16", "float32"), "float32": ("float32",), "bfloat16": ("bfloat16",)}
"""`--hugging-face-dtype`: which are measured. auto measures both, for neither is the faster one everywhere."""


def hugging_face_dtypes(name: str) -> tuple[str, ...]:
    """Raises BadParameter for a name that is not in DTYPES."""
    if name not in DTYPES:
        raise typer.BadParameter(f"{name}: choose among {', '.join(DTYPES)}.", param_hint="--hugging-face-dtype")
    return DTYPES[name]


def load_hugging_face(model: ModelConfig, dtypes: Collection[str]) -> dict[str, HuggingFace]:
    """The model in float32, by which gaps are told, and in every dtype that is to be measured."""
    device = "cuda" if model.device != "cpu" and torch.cuda.is_available() else "cpu"
    directory = resolve_model(model.path)
    return {dtype: HuggingFace(directory, dtype, device) for dtype in dict.fromkeys(("float32", *dtypes))}


def gguf_source(path: str | None) -> Path:
    """The GGUF file behind `model.path`. Raises BadParameter where there is none."""
    if path is None:
        return embedded_file()
    if path.endswith(".gguf"):
        return Path(path)
    problem = f"{path} is not a GGUF file; leave model.path out, or name a model's .gguf file."
    raise typer.BadParameter(problem, param_hint="--llama-cpp")


def bfloat16_gguf(source: Path) -> Path:
    """`source` with all matrices in bfloat16, made on the first call and kept in Outrider's cache."""
    import llama_cpp

    status = source.stat()
    target = cache_root() / "llama.cpp" / f"{source.stem}-{status.st_size}-bf16.gguf"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_suffix(f".{os.getpid()}")
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_BF16
        parameters.allow_requantize = True
        stderr.print(f"Writing {target} (once) ...")
        with _silenced():
            failed = llama_cpp.llama_model_quantize(
                str(source).encode(), str(scratch).encode(), ctypes.byref(parameters)
            )
        if failed:
            raise RuntimeError(f"llama.cpp could not convert {source}: error {failed}")
        scratch.rename(target)
    return target


class LlamaCpp:
    """llama.cpp, bfloat16 weights, greedy, through llama-cpp-python with its defaults but for threads and context."""

    def __init__(self, model: ModelConfig, num_threads: int, context: int, end_ids: Collection[int]) -> None:
        """`context`: most tokens of prompt and answer together."""
        if importlib.util.find_spec("llama_cpp") is None:
            problem = "llama-cpp-python is not installed; see benchmarks/peers.py for how."
            raise typer.BadParameter(problem, param_hint="--llama-cpp")
        import llama_cpp

        file = bfloat16_gguf(gguf_source(model.path))
        threads = {"n_threads": num_threads, "n_threads_batch": num_threads}
        with _silenced():
            self.model = llama_cpp.Llama(str(file), n_ctx=context, verbose=False, **threads)
        self.end_ids = frozenset(end_ids)
        self.version = llama_cpp.__version__

    def run(self, prompt: Sequence[int], max_new_tokens: int) -> Run:
        """Continue `prompt`; nothing of an earlier one is reused."""
        started = time.perf_counter()
        self.model.reset()
        tokens: list[int] = []
        for token in self.model.generate(list(prompt), temp=0.0):
            tokens.append(token)
            if token in self.end_ids or len(tokens) == max_new_tokens:
                break
        return Run(tuple(tokens), time.perf_counter() - started)


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep what C code writes off this process's stdout and stderr."""
    saved = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
