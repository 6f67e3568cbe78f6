"""The README's Python runs as it stands, as a script; only the model is made small."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)

pytestmark = [pytest.mark.system, pytest.mark.slow]


def test_the_readme_shows_an_engine_of_two_workers():
    assert [example for example in EXAMPLES if "Engine.from_config(" in example and '"lp": 2' in example]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.splitlines()[2][:40])
def test_the_example_runs_as_a_script(example, tiny_model, tmp_path):
    small = f'Engine.from_config({{"model": {{"path": {str(tiny_model)!r}}}, "lookahead": {{"planner": False, '
    small += '"sources": ["suffix"], "row_budget": 8}, **'
    script = tmp_path / "example.py"
    script.write_text(re.sub(r"Engine\.from_config\((\{.*\})\)", lambda found: f"{small}{found[1]}}})", example))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ("|" in ran.stdout) == ('end="|"' in example)
