"""The `outrider` command. What a command needs is imported when it runs, so that help comes at once."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.options import (
    AddressOption,
    ColorOption,
    ConfigOption,
    JsonOption,
    LookaheadOption,
    SetOption,
    request_overrides,
    with_sampling,
)
from runtime.config import Config
from runtime.errors import ConfigError, FieldError, OutriderError

if TYPE_CHECKING:
    from cluster.client.backends import Backend
    from runtime.request import Prompt

app = typer.Typer(
    help="Lossless lookahead decoding: one process, or a mesh of workers on Ray, behind gRPC.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def serve(config: ConfigOption = None, set_: SetOption = None) -> None:
    """Load the model, start the workers and answer gRPC calls until SIGINT or SIGTERM.

    A mesh of more than one worker runs on Ray: the cluster that ray.address or RAY_ADDRESS names, else a local one.
    """
    import logging

    from cluster.client.backends import open_engine
    from cluster.serving.server import serve as serve_until_signal

    settings = Config.load(config, set_ or ())
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    engine = open_engine(settings)  # when the port is had
    serve_until_signal(settings, engine, lambda address: print(f"serving on {address}", flush=True))


@app.command()
@with_sampling
def generate(
    prompt: Annotated[str, typer.Argument(help="The user's message (or raw text); - reads standard input.")],
    address: AddressOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    chat: Annotated[bool, typer.Option("--chat/--raw", help="A message in the chat template, or raw text.")] = True,
    lookahead: LookaheadOption = None,
    color: ColorOption = None,
    as_json: JsonOption = False,
    *,
    sampling: dict[str, Any],
) -> None:
    """Answer one prompt, streamed to standard output; figures go to standard error.

    In colour: the tokens that a step accepted beside the one that every step gives.
    """
    from cluster.cli import batch, terminal

    text = sys.stdin.read() if prompt == "-" else prompt
    message: Prompt = [{"role": "user", "content": text}] if chat else text
    backend, defaults = _backend(address, config, set_ or (), lookahead)
    with closing(backend):
        chunks = []
        stream = None
        if not as_json:
            tokenizer = getattr(getattr(backend, "engine", None), "tokenizer", None)
            stream = terminal.TextStream(sys.stdout, terminal.wants_color(sys.stdout, color), tokenizer)
        for chunk in backend.stream(message, defaults["sampling"] | sampling, defaults["lookahead"]):
            chunks.append(chunk)
            if stream is not None:
                stream.write(chunk)
        usage = chunks[-1].usage
        assert usage is not None
        if as_json:
            print(json.dumps(batch.answer(chunks), ensure_ascii=False))
        else:
            print()
            print(terminal.summary(usage), file=sys.stderr)


@app.command()
@with_sampling
def chat(
    address: AddressOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message to begin with.")] = None,
    lookahead: LookaheadOption = None,
    color: ColorOption = None,
    *,
    sampling: dict[str, Any],
) -> None:
    """Talk with the model: one line a turn; earlier turns stay in the cache, and nothing is computed again.

    Answers go to standard output, figures to standard error. Ctrl-C stops an answer, Ctrl-D ends, /help lists the
    commands. Lines may also be piped in. Under cache policy full a conversation ends when it fills its cache; with
    --set cache.policy=sink, or sep, it may go on for ever.
    """
    from cluster.cli import chat as chats
    from cluster.cli import terminal

    backend, defaults = _backend(address, config, set_ or (), lookahead)
    with closing(backend):
        chats.Chat(
            backend,
            sampling=defaults["sampling"] | sampling,
            lookahead=defaults["lookahead"],
            system=system,
            color=terminal.wants_color(sys.stdout, color),
            interactive=sys.stdin.isatty(),
        ).run(chats.make_reader())


@app.command(name="batch")
@with_sampling
def run_batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="One record a line.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="One answer a line, in the same order.")],
    address: AddressOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    lookahead: LookaheadOption = None,
    concurrency: Annotated[int, typer.Option(min=1, metavar="K", help="Requests in flight.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, metavar="M", help="Only the first M lines.")] = None,
    as_json: JsonOption = False,
    *,
    sampling: dict[str, Any],
) -> None:
    """Answer every record of a file.

    A record is {"id", "prompt" (raw text) | "messages" | "token_ids", ...sampling parameters, "lookahead": {...}}, or
    one of Spec-Bench, {"question_id", "turns"}, whose first turn is taken as the user's message. A line that cannot be
    answered gets {"id", "error"}, and the exit code is 1 in the end.
    """
    from rich.console import Console

    from cluster.cli import batch

    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError("OUT", str(target), "is the input file", "Name another file.")
    batch.read_lines(source, limit)  # a bad file should not wait for the model
    if not target.absolute().parent.is_dir():
        raise ConfigError("OUT", str(target), "its folder does not exist", "Create it first.")
    backend, defaults = _backend(address, config, set_ or (), lookahead)
    console = Console(stderr=True)
    with closing(backend):
        totals = batch.run(
            source,
            target,
            backend,
            defaults={"sampling": defaults["sampling"] | sampling, "lookahead": defaults["lookahead"]},
            concurrency=concurrency,
            limit=limit,
            console=console,
        ).as_dict()
    if as_json:
        print(json.dumps(totals))
    print(
        "{num_records} records ({num_errors} errors), {num_new_tokens} tokens in {seconds:.1f} s: "
        "{tokens_per_s:.1f} tokens/s, {tokens_per_step:.2f} tokens per step".format(**totals),
        file=sys.stderr,
    )
    if totals["num_errors"]:
        raise typer.Exit(1)


@app.command()
def plan(
    config: ConfigOption = None,
    set_: SetOption = None,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure anew what is kept on disk.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a step costs here by its rows, how the workers are split and why, and the speed to be expected.

    With --set parallel=auto or --set model.dtype=auto, all splits or types are compared.
    """
    from cluster.cli import planning

    planning.show(Config.load(config, set_ or ()), remeasure=remeasure, as_json=as_json)


@app.command()
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Only look; skip the self-test.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine has, and try out what Outrider needs of it. The exit code is 1 if something failed."""
    from cluster.cli import doctor as doctors

    if not doctors.examine(quick=quick, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def demo() -> None:
    """Two workers on a local Ray, a server, one answer with lookahead and one without."""
    from cluster.cli import demo as demos

    raise typer.Exit(demos.main())


@app.command()
def version() -> None:
    """Print Outrider's version."""
    from importlib.metadata import version as version_of

    print(version_of("outrider"))


def _backend(
    address: str | None, config: Path | None, settings: Sequence[str], lookahead: bool | None
) -> tuple[Backend, dict[str, dict[str, Any]]]:
    """Where answers come from, and the parameters to send along with every request, by section."""
    from cluster.client import backends

    if address is not None:
        overrides = request_overrides(config, settings)
        if lookahead is not None:
            overrides["lookahead"]["enabled"] = lookahead
        return backends.Remote(address), overrides
    if lookahead is not None:
        settings = [*settings, f"lookahead.enabled={str(lookahead).lower()}"]
    return backends.InProcess(Config.load(config, settings)), {"sampling": {}, "lookahead": {}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit codes: 1 something failed, 2 something was asked for that cannot be."""
    if arguments is None:  # as a program of its own, signals are its to handle
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was started is ended
    try:
        app(args=arguments)
    except OutriderError as error:
        print(f"outrider: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, FieldError) else 1)


if __name__ == "__main__":
    main()
