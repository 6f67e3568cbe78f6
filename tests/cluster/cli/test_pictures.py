"""An answer as a picture: every token is in it, and it can be read."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from cluster.cli import commands as cli
from cluster.cli.pictures import COLUMNS, Piece, draw
from runtime.request import Usage
from tests.models import save_tiny_model

SVG = "{http://www.w3.org/2000/svg}"
USAGE = Usage(num_new_tokens=6, num_steps=3)


def parse(svg: str) -> tuple[list[str], list[str]]:
    """(lines of text, those of accepted candidates)."""
    root = ElementTree.fromstring(svg)
    texts = [element for element in root.iter(f"{SVG}text") if element.get("class") != "small"]
    return [str(t.text) for t in texts], [str(t.text) for t in texts if t.get("class") == "accepted"]


def bars(svg: str, kind: str) -> int:
    found = [rect for rect in ElementTree.fromstring(svg).iter(f"{SVG}rect") if rect.get("class") == kind]
    return len(found) - 1  # one is the legend's


def test_text_marks_and_bars():
    pieces = [Piece("One", False, 0), Piece(" two three", True, 1), Piece(" four", False, 1), Piece(" five", False, 2)]
    svg = draw("A prompt", pieces, [1, 3, 1], USAGE)
    texts, accepted = parse(svg)
    assert "".join(texts) == "> A promptOne two three four five" and accepted == [" two three"]
    assert bars(svg, "own") == 3 and bars(svg, "bar") == 1
    assert "6 tokens in 3 steps: 2.00 tokens per step" in svg


@pytest.mark.parametrize(
    "text",
    ['<b> & "quotes" ]]>', "\x00\x1b[31m\ud800 \uffff", "日本語のテキスト" * 20, "x" * 500, "", "\n\n\n", "a\tb\r\nc"],
)
def test_whatever_the_answer_is_the_picture_is_xml_within_its_width(text):
    svg = draw(text, [Piece(text, True, 0)], [1], USAGE)
    svg.encode("utf-8")
    root = ElementTree.fromstring(svg)
    for element in root.iter(f"{SVG}text"):
        if element.get("textLength"):
            assert float(element.attrib["x"]) + float(element.attrib["textLength"]) <= float(root.attrib["width"])


def test_long_lines_break_between_words():
    words = "word " * 60
    texts, _ = parse(draw("p", [Piece(words, False, 0)], [60], USAGE))
    assert all(len(text) <= COLUMNS for text in texts) and " ".join(texts[1:]).split() == words.split()
    assert not any(text.startswith("ord") for text in texts)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_generate_draws_what_it_prints(model, tmp_path, capsys):
    target = tmp_path / "answer.svg"
    arguments = ["generate", "--raw", "abc", "--set", f"model.path={model}", "--max-new-tokens", "12", "--ignore-eos"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--picture", str(target)])
    assert not ended.value.code
    texts, _ = parse(target.read_text(encoding="utf-8"))
    assert texts[0] == "> abc" and "12 tokens in" in target.read_text(encoding="utf-8")
    assert "".join("".join(texts[1:]).split()) == "".join(_shown(capsys.readouterr().out).split())


def _shown(text: str) -> str:
    return "".join(char if char.isprintable() or char.isspace() else "\N{MIDDLE DOT}" for char in text)


@pytest.mark.parametrize(
    "more", [("answer.png",), ("missing/answer.svg",), ("answer.svg", "--address", "localhost:1")], ids=str
)
def test_a_picture_that_cannot_be_is_refused_at_once(more, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "hi", "--picture", str(tmp_path / more[0]), *more[1:]])
    assert ended.value.code == 2 and "--picture" in capsys.readouterr().err
