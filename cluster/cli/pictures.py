"""An answer as a picture: its text with the accepted tokens marked, and below it what each step gave.

SVG, written by hand: it has no fonts to ship, and its colours follow the reader's light or dark scheme.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from rich.cells import cell_len

from cluster.cli import terminal
from cluster.wire.answers import Chunk
from runtime.errors import ConfigError
from runtime.request import Usage

if TYPE_CHECKING:
    from runtime.tokenizer import Tokenizer

COLUMNS = 84
"""Characters of a line."""
CHAR, LINE, SIZE = 8.4, 23.0, 14.0
"""Width of a character, height of a line and size of the font, in pixels. Each run of text is stretched to its width,
so that the marks stand where they should in any reader's font."""
MARGIN, RADIUS = 26.0, 10.0
BARS = 54.0
"""Height of the chart, pixels."""
WIDTH = 2 * MARGIN + COLUMNS * CHAR
FONT = "ui-monospace, SFMono-Regular, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"

STYLE = f"""\
text {{ font: {SIZE:g}px {FONT}; white-space: pre; fill: #1f2328 }}
.card {{ fill: #ffffff; stroke: #d1d9e0 }}
.quiet, .small {{ fill: #59636e }}
.small {{ font-size: 12px }}
.own {{ fill: #b6bfc9 }}
.mark {{ fill: #c9f2d5 }}
.bar {{ fill: #2da44e }}
.accepted {{ fill: #0b5a26; font-weight: 600 }}
@media (prefers-color-scheme: dark) {{
  text {{ fill: #d1d7e0 }}
  .card {{ fill: #0d1117; stroke: #3d444d }}
  .quiet, .small {{ fill: #9198a1 }}
  .own {{ fill: #545d68 }}
  .mark {{ fill: #12361f }}
  .bar {{ fill: #3fb950 }}
  .accepted {{ fill: #7ee29a }}
}}"""


@dataclass(frozen=True)
class Piece:
    """Text of one step: its accepted candidates', or its own token's."""

    text: str
    accepted: bool
    step: int


@dataclass(frozen=True)
class _Cell:
    char: str
    accepted: bool
    step: int


def check(path: Path, address: str | None) -> None:
    """Raise ConfigError where no picture can be drawn: that should not wait for the answer."""
    if address is not None:
        problem = "needs the model's tokenizer, to tell which text was accepted, and a server does not send it"
        raise ConfigError("--picture", str(path), problem, "Leave out --address.")
    if path.suffix.lower() != ".svg":
        raise ConfigError("--picture", str(path), "is not the name of an SVG file", "Let it end in .svg.")
    if not path.absolute().parent.is_dir():
        raise ConfigError("--picture", str(path), "its folder does not exist", "Create it first.")


def save(path: Path, prompt: str, chunks: Sequence[Chunk], tokenizer: Tokenizer) -> None:
    """Draw an answer into a file. Raises ConfigError where it cannot be written."""
    usage = chunks[-1].usage
    assert usage is not None
    texts = terminal.StepText(tokenizer)
    pieces = [Piece(*split, step) for step, chunk in enumerate(chunks) for split in texts.split(chunk)]
    run_lengths = [len(chunk.token_ids) for chunk in chunks if chunk.token_ids]
    try:
        path.write_text(draw(prompt, pieces, run_lengths, usage), encoding="utf-8")
    except OSError as error:
        problem = error.strerror or "cannot be written"
        raise ConfigError("--picture", str(path), problem, "Name another file.") from error


def draw(prompt: str, pieces: Sequence[Piece], run_lengths: Sequence[int], usage: Usage) -> str:
    """The SVG. `run_lengths` has the tokens of each step that gave some."""
    shapes: list[str] = []
    y = MARGIN + SIZE
    for line in _lines([_Cell(char, False, 0) for char in _printable(f"> {prompt.strip()}")]):
        shapes.append(_text(MARGIN, y, "".join(cell.char for cell in line), "quiet"))
        y += LINE
    y += LINE / 2
    cells = [_Cell(char, piece.accepted, piece.step) for piece in pieces for char in _printable(piece.text)]
    for line in _lines(_stripped(cells)):
        shapes += _marked(line, y)
        y += LINE
    y += LINE / 4
    shapes += _chart(run_lengths, y)
    y += BARS + LINE
    shapes += _legend(usage, y)
    height = y + MARGIN - SIZE / 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img">\n<title>An answer; the tokens that lookahead accepted '
        f"in parallel are marked</title>\n<style>\n{STYLE}\n</style>\n"
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1:.0f}" height="{height - 1:.0f}" rx="{RADIUS:g}"/>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )


def _marked(line: Sequence[_Cell], y: float) -> list[str]:
    """One line: a mark behind each step's accepted run, then the text."""
    marks, texts, x = [], [], MARGIN
    for (_, accepted), run in groupby(line, key=lambda cell: (cell.step, cell.accepted)):
        text = "".join(cell.char for cell in run)
        if accepted and text.strip():
            begin = x + _width(text) - _width(text.lstrip()) - 2
            box = (
                f'x="{begin:.1f}" y="{y - SIZE - 1.5:.1f}" width="{_width(text.strip()) + 4:.1f}" height="{LINE - 3:g}"'
            )
            marks.append(f'<rect class="mark" {box} rx="4"/>')
        texts.append(_text(x, y, text, "accepted" if accepted else ""))
        x += _width(text)
    return marks + texts


def _chart(run_lengths: Sequence[int], y: float) -> list[str]:
    """One bar a step: its own token below, the accepted ones on top of it."""
    shapes = []
    pitch = min(14.0, COLUMNS * CHAR / max(len(run_lengths), 1))
    unit = BARS / max(*run_lengths, 4, 4)
    for step, length in enumerate(run_lengths):
        x, wide = MARGIN + step * pitch, max(pitch * 0.72, 0.5)
        for kind, bottom, tokens in (("own", 0, 1), ("bar", 1, length - 1)):
            top = y + BARS - (bottom + tokens) * unit
            if tokens > 0:
                box = f'x="{x:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{max(tokens * unit - 1, 1):.1f}"'
                shapes.append(f'<rect class="{kind}" {box} rx="1.5"/>')
    return shapes


def _legend(usage: Usage, y: float) -> list[str]:
    accepted, own = "accepted in parallel", "one token of each step"
    figures = f"{usage.num_new_tokens} tokens in {usage.num_steps} steps: {usage.tokens_per_step:.2f} tokens per step"
    x = MARGIN
    shapes = []
    for kind, words in (("bar", accepted), ("own", own)):
        shapes.append(f'<rect class="{kind}" x="{x:.1f}" y="{y - 10:.1f}" width="11" height="11" rx="2"/>')
        shapes.append(f'<text class="small" x="{x + 18:.1f}" y="{y:.1f}">{words}</text>')
        x += 18 + len(words) * 7.3 + 22
    shapes.append(f'<text class="small" x="{WIDTH - MARGIN:.1f}" y="{y:.1f}" text-anchor="end">{figures}</text>')
    return shapes


def _text(x: float, y: float, text: str, kind: str) -> str:
    if not text.strip():
        return ""
    named = f' class="{kind}"' if kind else ""
    stretched = f'textLength="{_width(text):.1f}" lengthAdjust="spacingAndGlyphs"'
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" {stretched} xml:space="preserve">{escape(text)}</text>'


def _width(text: str) -> float:
    return cell_len(text) * CHAR


def _printable(text: str) -> str:
    """What XML may hold and a line can show."""
    kept = text.replace("\r\n", "\n").replace("\t", "    ")
    shown = (c == "\n" or unicodedata.category(c) not in ("Cc", "Cs", "Cn") for c in kept)
    return "".join(c if fine else "\N{MIDDLE DOT}" for c, fine in zip(kept, shown, strict=True))


def _stripped(cells: list[_Cell]) -> list[_Cell]:
    """Without white space at either end."""
    blank = [index for index, cell in enumerate(cells) if not cell.char.isspace()]
    return cells[blank[0] : blank[-1] + 1] if blank else []


def _lines(cells: Sequence[_Cell]) -> list[list[_Cell]]:
    """Broken at newlines, and between words where a line is full."""
    lines: list[list[_Cell]] = [[]]
    for cell in cells:
        if cell.char == "\n":
            lines.append([])
            continue
        lines[-1].append(cell)
        line = lines[-1]
        if cell_len("".join(each.char for each in line)) <= COLUMNS:
            continue
        blanks = [index for index, each in enumerate(line) if each.char == " " and index < len(line) - 1]
        at = blanks[-1] + 1 if blanks else len(line) - 1
        if not cell.char.isspace():
            lines.append(line[at:])
            del line[at:]
    for line in lines:
        while line and line[-1].char.isspace():
            line.pop()
    return lines
