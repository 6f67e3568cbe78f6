"""Worker processes: whatever program wants them, however it ends, beside whatever else it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime import Engine, SamplingParams
from runtime.errors import ConfigError
from runtime.model.directory import load_spec
from runtime.workers.pool import ProcessPool
from tests.runtime.workers.test_mesh_engine import make_config

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[3]
SAMPLING = SamplingParams(max_new_tokens=4, ignore_eos=True)

UNGUARDED = """
import sys
from runtime import Engine, SamplingParams
config = {"model": {"path": sys.argv[1]}, "lookahead": {"enabled": False}, "parallel": {"lp": 2}}
engine = Engine.from_config(config)
print(*engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=4, ignore_eos=True))[0].token_ids, flush=True)
print(*[worker.pid for worker in engine.executor._pool._workers.values()], flush=True)
"""
FORKED = """
import os
child = os.fork()
if child == 0:
    engine.close()
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
print(*engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=4, ignore_eos=True))[0].token_ids, flush=True)
"""
KILLED = "import os\nos.kill(os.getpid(), 9)\n"


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def expected(tiny_model) -> tuple[int, ...]:
    with Engine.from_config(make_config(tiny_model)) as engine:
        return engine.generate([[1, 2, 3]], SAMPLING)[0].token_ids


@pytest.mark.parametrize(
    ("way", "end", "code"),
    [("stdin", "", 0), ("-c", "", 0), ("script", FORKED, 0), ("script", KILLED, -signal.SIGKILL)],
    ids=["stdin", "-c", "forked", "killed"],
)
def test_any_program_may_have_workers_and_leaves_none(tiny_model, tmp_path, expected, way, end, code) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED + end)
    how = {"script": [str(script)], "stdin": ["-"], "-c": ["-c", script.read_text()]}[way]
    done = subprocess.run(
        [sys.executable, *how, str(tiny_model)],
        input=script.read_text() if way == "stdin" else "",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == code, done.stderr
    tokens, pids, *again = ([int(word) for word in line.split()] for line in done.stdout.splitlines())
    assert tuple(tokens) == expected and all(tuple(line) == expected for line in again)
    assert len(pids) == 2 and len(again) == (end == FORKED)
    wait_until_gone(pids)


def test_two_meshes_and_the_programs_own_group_in_one_process(tiny_model, tmp_path, expected) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "own"), 1), rank=0, world_size=1)
    with Engine.from_config(make_config(tiny_model, lp=2)) as first:
        with Engine.from_config(make_config(tiny_model, tp=2)) as second:
            assert second.generate([[1, 2, 3]], SAMPLING)[0].token_ids == expected
            dist.all_reduce(torch.ones(1))
            dist.destroy_process_group()
            assert first.generate([[1, 2, 3]], SAMPLING)[0].token_ids == expected
        assert first.generate([[1, 2, 3]], SAMPLING)[0].token_ids == expected


def test_a_program_that_is_no_interpreter_is_refused_by_name(tiny_model, monkeypatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(ConfigError, match="parallel.*set_executable"):
        ProcessPool().open(make_config(tiny_model, lp=2), load_spec(tiny_model))
