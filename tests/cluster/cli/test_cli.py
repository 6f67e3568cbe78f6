"""The command line: help, errors, and the commands on a tiny model in this process."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.cli import commands as cli
from cluster.cli import options, streams, terminal
from cluster.client import backends
from cluster.wire.answers import Chunk
from runtime import progress
from runtime.config import SamplingParams
from runtime.errors import ConfigError
from runtime.request import FinishReason
from runtime.tokenizer import Tokenizer
from tests.models import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def outrider(capsys):
    """Runs a command line: (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_help_needs_none_of_the_big_libraries():
    big = ("torch", "transformers", "ray", "grpc", "numpy", "rich")
    code = f"import sys; import cluster.cli.commands; print([name for name in {big} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_the_commands(outrider):
    code, out, _ = outrider("--help")
    assert code == 0
    for command in ("serve", "generate", "chat", "batch", "bench", "plan", "doctor", "version"):
        assert f"\n  {command} " in out
    assert "..." not in out.partition("Commands:")[2]  # each is described by a whole sentence


@pytest.mark.parametrize("command", ["generate", "chat", "batch"])
def test_every_sampling_parameter_is_an_option(outrider, command):
    _, out, _ = outrider(command, "--help")
    for name in SamplingParams.model_fields:
        assert f"--{name.replace('_', '-')} " in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--set", "modle.path=x"], "modle"),
        (["--set", "lookahead.window_size=0"], "lookahead.window_size"),
        (["--set", "parallel.lp"], "--set"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--set", "model.path=/absent"], "/absent"),
        (["--set", "model.path=/absent", "--set", "parallel.lp=2"], "/absent"),
        (["--address", "localhost:1", "--set", "parallel.lp=2"], "parallel.lp=2"),
        (["--address", "localhost:1", "--config", "x.yaml"], "x.yaml"),
    ],
)
def test_wrong_config_is_one_line_and_code_2(outrider, arguments, named):
    code, out, err = outrider("generate", "hi", *arguments)
    assert code == 2 and out == ""
    assert err.startswith("outrider: ") and err.count("\n") == 1 and named in err


def test_unreachable_server_is_one_line_and_code_1(outrider):
    code, _, err = outrider("generate", "hi", "--address", "localhost:1")
    assert code == 1 and err.count("\n") == 1 and "localhost:1" in err


def test_loading_that_takes_long_says_so_on_standard_error(outrider, model, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    monkeypatch.setattr(backends, "open_engine", slow(backends.open_engine))
    arguments = ["generate", "--raw", "abc", "--set", f"model.path={model}", "--max-new-tokens", "1", "--ignore-eos"]
    code, out, err = outrider(*arguments)
    assert code == 0 and "loading" not in out
    lines = err.splitlines()
    assert "loading the model ..." in lines and lines[-1].startswith("1 token in 1 step, 1.00 tokens per step")


def slow(open_engine):
    def opened(config):
        time.sleep(0.6)
        return open_engine(config)

    return opened


def test_generate_streams_text_and_figures_go_to_standard_error(outrider, model):
    arguments = ["generate", "--raw", "abc", "--set", f"model.path={model}", "--max-new-tokens", "12", "--ignore-eos"]
    code, out, err = outrider(*arguments)
    assert code == 0 and "12 tokens in" in err
    code, as_json, _ = outrider(*arguments, "--json")
    answer = json.loads(as_json)
    assert code == 0 and answer["text"] + "\n" == out
    assert answer["num_new_tokens"] == len(answer["token_ids"]) == 12 and answer["finish_reason"] == "length"
    _, plain, _ = outrider(*arguments, "--json", "--no-lookahead")
    assert json.loads(plain)["token_ids"] == answer["token_ids"]
    assert json.loads(plain)["tokens_per_step"] == 1


def test_batch_answers_errors_and_exit_code(outrider, model, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    records = [
        {"id": "raw", "prompt": "abc"},
        {"question_id": 81, "category": "x", "turns": ["abc", "def"]},
        {"id": "ids", "token_ids": Tokenizer(model).encode("abc"), "max_new_tokens": 3},
        {"id": "bad", "token_ids": [100000]},
        {"id": "sampled", "prompt": "abc", "temperature": 1.0, "seed": 5, "lookahead": {"enabled": False}},
    ]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    setting = ["--set", f"model.path={model}", "--set", "sampling.max_new_tokens=8", "--ignore-eos"]
    code, out, err = outrider("batch", str(source), str(target), *setting, "--concurrency", "3", "--json")
    results = [json.loads(line) for line in target.read_text().splitlines()]
    assert code == 1 and "5 records (1 error)" in err and json.loads(out)["num_errors"] == 1
    assert [result["id"] for result in results] == ["raw", 81, "ids", "bad", "sampled"]
    assert "token_ids" in results[3]["error"]
    raw, chat, ids, _, sampled = results
    assert ids["token_ids"] == raw["token_ids"][:3] and len(raw["token_ids"]) == 8
    assert chat["num_prompt_tokens"] > raw["num_prompt_tokens"] == 3  # the chat template's tokens
    assert (raw["num_seen_tokens"], raw["kept_last"], raw["kept_sum"]) == (10, 1.0, 1.0)
    assert sampled["tokens_per_step"] == 1 and sampled["token_ids"] != raw["token_ids"]
    code, _, _ = outrider("batch", str(source), str(target), *setting, "--limit", "2")
    assert code == 0 and len(target.read_text().splitlines()) == 2


def test_batch_refuses_to_overwrite_its_input(outrider, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "x"}\n')
    code, _, err = outrider("batch", str(source), str(source))
    assert code == 2 and "input file" in err and source.read_text() == '{"prompt": "x"}\n'


def test_settings_that_a_client_may_send():
    overrides = options.request_overrides(None, ["sampling.temperature=0.5", "lookahead.sources=[suffix]"])
    assert overrides == {"sampling": {"temperature": 0.5}, "lookahead": {"sources": ["suffix"]}}
    with pytest.raises(ConfigError, match="temperature"):
        options.request_overrides(None, ["sampling.temperature=-1"])


def test_doctor_looks_and_reports_as_json(outrider):
    code, out, _ = outrider("doctor", "--quick", "--json")
    report = json.loads(out)
    by_name = {finding["name"]: finding for finding in report["findings"]}
    assert code == 0 and report["ok"]
    libraries = ("torch", "cuda", "nccl", "transformers", "ray", "grpc")
    for name in ("python", *libraries, "native cpu kernels", "embedded model"):
        assert by_name[name]["status"] in ("ok", "not available")


def test_doctor_exit_code_tells_failures(outrider, monkeypatch):
    from cluster.cli import doctor

    def broken() -> str:
        raise OSError("broken on purpose")

    monkeypatch.setattr(doctor, "_torch", broken)
    code, out, _ = outrider("doctor", "--quick")
    assert code == 1 and "broken on purpose" in out and "1 failed: torch" in out


class Lines(list):
    """Stands for a file; keeps what is written."""

    write = list.append

    def flush(self):
        pass


def test_accepted_tokens_are_coloured_and_the_stop_token_is_not_shown(model):
    a, b, c, d, e, stop = Tokenizer(model).encode("abcdeX")
    chunks = [
        Chunk("r", "abc", (a, b, c), 2, None, None),
        Chunk("r", "d", (d,), 0, None, None),
        Chunk("r", "e", (e, stop), 1, FinishReason.STOP, None),
    ]
    green = lambda text: f"{terminal.ACCEPTED}{text}{terminal.RESET}"  # noqa: E731
    for color, tokenizer, expected in (
        (False, None, "abcde"),
        (True, None, green("abc") + "d" + green("e")),
        (True, Tokenizer(model), green("ab") + "c" + "d" + green("e")),
    ):
        lines = Lines()
        stream = terminal.TextStream(lines, color, tokenizer)
        for chunk in chunks:
            stream.write(chunk)
        assert "".join(lines) == expected


# Standard streams, in processes of their own


def piped(
    *arguments: str, given: bytes = b"", shell: str = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Runs a command line as the beginning of a shell's: `outrider ARGUMENTS shell`."""
    command = " ".join(shlex.quote(part) for part in (sys.executable, "-m", "cluster.cli", *arguments))
    return subprocess.run(
        ["bash", "-c", f"{command} {shell}"],
        input=given,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), **environment},
        check=False,
    )


def plain(model: Path) -> list[str]:
    return [f"--set={setting}" for setting in (f"model.path={model}", "model.device=cpu", "lookahead.enabled=false")]


@pytest.mark.system
def test_standard_input_that_is_no_text(model):
    done = piped("generate", "-", "--raw", *plain(model), given=b"caf\xe9")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"UTF-8" in done.stderr and b"0xE9" in done.stderr and b"Traceback" not in done.stderr
    closed = piped("generate", "-", *plain(model), shell="<&-")
    assert closed.returncode == 2 and b"standard input" in closed.stderr


@pytest.mark.parametrize("arguments", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.system
def test_an_output_that_cannot_show_a_character(model, arguments):
    """The answer of 40 sampled bytes has characters beyond ASCII."""
    command = "generate", "abc", "--temperature", "3", "--max-new-tokens", "40", "--ignore-eos", *arguments
    whole = piped(*command, *plain(model), PYTHONIOENCODING="utf-8").stdout.decode()
    shown = piped(*command, *plain(model), PYTHONIOENCODING="ascii")
    assert shown.returncode == 0 and not whole.isascii()
    out = shown.stdout.decode("ascii")
    if arguments:
        assert json.loads(out)["text"] == json.loads(whole)["text"]
    else:
        assert out == whole.encode("ascii", "backslashreplace").decode()


@pytest.mark.parametrize("shell", ["| head -c 1", "| true", ">&-"])
@pytest.mark.system
def test_a_reader_that_has_gone(model, shell):
    done = piped("generate", "abc", "--max-new-tokens", "300", "--ignore-eos", *plain(model), shell=shell)
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr


def test_a_prompt_on_standard_input_keeps_its_line_ends(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffé\r\nb\r".encode())))
    assert streams.read_text() == "é\r\nb\r"
