"""Streaming caches over long texts: perplexity by position, time per token by cache size, and an endless text.

Three parts, each by itself with `--part`:

- perplexity: what each policy makes of a text beyond the trained length, beside full attention and a window that is
  recomputed for every token;
- latency: decoding with a full cache of 256 to 4096 tokens beside recomputing the window, in turns;
- endless: time per token and memory from one thousand tokens on, in turns with one that rests near position 10,000.

The first wants texts (`--text`); the others take random token ids where none is given. `--set model.dtype=bfloat16`
feeds faster. One million tokens:

    python -m benchmarks.streaming --text book.txt --out out
    python -m benchmarks.streaming --part endless --max-position 1000000 --set model.dtype=bfloat16
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.common import check_parts, print_json, stderr
from benchmarks.streaming import long_text, token_time
from runtime.config import Config
from runtime.engine.scoring import Scorer
from runtime.model.directory import load_spec, resolve_model
from runtime.tokenizer import Tokenizer

PARTS = ("perplexity", "latency", "endless")


def main(
    part: Annotated[list[str], typer.Option(help="perplexity, latency, endless; may be given again.")] = list(PARTS),  # noqa: B006
    text: Annotated[
        list[Path], typer.Option(exists=True, dir_okay=False, help="UTF-8 text file; may be given again.")
    ] = [],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="perplexity: first tokens of each text.")] = 16384,
    cache_size: Annotated[int, typer.Option(help="perplexity, endless: tokens a bounded cache holds.")] = 1024,
    segment: Annotated[int, typer.Option(help="perplexity: positions per line of the table.")] = 1024,
    recompute_samples: Annotated[int, typer.Option(help="perplexity: positions with a recomputed window.")] = 32,
    sizes: Annotated[str, typer.Option(help="latency: cache sizes, comma-separated.")] = "256,512,1024,2048,4096",
    max_position: Annotated[int, typer.Option(help="endless: how far the text is fed.")] = 100_000,
    rounds: Annotated[int, typer.Option(help="latency, endless: alternating rounds, whose medians count.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    config: Annotated[Path | None, typer.Option(help="Run config, YAML; its cache section is not used.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="key.path=value")] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Write plots (PNG) into this directory.")] = None,
) -> None:
    """Measure streaming caches."""
    check_parts(part, PARTS)
    run_config = Config.load(config, set_)
    if threads:
        torch.set_num_threads(threads)
    directory = resolve_model(run_config.model.path)
    texts = [Tokenizer(directory).encode(path.read_text(encoding="utf-8")) for path in text]
    spec = load_spec(directory)
    ids = np.concatenate(texts) if texts else np.random.default_rng(0).integers(0, spec.vocab_size, 20_000)
    result: dict[str, Any] = {"benchmark": "streaming", "config": run_config.model_dump(mode="json")}
    if "perplexity" in part:
        check_texts(text, texts, tokens)
        scorer = Scorer(run_config)
        taken = [ids[:tokens] for ids in texts]
        results = long_text.score_policies(scorer, long_text.policies(cache_size, tokens), taken)
        sample = long_text.recompute(scorer, taken, cache_size, recompute_samples) if recompute_samples else None
        del scorer
        result["perplexity"] = long_text.report(results, sample, segment, spec.max_positions, cache_size, out)
    if "latency" in part:
        latency = token_time.measure_latency(run_config, [int(size) for size in sizes.split(",")], ids, rounds)
        result["latency"] = token_time.report_latency(latency, rounds, out)
    if "endless" in part:
        stderr.print(f"endless: up to {max_position:,} tokens (--max-position); further positions are left out")
        points = token_time.measure_endless(run_config, cache_size, ids, max_position, rounds)
        result["endless"] = token_time.report_endless(points, cache_size, rounds, run_config.model.dtype, out)
    print_json(result)


def check_texts(paths: list[Path], texts: list[list[int]], tokens: int) -> None:
    """Refuse what perplexity cannot be measured on."""
    if not texts:
        message = "perplexity wants a text (--text FILE); latency and endless run without one (--part)."
        raise typer.BadParameter(message, param_hint="--text")
    for path, ids in zip(paths, texts, strict=True):
        if len(ids) < tokens:
            message = f"{path} has {len(ids)} tokens, fewer than --tokens {tokens}; lower that, or give a longer text."
            raise typer.BadParameter(message, param_hint="--text")
