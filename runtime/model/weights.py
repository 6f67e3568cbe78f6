"""Reading slices of tensors from a safetensors checkpoint, in one file or sharded.

What is read: the shards that the index names, where there is an index, and else model.safetensors; no other copy of
the weights that may lie beside them. That all of it is there and is what the model's config describes is checked
from the files' heads, before any weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from safetensors import SafetensorError, safe_open

from runtime.errors import ConfigError
from runtime.files import flaw, read_json
from runtime.model.spec import ARCHITECTURES, ModelSpec

if TYPE_CHECKING:
    import torch  # imported by who wants tensors: checking needs none

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = ("F64", "F32", "F16", "BF16")
LEFT_OVER = r"(.*\.)?rotary_emb\.inv_freq"
"""Plain frequencies, which early checkpoints have; they follow from the config."""
WRONG_MODEL = "Its config.json describes another model."


class Checkpoint:
    """An open checkpoint directory; reads only the bytes asked for. A context manager."""

    def __init__(self, directory: Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        """Tensors come back as `dtype` on `device`.

        Raises ConfigError if there are no safetensors, if a file is missing or broken, and if the tensors are not
        those of `spec`.
        """
        self.directory = directory
        self.dtype, self.device = dtype, device
        self.layout = ARCHITECTURES[spec.architecture].layout
        self._slots = self.layout.slots(tensor_shapes(spec), spec.head_dim)
        self._stack = ExitStack()
        self._places: dict[str, tuple[Any, str]] = {}  # by the model's name: the file, and the name there
        try:
            self._open()
            found = {name: _head(*place) for name, place in self._places.items()}
            check_tensors(spec, found, directory)
        except BaseException:
            self._stack.close()
            raise
        self.table_name = TABLE if self.layout.name(TABLE) in self._places else HEAD
        """A tied model may have been saved with its head alone."""
        self.has_head = self.layout.name(HEAD) in self._places
        """Whether the head has weights of its own, whatever the config says of tying."""

    def _open(self) -> None:
        files, index = listed_files(self.directory)
        for file_name in files:
            path = self.directory / file_name
            if problem := flaw(path):
                raise self._refused(f"{file_name}: {problem[0]}", problem[1])
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise self._refused(f"{file_name} cannot be read ({error})", "Fetch the checkpoint again.") from error
            held = set(file.keys())
            absent = sorted(name for name, place in index.items() if place == file_name and name not in held)
            if absent:
                problem_text = f"{INDEX} says that {file_name} has tensor {absent[0]}, and it does not"
                raise self._refused(problem_text, "Fetch the checkpoint again.")
            for name in held:
                if index.get(name, file_name) == file_name:
                    self._places[name] = (file, name)
        # A bare decoder, saved without the head's class around it, has no "model." before its names.
        root, head = f"{self.layout.root}.", self.layout.name(HEAD)
        if not any(name.startswith(root) for name in self._places):
            self._places = {name if name == head else f"{root}{name}": place for name, place in self._places.items()}

    def _refused(self, problem: str, remedy: str) -> ConfigError:
        return ConfigError("model.path", str(self.directory), problem, remedy)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows start .. stop-1 of a tensor."""
        import torch

        slot = self._slots[name]
        runs = slot.runs(start, slot.num_rows if stop is None else stop) or [(0, 0)]
        parts = [self._slice(slot.name)[first:behind] for first, behind in runs]
        return self._convert(parts[0] if len(parts) == 1 else torch.cat(parts))

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Columns start .. stop-1 of a matrix."""
        slot = self._slots[name]
        assert slot.is_whole, f"{slot.name} holds more than {name}"
        return self._convert(self._slice(slot.name)[:, start:stop])

    def _slice(self, name: str) -> Any:
        file, own_name = self._places[name]
        return file.get_slice(own_name)

    def _convert(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, self.dtype).contiguous()


def check_weights(directory: Path, spec: ModelSpec) -> None:
    """Raises ConfigError unless the files in `directory` hold the weights of `spec`, all and only. Reads no weight."""
    import torch

    with Checkpoint(directory, spec, torch.float32, torch.device("cpu")):
        pass


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model and its shape, by the name that Llama's checkpoints give it."""
    hidden, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    queries, keys = spec.num_heads * dim, spec.num_kv_heads * dim
    matrices = {
        "self_attn.q_proj": ((queries, hidden), spec.qkv_bias),
        "self_attn.k_proj": ((keys, hidden), spec.qkv_bias),
        "self_attn.v_proj": ((keys, hidden), spec.qkv_bias),
        "self_attn.o_proj": ((hidden, queries), spec.o_bias),
        **({"mlp.gate_proj": ((inner, hidden), spec.mlp_bias)} if spec.gated else {}),
        "mlp.up_proj": ((inner, hidden), spec.mlp_bias),
        "mlp.down_proj": ((hidden, inner), spec.mlp_bias),
    }
    norm_kinds = ("weight", "bias") if spec.norm == "layer" else ("weight",)
    shapes: dict[str, tuple[int, ...]] = {TABLE: (spec.vocab_size, hidden), HEAD: (spec.vocab_size, hidden)}
    shapes |= {f"model.norm.{kind}": (hidden,) for kind in norm_kinds}
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"
        for norm in filter(None, spec.norm_names):
            shapes |= {f"{prefix}.{norm}.{kind}": (hidden,) for kind in norm_kinds}
        for name, (shape, has_bias) in matrices.items():
            shapes[f"{prefix}.{name}.weight"] = shape
            if has_bias:
                shapes[f"{prefix}.{name}.bias"] = shape[:1]
        if spec.qk_norm or spec.qk_norm_whole:
            for name, size in (("q_norm", queries), ("k_norm", keys)):
                shapes[f"{prefix}.self_attn.{name}.weight"] = (size if spec.qk_norm_whole else dim,)
    return shapes


def check_tensors(spec: ModelSpec, found: Mapping[str, tuple[tuple[int, ...], str]], source: Path) -> None:
    """Compare tensors' (shape, dtype) by name with what the model needs.

    Raises ConfigError naming the first tensor that is missing, that has another shape or a type that is not read, or
    that the model has no use for: to leave it out would run another model than was saved.
    """

    def refused(problem: str, remedy: str = WRONG_MODEL) -> ConfigError:
        return ConfigError("model.path", str(source), problem, remedy)

    layout = ARCHITECTURES[spec.architecture].layout
    wanted = layout.file_shapes(tensor_shapes(spec))
    table, head = layout.name(TABLE), layout.name(HEAD)
    optional = {table if head in found else head} if spec.tie_embeddings else set()
    for name, shape in wanted.items():
        if name not in found:
            if name in optional:
                continue
            raise refused(f"the checkpoint has no tensor {name}")
        shown, dtype = found[name]
        if dtype not in DTYPES:
            remedy = "Name an unquantised safetensors checkpoint, or a GGUF file, which is dequantised on loading."
            raise refused(f"tensor {name} has type {dtype}; read are {', '.join(DTYPES)}", remedy)
        if shown != shape:
            raise refused(f"tensor {name} has shape {shown}, config.json asks for {shape}")
    left_over = re.compile(f"{LEFT_OVER}|{layout.left_over}" if layout.left_over else LEFT_OVER)
    extra = sorted(name for name in found if name not in wanted and not left_over.fullmatch(name))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise refused(f"the checkpoint has tensor {extra[0]}{more}, for which its config.json has no use")


def listed_files(directory: Path) -> tuple[list[str], dict[str, str]]:
    """The files with the weights, and what the index says of each tensor. Raises ConfigError."""
    place = str(directory)
    if (directory / "adapter_config.json").exists():
        problem = "holds a LoRA adapter (adapter_config.json), which is not applied"
        raise ConfigError("model.path", place, problem, "Merge it into its model, and name the directory of that.")
    if not (directory / INDEX).exists():
        if (directory / SINGLE).exists():
            return [SINGLE], {}
        others = [*directory.glob("*.bin"), *directory.glob("*.pt*"), *directory.glob("*.safetensors")]
        problem = f"holds neither {SINGLE} nor {INDEX}"
        problem += f", only {', '.join(sorted(path.name for path in others)[:3])}" if others else ""
        raise ConfigError("model.path", place, problem, "Save the model as safetensors, or name a GGUF file.")
    index = read_json(directory / INDEX).get("weight_map")
    names: Iterable[Any] = index.values() if isinstance(index, dict) else ()
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) and name for name in names):
        problem = f"{INDEX} has no weight_map that names a file for each tensor"
        raise ConfigError("model.path", place, problem, "Fetch the checkpoint again.")
    files = sorted(set(index.values()))
    if outside := [name for name in files if Path(name).name != name]:
        problem = f"{INDEX} names {outside[0]!r}, which is no file beside it"
        raise ConfigError("model.path", place, problem, "Put all weights into one folder.")
    if missing := [name for name in files if not (directory / name).exists()]:
        problem = f"{INDEX} names files that are not there: {', '.join(missing[:3])}"
        problem += f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        remedy = f"Fetch the checkpoint again; if {SINGLE} holds all of it, remove the index."
        raise ConfigError("model.path", place, problem, remedy)
    return files, index


def _head(file: Any, name: str) -> tuple[tuple[int, ...], str]:
    """Shape and type of a tensor, without reading it."""
    found = file.get_slice(name)
    return tuple(found.get_shape()), str(found.get_dtype())
