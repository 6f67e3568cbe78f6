"""What the pages say is there: links, files, commands, options, settings, names."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer
import yaml

import outrider
from cluster.cli import reference
from cluster.cli.commands import app
from runtime.config import Config
from runtime.training.config import TrainingConfig

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_README_LINES = 180
KNOWN_FOLDERS = "runtime|cluster|benchmarks|tests|configs|docs|proto"

pytestmark = pytest.mark.filterwarnings("ignore")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    """Code in running text, which may go on in the next line."""
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands(page: Path) -> Iterator[list[str]]:
    """Command lines of blocks and running text, as words."""
    lines = [line for block in blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *spans(page)]:
        for command in re.split(r"&&|\||;", re.sub(r"(^|\s)#.*", "", line)):
            try:
                words = shlex.split(command)
            except ValueError:  # a piece of a quoted text
                continue
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # a variable for the command
                words.pop(0)
            if words:
                yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def options_of(command: object) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}  # type: ignore[attr-defined]


@cache
def outrider_commands() -> dict[str, set[str]]:
    group = typer.main.get_command(app)
    return {name: options_of(command) for name, command in group.commands.items()}  # type: ignore[attr-defined]


@cache
def options_of_benchmark(name: str) -> set[str]:
    single = ROOT / "benchmarks" / f"{name}.py"
    if single.is_file():
        assert "__main__" in single.read_text(), f"python -m benchmarks.{name} does nothing"
        main = importlib.import_module(f"benchmarks.{name}").main
    else:
        started = (ROOT / "benchmarks" / name / "__main__.py").read_text()
        main = getattr(importlib.import_module(re.findall(r"from (\S+) import main", started)[0]), "main")  # noqa: B009
    benchmark = typer.Typer()
    benchmark.command()(main)
    return options_of(typer.main.get_command(benchmark)) | {"--help"}


def test_the_readme_is_a_door():
    assert len(text_of(README).splitlines()) <= MOST_README_LINES


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(place), f"{target}: no such heading"


@each_page
def test_files_that_are_named_exist(page):
    for span in spans(page):
        for path in re.findall(rf"(?<![\w/.~-])(?:{KNOWN_FOLDERS})/[\w./*-]*", span):
            if re.search(r"/[A-Z]+(/|$)", path):  # a name to be filled in
                continue
            assert list(ROOT.glob(path.rstrip("./"))), f"{path} is not there"


@each_page
def test_commands_have_the_options_that_are_shown(page):
    for name, *words in commands(page):
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        if name == "outrider" and words and not words[0].startswith("-"):
            known = outrider_commands()
            assert words[0] in known, f"outrider {words[0]}"
            assert given <= known[words[0]] | {"--help"}, f"outrider {' '.join(words)}"
        elif name == "python" and words[:1] == ["-m"] and words[1].startswith("benchmarks."):
            benchmark = words[1].removeprefix("benchmarks.")
            if benchmark != "NAME":
                assert given - {"-m"} <= options_of_benchmark(benchmark), " ".join(words)
        elif name == "make" and words and re.fullmatch("[a-z]+", words[0]):
            assert re.search(rf"^[a-z ]*\b{words[0]}\b[a-z ]*:", (ROOT / "Makefile").read_text(), re.MULTILINE), words


@each_page
def test_settings_that_are_shown_can_be_set(page):
    for name, *words in commands(page):
        settings = [words[at + 1] for at, word in enumerate(words[:-1]) if word == "--set"]
        if name not in ("outrider", "python") or not settings:
            continue
        config = next((words[at + 1] for at, word in enumerate(words[:-1]) if word == "--config"), None)
        tree = TrainingConfig if words[0] == "train" else Config
        tree.load(ROOT / config if config else None, settings)


@each_page
def test_settings_that_are_named_exist(page):
    trees = (Config, TrainingConfig) if "training" in page.stem else (Config,)
    sections = [(name, reference.section_of(field)) for tree in trees for name, field in tree.model_fields.items()]
    known = {f"{name}.{key}" for name, section in sections if section for key in section.model_fields}
    names = {name for name, _ in sections}
    for section, key in re.findall(rf"(?<![\w./-])({'|'.join(names)})\.(\w+)(?![\w./])", " ".join(spans(page))):
        if f"{section}.{key}" not in ("model.safetensors", "training.json"):  # files
            assert f"{section}.{key}" in known, f"{section}.{key}"


@each_page
def test_python_examples_name_what_there_is(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "outrider":
                assert {alias.name for alias in node.names} <= set(outrider.__all__)


def test_no_sentence_stands_twice():
    seen: dict[str, str] = {}
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
        for sentence in re.split(r"(?<=[.:;])\s|\n\n|\|", prose):
            sentence = " ".join(sentence.split())
            if len(sentence) >= 50 and page.name != "configuration.md":
                assert sentence not in seen, f"{page.name} and {seen[sentence]}: {sentence}"
                seen[sentence] = page.name


def test_the_settings_page_is_what_the_tree_says():
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run `make docs`"
    assert reference.TRAINING_PAGE.read_text(encoding="utf-8") == reference.training_page(), "run `make docs`"


def test_every_setting_says_what_it_is_for():
    for name, field in Config.model_fields.items():
        assert not [key for key, each in field.annotation.model_fields.items() if not each.description], name


def test_hooks_need_no_network():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repo["repo"] for repo in hooks} == {"local"}
    assert all(hook["entry"].startswith(".venv/bin/") for repo in hooks for hook in repo["hooks"])
