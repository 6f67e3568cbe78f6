"""The commands and the Python of the page on HTTP do what it says, against a server of a small model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.config import Config
from runtime.engine.engine import Engine
from tests.cluster.serving.serving import serving

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "http.md").read_text()
pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def url(tiny_model: Path) -> Iterator[str]:
    with Engine.from_config(Config.load(None, [f"model.path={tiny_model}", "model.device=cpu"])) as engine:
        with serving(engine, http=True, port=0) as server:
            yield server.url


def test_the_curl_commands_answer(url: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not here")
    lines = [line for line in PAGE.replace("\\\n", " ").splitlines() if line.startswith("curl ")]
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line.replace("http://localhost:8000", url))
        ran = subprocess.run([*words, "--noproxy", "*"], capture_output=True, text=True, timeout=60, check=True)
        if '"stream": true' in line:
            assert ran.stdout.rstrip().endswith("data: [DONE]") and '"usage"' in ran.stdout
        else:
            answer = json.loads(ran.stdout)
            assert answer["object"] in ("list", "chat.completion", "text_completion"), line


def test_the_python_runs(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"^```py\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    exec(compile(example.replace("http://localhost:8000", url), "docs/http.md", "exec"), {})
    assert capsys.readouterr().out
