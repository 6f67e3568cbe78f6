"""The `outrider` command. What a command needs is imported when it runs, so that help comes at once."""

from __future__ import annotations

import errno
import json
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cluster.cli import streams
from cluster.cli.options import (
    AddressOption,
    ColorOption,
    ConfigOption,
    DeadlineOption,
    JsonOption,
    LookaheadOption,
    PatienceOption,
    PriorityOption,
    SetOption,
    TlsOption,
    TokenOption,
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
    """Answer calls, over gRPC and HTTP, until SIGINT or SIGTERM.

    A mesh of more than one worker runs on Ray: the cluster that ray.address or RAY_ADDRESS names, else a local one. A
    server that ends unasked is started again (server.restarts).
    """
    import os

    from cluster.serving import supervisor

    settings = Config.load(config, set_ or ())
    if settings.server.restarts and not supervisor.is_supervised():
        named = [("--config", config), *(("--set", setting) for setting in set_ or ())]
        parts = [str(part) for name, value in named if value is not None for part in (name, value)]
        command = [sys.executable, "-m", "cluster.cli", "serve", *parts]
        raise typer.Exit(supervisor.supervise(command, settings.server.restarts))
    # Ray starts its processes beside gRPC's threads, but not by forking alone: gRPC has nothing to prepare, or to say.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from cluster.client.backends import open_engine
    from cluster.serving import logs
    from cluster.serving.server import serve as serve_until_signal

    logs.configure(settings.server)
    engine = open_engine(settings, prepare=True)  # when the port is had
    serve_until_signal(settings, engine, lambda addresses: print(addresses, flush=True))


@app.command()
@with_sampling
def generate(
    prompt: Annotated[str, typer.Argument(help="The user's message (or raw text); - reads standard input.")],
    address: AddressOption = None,
    token_file: TokenOption = None,
    tls_ca: TlsOption = None,
    patience: PatienceOption = None,
    priority: PriorityOption = None,
    deadline: DeadlineOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    chat: Annotated[bool, typer.Option("--chat/--raw", help="A message in the chat template, or raw text.")] = True,
    lookahead: LookaheadOption = None,
    color: ColorOption = None,
    as_json: JsonOption = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw the (first) answer, its accepted tokens marked.")
    ] = None,
    *,
    sampling: dict[str, Any],
) -> None:
    """Answer one prompt.

    The text streams to standard output, further answers (--n) behind it; figures go to standard error. In colour: the
    tokens that a step accepted beside the one that every step gives.
    """
    from cluster.cli import batch, pictures, terminal
    from cluster.wire.answers import by_index

    if picture is not None:
        pictures.check(picture, address)
    if patience is not None and address is None:
        raise ConfigError("--patience", patience, "is for a server's answers", "Name one with --address.")
    text = streams.read_text() if prompt == "-" else prompt
    message: Prompt = [{"role": "user", "content": text}] if chat else text
    backend, defaults = _backend((address, token_file, tls_ca), config, set_ or (), lookahead, patience)
    with closing(backend):
        chunks = []
        stream = None
        tokenizer = getattr(getattr(backend, "engine", None), "tokenizer", None)
        if not as_json:
            stream = terminal.TextStream(sys.stdout, terminal.wants_color(sys.stdout, color), tokenizer)
        try:
            urgency = {"priority": priority, "deadline_s": deadline}
            urgency = {name: value for name, value in urgency.items() if value is not None}
            for chunk in backend.stream(message, defaults["sampling"] | sampling, defaults["lookahead"], **urgency):
                chunks.append(chunk)
                if stream is not None and chunk.index == 0:
                    stream.write(chunk)
        except OutriderError:
            if chunks and not as_json:
                print(flush=True)  # what has come is shown; the error has a line of its own
            raise
        answers = by_index(chunks)
        if picture is not None:
            assert tokenizer is not None
            pictures.save(picture, text, answers[0], tokenizer)
        if as_json:
            streams.print_json(batch.answer(chunks))
            return
        for index, answer in enumerate(answers):
            if index:  # the first has been shown as it came
                stream = terminal.TextStream(sys.stdout, terminal.wants_color(sys.stdout, color), tokenizer)
                for chunk in answer:
                    stream.write(chunk)
            print(flush=True)
            usage = answer[-1].usage
            assert usage is not None
            print(terminal.summary(usage), file=sys.stderr)


@app.command()
@with_sampling
def chat(
    address: AddressOption = None,
    token_file: TokenOption = None,
    tls_ca: TlsOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message to begin with.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: lines are text that goes on.")] = False,
    lookahead: LookaheadOption = None,
    color: ColorOption = None,
    *,
    sampling: dict[str, Any],
) -> None:
    """Talk with the model, one line a turn.

    Earlier turns stay in the cache, and nothing is computed again. Answers go to standard output, figures to standard
    error. Ctrl-C stops an answer, Ctrl-D ends, /help lists the commands. Lines may also be piped in. Under cache policy
    full a conversation ends when it fills its cache; with --set cache.policy=sink, or sep of the streaming design, it
    may go on for ever.

    A model without a chat template can only continue text. With --raw each line is put behind all that was said, as it
    is, and the model goes on from there.
    """
    from cluster.cli import chat as chats
    from cluster.cli import terminal

    if raw and system is not None:
        raise ConfigError("--system", system, "raw text has no system message", "Say it in the first line instead.")
    interactive = streams.require_input().isatty()
    backend, defaults = _backend((address, token_file, tls_ca), config, set_ or (), lookahead)
    with closing(backend):
        talk = chats.Chat(
            backend,
            sampling=defaults["sampling"] | sampling,
            lookahead=defaults["lookahead"],
            system=system,
            raw=raw,
            color=terminal.wants_color(sys.stdout, color),
            interactive=interactive,
        )
        talk.run(chats.make_reader())
    if talk.num_failed:
        raise typer.Exit(1)


@app.command(name="batch")
@with_sampling
def run_batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="One record a line; - is standard input.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT.jsonl", help="One answer a line, in the same order; - is standard output.")
    ],
    address: AddressOption = None,
    token_file: TokenOption = None,
    tls_ca: TlsOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    lookahead: LookaheadOption = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, metavar="K", help="Requests in flight.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, metavar="M", help="Only the first M records.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an earlier run stopped; ask again for its errors only.")
    ] = False,
    patience: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="S",
            help="Seconds without any answer after which a server that is full or away is not asked again.",
            show_default="300; 30 for one that never answered",
        ),
    ] = None,
    priority: PriorityOption = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="Seconds that the whole job has; what cannot be answered in them is an error.",
            show_default="none",
        ),
    ] = None,
    as_json: JsonOption = False,
    *,
    sampling: dict[str, Any],
) -> None:
    """Answer every record of a file, a pipe or standard input.

    A record is {"id", "prompt" (raw text) | "messages" | "token_ids", ...sampling parameters, "lookahead": {...},
    "priority", "deadline" (seconds from when it is asked)}, or
    one of Spec-Bench, {"question_id", "turns"}, whose first turn is taken as the user's message. An id is a text or a
    whole number; a record without one goes by the number of its line. Empty lines are no records. A line that cannot be
    answered gets {"id", "error"}, and the others are answered.

    What OUT.jsonl has stays until the run has come to its end: meanwhile, answers are in OUT.jsonl.partial. A run that
    is stopped keeps what is finished, and --resume goes on from there, by the records' ids (of equal ids, the first
    answer belongs to the first record): answers are kept, errors and what is missing are asked for.

    Exit codes: 0 all records are answered; 1 some have errors, or the run could not go on; 2 something was asked for
    that cannot be; 130 and 143 it was stopped by SIGINT or SIGTERM; 141 nobody reads the output any more.
    """
    from cluster.cli import batch

    totals = batch.Totals()

    def connect() -> tuple[Backend, dict[str, dict[str, Any]]]:
        where = address, token_file, tls_ca
        backend, defaults = _backend(where, config, set_ or (), lookahead, batch.away_patience_s(patience))
        return backend, {"sampling": defaults["sampling"] | sampling, "lookahead": defaults["lookahead"]}

    try:
        batch.run(
            source,
            target,
            connect,
            resume=resume,
            concurrency=concurrency,
            limit=limit,
            patience_s=patience,
            priority=priority,
            deadline_s=deadline,
            totals=totals,
        )
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None
    except batch.ClosedError:
        raise typer.Exit(128 + signal.SIGPIPE) from None
    finally:
        if as_json and totals.seconds:
            # Where answers go to standard output, nothing else does.
            print(json.dumps(totals.as_dict()), file=sys.stderr if batch.is_standard_output(target) else sys.stdout)
    print(totals.summary(), file=sys.stderr)
    if totals.num_errors:
        print(f"outrider: the first error is that of record {totals.first_error}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
@with_sampling
def bench(
    url: Annotated[str, typer.Option(metavar="URL", help="The server: HOST:PORT of gRPC, or http://HOST:PORT.")],
    source: Annotated[
        Path | None, typer.Argument(metavar="PROMPTS.jsonl", help="Records as `batch` reads them; else made up.")
    ] = None,
    prompt_tokens: Annotated[
        str, typer.Option(metavar="N|MIN:MAX", help="About how long made-up prompts are, in tokens.")
    ] = "128",
    chat: Annotated[bool, typer.Option("--chat/--raw", help="Made-up prompts as a user's messages, or raw.")] = False,
    num_requests: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of each load.", show_default="the file, or 4 a stream")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(metavar="K,...", help="Streams at a time; several make a sweep.", show_default="1")
    ] = None,
    request_rate: Annotated[
        str | None, typer.Option(metavar="R,...", help="Instead: requests per second, by a Poisson process.")
    ] = None,
    load_seed: Annotated[int, typer.Option(metavar="N", help="Of made-up prompts and arrivals.")] = 0,
    goodput: Annotated[
        str | None, typer.Option(metavar="GOALS", help="Milliseconds, e.g. ttft:500,tpot:20; also e2el.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.001, metavar="S", help="Longest that an answer may take.")] = 600.0,
    warm_up: Annotated[int, typer.Option(min=0, metavar="N", help="Requests before, which do not count.")] = 1,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="For HTTP.", show_default="the server's first")
    ] = None,
    lookahead: LookaheadOption = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the sweep.")] = None,
    as_json: JsonOption = False,
    *,
    sampling: dict[str, Any],
) -> None:
    """Put load on a server, and say what its users see.

    The server is Outrider's, or any that has OpenAI's HTTP interface. Time to first token, per token, between chunks
    and to the end; throughput, goodput, tokens per chunk. Made-up prompts are answered with --max-new-tokens tokens,
    all of them where the server knows ignore_eos (give --ignore-eos). Exit codes: 1 some requests have failed; 2
    something was asked for that cannot be; 130 it was interrupted.
    """
    from cluster.cli import bench as benches

    if plot is not None:
        benches.report.check_plot(plot)
    job = benches.Job(
        url=url,
        source=source,
        paces=benches.read_paces(concurrency, request_rate),
        sampling=sampling,
        lookahead={} if lookahead is None else {"enabled": lookahead},
        num_requests=num_requests,
        prompt_tokens=prompt_tokens,
        chat=chat,
        seed=load_seed,
        goals=goodput,
        timeout_s=timeout,
        num_warm_up=warm_up,
        model=model,
    )
    try:
        found = benches.run(job)
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None
    if as_json:
        streams.print_json({"url": url, "loads": [figures.record() for figures in found]})
    else:
        benches.report.show(found, url)
    if plot is not None:
        benches.report.plot(found, plot, "requests per second" if request_rate is not None else "streams")
    if failed := next((figures for figures in found if figures.errors), None):
        print(f"outrider: requests have failed; the first: {failed.first_error}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def train(
    config: Annotated[Path, typer.Option("--config", help="YAML file with the training config.")],
    set_: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in output.directory.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model under the cache policy that will serve it.

    From scratch, or from a checkpoint. What comes out is a directory that `outrider serve --set model.path=...` serves
    under the same policy without being told. Its name goes to standard output, progress to standard error.
    """
    from cluster.cli import training

    training.run(config, set_ or (), resume=resume, as_json=as_json)


@app.command()
def plan(
    config: ConfigOption = None,
    set_: SetOption = None,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure anew what is kept on disk.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a step costs here, the split, and the speed to expect.

    A step's cost is shown by its rows, the split of the workers with its reason. With --set parallel=auto or --set
    model.dtype=auto, all splits or types are compared.
    """
    from cluster.cli import planning

    planning.show(Config.load(config, set_ or ()), remeasure=remeasure, as_json=as_json)


@app.command()
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Only look; skip the self-test.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine has, and try out what is needed of it.

    The exit code is 1 if something failed.
    """
    from cluster.cli import doctor as doctors

    if not doctors.examine(quick=quick, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def demo() -> None:
    """Answer one prompt with lookahead and without.

    Two workers on a local Ray run it, behind a server.
    """
    from cluster.cli import demo as demos

    raise typer.Exit(demos.main())


@app.command()
def version() -> None:
    """Print Outrider's version."""
    from importlib.metadata import version as version_of

    print(version_of("outrider"))


def _backend(
    where: tuple[str | None, Path | None, str | None],
    config: Path | None,
    settings: Sequence[str],
    lookahead: bool | None,
    patience_s: float | None = None,
) -> tuple[Backend, dict[str, dict[str, Any]]]:
    """Where answers come from, and the parameters to send along with every request, by section. `patience_s`: with a
    server that went away."""
    from cluster.client import backends

    address, token_file, tls_ca = where
    if address is None and (token_file or tls_ca):
        option = "--token-file" if token_file else "--tls-ca"
        raise ConfigError(option, str(token_file or tls_ca), "is for a server", "Name one with --address.")
    if address is not None:
        from cluster.client.access import read_token

        overrides = request_overrides(config, settings)
        if lookahead is not None:
            overrides["lookahead"]["enabled"] = lookahead
        token = read_token(token_file) if token_file is not None else None
        return backends.Remote(address, token, tls_ca, patience_s), overrides
    if lookahead is not None:
        settings = [*settings, f"lookahead.enabled={str(lookahead).lower()}"]
    return backends.InProcess(Config.load(config, settings)), {"sampling": {}, "lookahead": {}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit codes: 1 something failed, 2 something was asked for that cannot be."""
    if arguments is not None:
        _run(arguments)
    # As a program of its own, signals and streams are its to handle.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was started is ended
    streams.prepare_output()
    try:
        _run(arguments)
    finally:
        streams.finish_output()


def _run(arguments: Sequence[str] | None) -> NoReturn:
    try:
        app(args=arguments)
    except OutriderError as error:
        print(f"outrider: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, FieldError) else 1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"outrider: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    raise AssertionError("typer exits")


if __name__ == "__main__":
    main()
