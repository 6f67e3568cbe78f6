"""The Python of the README and of the page on gRPC runs as it stands, as scripts; only the model is made small."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.client.own_server import own_server

ROOT = Path(__file__).resolve().parents[2]


def examples(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


EXAMPLES = examples("README.md")

pytestmark = [pytest.mark.system, pytest.mark.slow]


def test_the_readme_shows_an_engine_of_two_workers():
    assert [example for example in EXAMPLES if "Engine.from_config(" in example and '"lp": 2' in example]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.splitlines()[2][:40])
def test_the_example_runs_as_a_script(example, tiny_model, tmp_path):
    small = f'Engine.from_config({{"model": {{"path": {str(tiny_model)!r}}}, "lookahead": {{"planner": False, '
    small += '"sources": ["suffix"], "row_budget": 8}, **'
    example = re.sub(r"Engine\.from_config\((\{.*\})\)", lambda found: f"{small}{found[1]}}})", example)
    assert ("|" in run(example, tmp_path)) == ('end="|"' in example)


def test_the_clients_examples_run_against_a_server(tiny_model, tmp_path):
    settings = [f"model.path={tiny_model}", "lookahead.planner=false", "lookahead.sources=[suffix]"]
    with own_server([*settings, "lookahead.row_budget=8", "sampling.max_new_tokens=8"]) as (_, address):
        found = examples("docs/grpc.md")
        assert len(found) == 4
        for example in found:
            assert run(example.replace("localhost:50051", address), tmp_path)


def run(script: str, folder: Path) -> str:
    """What it prints."""
    path = folder / "example.py"
    path.write_text(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout
