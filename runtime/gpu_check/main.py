"""Runs the sections one after the other, whatever happens in them, and prints a table and one JSON line."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import torch

from runtime.gpu_check.setting import Report, Setting, say

SECTIONS: dict[str, tuple[str, float]] = {
    "device": ("runtime.gpu_check.ceilings", 15),
    "products": ("runtime.gpu_check.products", 30),
    "kernels": ("runtime.gpu_check.kernels", 120),
    "steps": ("runtime.gpu_check.steps", 150),
    "text": ("runtime.gpu_check.text", 75),
    "ranks": ("runtime.gpu_check.ranks", 60),
}
"""Each with its module, whose `check` runs it, and the seconds after which it is to leave out what is left."""
TOTAL_S = 450.0


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all sections ran and found nothing wrong, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime.gpu_check", description="What a GPU does with our kernels."
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="everything tiny: tries the check itself out, on a CPU too")
    parser.add_argument("--model", type=Path, help="a trained model's directory")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which, comma-separated")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that this machine lacks (make gpu-wheels)")
    options = parser.parse_args(arguments)
    names = options.sections.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    if options.device == "cpu" and not options.tiny:
        parser.error("a CPU runs the check with --tiny only: without it, it would take days")
    reports = run(torch.device(options.device), options.tiny, options.model, names)
    failed = [name for name, report in reports.items() if not report.get("ok", True)]
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    print(json.dumps({"benchmark": "gpu-check", "ok": not failed, "tiny": options.tiny, "sections": reports}))
    return 1 if failed else 0


def run(
    device: torch.device, is_tiny: bool, model: Path | None, names: Sequence[str], is_short: bool = False
) -> dict[str, Report]:
    """Each section's report; that of one which raised says what."""
    began = time.monotonic()
    reports: dict[str, Report] = {}
    for name in names:
        module, seconds = SECTIONS[name]
        print(f"\n{name}", flush=True)
        started = time.monotonic()
        deadline = min(started + seconds, began + TOTAL_S)
        try:
            if started > began + TOTAL_S:
                raise TimeoutError("no time left")
            check: Callable[[Setting], Report] = import_module(module).check
            report = check(Setting(device, is_tiny, model, deadline, is_short))
        except Exception as error:  # the other sections are to say what they can
            say(traceback.format_exc())
            report = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            print(f"  FAILED: {report['error']}", flush=True)
        reports[name] = report | {"seconds": round(time.monotonic() - started, 1)}
        print(f"  ({reports[name]['seconds']} s)", flush=True)
    return reports
