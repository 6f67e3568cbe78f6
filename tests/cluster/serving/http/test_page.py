"""The page, in a real browser: it answers, marks what was accepted, compares, shows the mesh, and lets nothing in."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster.serving.http.page import KINDS, STATIC
from runtime.config import Config
from runtime.engine.engine import Engine
from tests.cluster.serving.http import chromium
from tests.cluster.serving.serving import ServerThread, serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

needs_browser = pytest.mark.skipif(chromium.executable() is None, reason="there is no Chromium on this machine")
FIGURES = os.environ.get("OUTRIDER_FIGURES")
"""Where the pictures of docs/http.md are kept, if they are to be made anew: docs/figures."""


# The files


def test_every_file_comes_with_a_strict_policy(http: httpx.Client) -> None:
    names = sorted(path.name for path in STATIC.iterdir())
    assert {Path(name).suffix for name in names} <= set(KINDS)
    for path in ("/", *(f"/page/{name}" for name in names)):
        response = http.get(path)
        policy = response.headers["content-security-policy"]
        assert response.status_code == 200 and response.content
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        again = http.get(path, headers={"if-none-match": response.headers["etag"]})
        assert again.status_code == 304 and not again.content


def test_there_is_no_way_out_of_the_folder(http: httpx.Client) -> None:
    for path in ("/page/../live.py", "/page/%2e%2e%2flive.py", "/page/__init__.py", "/page/static/main.js", "/page/"):
        assert http.get(path).status_code == 404, path


def test_the_files_make_no_markup_of_text_and_need_no_network() -> None:
    for path in STATIC.iterdir():
        text = path.read_text()
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "style="):
            assert word not in text, f"{path.name}: {word}"
        assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg"}, path.name
        if path.suffix == ".html":
            assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|<style", text)
        assert path.stat().st_size < 20_000


def test_live_says_what_the_engine_does(http: httpx.Client, engine: Engine) -> None:
    http.post("/v1/completions", json={"model": "tiny", "prompt": "abc abc abc", "max_tokens": 12})
    now = http.get("/live").json()
    assert now["num_tokens"] == engine.stats.num_tokens and now["num_steps"] <= now["num_rows"]
    assert now["mesh"] == {"lp": 1, "tp": 1, "device": "cpu"} and now["model"]["id"] == "tiny"
    assert now["cache"]["num_slots"] == 64 and {slot["state"] for slot in now["cache"]["slots"]} == {"left"}
    assert set(now["sources"]) == {"jacobi", "suffix", "recycle", "grammar"}
    for counts in now["sources"].values():
        assert 0 <= counts["accepted"] <= counts["proposed"]
    assert "abc" not in json.dumps(now)  # no prompt is shown to whoever looks on


def test_a_chunk_says_where_its_accepted_tokens_came_from(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "ab" * 40, "max_tokens": 16, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    ours = [json.loads(line)["outrider"] for line in lines if json.loads(line)["choices"]]
    assert sum(each["num_tokens"] for each in ours) == 16
    for each in ours:
        assert len(each.get("sources", ())) == each["num_accepted"]


# In a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    with chromium.browser(tmp_path_factory.mktemp("profile")) as tab:
        tab.resize(1180, 860)
        yield tab


@pytest.fixture
def page(tab: chromium.Page, server: ServerThread) -> Iterator[chromium.Page]:
    tab.open("about:blank")
    tab.events.clear()
    tab.open(server.url)
    tab.wait("document.getElementById('model').textContent.includes('tiny')")
    yield tab
    assert tab.problems == []
    assert {url.partition("/")[0] + "//" + url.split("/")[2] for url in tab.requested if url != "about:blank"} == {
        server.url
    }


@needs_browser
def test_a_prompt_is_answered_and_its_runs_are_marked(page: chromium.Page, http: httpx.Client) -> None:
    prompt = "ab" * 40
    page.run("document.getElementById('form').value = 'raw'; document.getElementById('max_tokens').value = '60'")
    page.run(f"document.getElementById('prompt').value = {prompt!r}")
    page.run("document.getElementById('compare').click()")
    page.key("Enter", control=True)
    page.wait("document.getElementById('verdict').textContent")
    assert page.run("document.getElementById('verdict').textContent").startswith("The same tokens")
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": 60}
    (choice,) = http.post("/v1/completions", json=asked).json()["choices"]
    for pane in ("on", "off"):
        assert page.run(f"document.getElementById('answer-{pane}').textContent") == choice["text"]
        assert "tokens/s" in page.run(f"document.querySelector('#pane-{pane} .speed').textContent")
    marked = page.run("[...document.querySelectorAll('#answer-on .run')].map(each => each.title)")
    assert marked and all(re.fullmatch(r"\d+ tokens in one step", title) for title in marked)
    assert page.run("document.querySelectorAll('#answer-off .run').length") == 0
    assert page.run("document.querySelectorAll('#pane-off .chart rect').length") == 60
    assert page.run("document.querySelector('#pane-on .chart').getAttribute('aria-label')").startswith("60 tokens in ")


@needs_browser
def test_what_looks_like_markup_stays_text(page: chromium.Page) -> None:
    attack = "<img src=x onerror='window.hit = 1'><script>window.hit = 1</script>"
    page.run("document.getElementById('form').value = 'raw'")
    page.run(
        f"document.getElementById('prompt').value = {attack!r}; document.getElementById('temperature').value = '99'"
    )
    page.run("document.getElementById('run').click()")
    page.wait("!document.getElementById('stop').disabled || document.getElementById('answer-on').textContent")
    page.wait("document.getElementById('stop').disabled")
    page.run("document.getElementById('temperature').value = ''")
    made = f"({{ make }}) => {{ document.body.append(make('p', {{ id: 'shown' }}, {attack!r})) }}"
    page.run(f"import('/page/dom.js').then({made})")
    assert page.run("document.getElementById('shown').textContent") == attack
    assert page.run("document.querySelectorAll('#shown *').length") == 0
    assert page.run("window.hit") is None


@needs_browser
def test_an_answer_is_stopped_and_an_error_is_shown(page: chromium.Page, engine: Engine) -> None:
    page.run("document.getElementById('form').value = 'raw'; document.getElementById('max_tokens').value = '400'")
    page.key("Enter", control=True)
    page.wait("document.querySelectorAll('#pane-on .chart rect').length > 3")
    page.key("Escape")
    page.wait("document.getElementById('verdict').textContent === 'Stopped.'")
    page.run("document.getElementById('max_tokens').value = '3'; document.getElementById('top_p').value = '7'")
    page.run("document.getElementById('ask').noValidate = true; document.getElementById('run').click()")
    page.wait("!document.getElementById('problem').hidden")
    assert "top_p" in page.run("document.getElementById('problem').textContent")
    page.run("document.getElementById('top_p').value = ''")
    page.events[:] = [event for event in page.events if "400" not in str(event)]  # the browser logs the refusal


@needs_browser
def test_the_keyboard_is_enough(page: chromium.Page) -> None:
    page.run("document.activeElement.blur()")
    focused = "document.activeElement.id"
    page.key("/")
    assert page.run(focused) == "prompt"
    page.key("c")  # typed, no shortcut
    assert not page.run("document.getElementById('compare').checked")
    page.run("document.activeElement.blur()")
    page.key("c")
    assert page.run("document.getElementById('compare').checked && !document.getElementById('pane-off').hidden")
    page.key("2")
    assert page.run("!document.getElementById('mesh').hidden && document.getElementById('playground').hidden")
    page.run("document.getElementById('tab-mesh').focus()")
    page.key("ArrowRight")
    assert page.run(f"{focused} === 'tab-playground' && !document.getElementById('playground').hidden")
    page.run("document.activeElement.blur()")
    page.key("?")
    assert page.run("document.getElementById('help').open")
    page.run("document.getElementById('help').close()")
    before = page.run("document.documentElement.dataset.theme")
    page.key("t")
    assert {before, page.run("document.documentElement.dataset.theme")} == {"light", "dark"}
    page.key("t")


@needs_browser
def test_everything_has_a_name_and_enough_contrast(page: chromium.Page) -> None:
    nameless = """[...document.querySelectorAll('button, input, select, textarea, a')].filter(each =>
        !(each.textContent.trim() || each.getAttribute('aria-label') || each.labels?.length)).map(each => each.id)"""
    assert page.run(nameless) == []
    contrast = """['light', 'dark'].flatMap(theme => {
        document.documentElement.dataset.theme = theme;
        const style = getComputedStyle(document.documentElement);
        const lightness = name => {
            const hex = style.getPropertyValue(name).trim();
            const parts = [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16) / 255)
                .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
            return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
        };
        const pairs = [['--ink', '--back'], ['--quiet', '--back'], ['--quiet', '--card'], ['--run-ink', '--run'],
                       ['--bad', '--bad-back'], ['--on-accent', '--accent']];
        return pairs.map(([a, b]) => [theme, a, b, (Math.max(lightness(a), lightness(b)) + 0.05)
            / (Math.min(lightness(a), lightness(b)) + 0.05)]);
    }).filter(([, , , ratio]) => !(ratio >= 4.5))"""  # WCAG 2, AA
    assert page.run(contrast) == []


@needs_browser
def test_the_mesh_is_shown_live(page: chromium.Page, http: httpx.Client) -> None:
    page.run("document.activeElement.blur()")
    page.key("2")
    page.wait("document.querySelectorAll('#slots .slot').length === 64")
    assert "replica 0, rank 0" in page.run("document.getElementById('workers').textContent")
    assert page.run("document.querySelectorAll('#slots svg rect.left, #slots svg rect.running').length") >= 1
    assert "of 64 in use" in page.run("document.getElementById('slots-note').textContent")
    http.post("/v1/completions", json={"model": "tiny", "prompt": "abc", "max_tokens": 200})
    page.wait("document.querySelectorAll('#phases dd').length >= 5")
    assert page.run("document.querySelectorAll('#sources dt').length") == 4
    page.key("1")


# Pictures


@needs_browser
@pytest.mark.slow
@pytest.mark.skipif(FIGURES is None, reason="set OUTRIDER_FIGURES=docs/figures to make the pictures anew")
def test_pictures_for_the_docs(tab: chromium.Page) -> None:
    settings = ["server.port=0", "model.dtype=bfloat16", "lookahead.planner=false", "lookahead.row_budget=48"]
    settings.append("lookahead.sources=[suffix,recycle]")
    with Engine.from_config(Config.load(None, settings)) as engine, serving(engine, http=True) as server:
        folder = Path(str(FIGURES))
        tab.resize(1180, 900)
        tab.open(server.url)
        tab.wait("document.getElementById('model').textContent.includes('on cpu')")
        tab.run("document.getElementById('max_tokens').value = '80'; document.getElementById('compare').click()")
        tab.key("Enter", control=True)
        tab.wait("document.getElementById('verdict').textContent", 120)
        tab.screenshot(folder / "page.png")
        tab.run("document.activeElement.blur()")
        tab.key("t")
        tab.key("2")
        tab.wait("document.querySelectorAll('#slots .slot').length === 64")
        script = """Array.from({ length: 4 }, (_, index) => {
            const prompt = `A story, number ${index}. `.repeat(4 + 9 * index);
            const body = JSON.stringify({ model: MODEL, prompt, max_tokens: 50 });
            fetch('v1/completions', { method: 'POST', headers: { 'content-type': 'application/json' }, body });
        }), 0"""
        tab.run(script.replace("MODEL", json.dumps(httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"])))
        tab.wait("document.querySelectorAll('#slots rect.running').length >= 4", 60)
        tab.wait("Number(document.querySelector('[data-figure=tokensPerS]').textContent) > 0", 60)
        tab.screenshot(folder / "mesh.png")
        tab.key("t")
