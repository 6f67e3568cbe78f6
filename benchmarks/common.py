"""What the benchmarks share: prompts, the Hugging Face baseline, tables for people, one JSON line for machines."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cluster.batch import parse, read_lines
from runtime.engine import Engine
from runtime.equality import Gap, gap_by
from runtime.request import Completion

DEFAULT_PROMPTS = Path(__file__).parent / "prompts.jsonl"
stderr = Console(stderr=True)


def load_prompts(engine: Engine, source: Path, limit: int | None) -> list[tuple[str, list[int]]]:
    """(id, token ids) of the records in a file that `outrider batch` would read."""
    records = [parse(line, number) for number, line in enumerate(read_lines(source, limit), 1)]
    return [(str(record.id), list(engine.make_request(record.prompt).prompt_ids)) for record in records]


@dataclass(frozen=True)
class Run:
    """One method's answer to one prompt."""

    token_ids: tuple[int, ...]
    seconds: float
    completion: Completion | None = None
    """Outrider's own account; None for the baselines."""

    @property
    def tokens_per_s(self) -> float:
        """Prompt processing included."""
        return len(self.token_ids) / self.seconds


class HuggingFace:
    """transformers' own `generate` on the same weights, dtype and device, greedy."""

    def __init__(self, directory: Path, dtype: str, device: str) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
        self.model = model.to(device)
        self.gap_of: Gap = gap_by(self.model)

    @torch.inference_mode()
    def run(self, prompt: Sequence[int], max_new_tokens: int, **options: Any) -> Run:
        ids = torch.tensor([list(prompt)], device=self.model.device)
        started = time.perf_counter()
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        tokens = output[0, len(prompt) :].tolist()
        return Run(tuple(tokens), time.perf_counter() - started)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160).print(table)


def print_json(result: dict[str, Any]) -> None:
    """The last line of stdout."""
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    print(json.dumps({**result, "machine": machine, "torch": torch.__version__}), flush=True)
