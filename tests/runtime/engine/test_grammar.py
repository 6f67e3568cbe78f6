"""Structured output: every answer is legal, lookahead changes nothing, and no grammar holds anything up."""

from __future__ import annotations

import json
import re
import time

import jsonschema
import pytest

from runtime import Engine, LookaheadConfig, SamplingParams
from runtime.errors import InvalidRequestError
from runtime.request import FinishReason

PLAIN = LookaheadConfig(enabled=False)
SOURCES = ("suffix", "recycle", "grammar")
WIDE = LookaheadConfig(planner=False, sources=SOURCES, row_budget=12)

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8, "pattern": "^[a-z]+$"},
        "kind": {"enum": ["planet", "planetoid", "moon"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 3},
    },
    "required": ["name", "kind", "count", "tags"],
    "additionalProperties": False,
}
FORMS: dict[str, dict] = {
    "json_schema": {"json_schema": SCHEMA},
    "regex": {"regex": r"(yes|no), [0-9]{3}-[a-f]{2,5}!"},
    "choice": {"choice": ("the first", "the second", 'a "third"')},
    "grammar": {"grammar": 'start: item ("," item){2}\nitem: /[A-Z]{2}/ | "(" item ")"'},
}


def check(name: str, text: str) -> None:
    if name == "json_schema":
        jsonschema.validate(json.loads(text), SCHEMA)
    elif name == "regex":
        assert re.fullmatch(FORMS[name]["regex"], text)
    elif name == "choice":
        assert text in FORMS[name]["choice"]
    else:
        assert re.fullmatch(r"\(*[A-Z]{2}\)*(,\(*[A-Z]{2}\)*){2}", text)


@pytest.fixture(scope="module")
def engine(tiny_model):
    config = {"model": {"path": str(tiny_model)}, "scheduler": {"max_sequences": 4, "max_rows": 128}}
    with Engine.from_config(config) as engine:
        yield engine


@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.2, "top_p": 0.8, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", FORMS)
def test_answers_are_legal_and_lookahead_changes_nothing(engine, name, sampled):
    whole = 0
    sampling = SamplingParams(max_new_tokens=150, repetition_penalty=1.1, **FORMS[name], **sampled)
    prompts = [[1, 2, 3] * 4, [200, 100], list(b"abc abc")]
    together = engine.generate(prompts, sampling, WIDE)
    for prompt, other in zip(prompts, together, strict=True):
        one = engine.generate([prompt], sampling, PLAIN)[0]
        assert other.token_ids == one.token_ids and other.finish_reason == one.finish_reason
        if one.finish_reason is FinishReason.STOP:
            check(name, one.text)
            whole += 1
    assert whole >= (1 if name == "grammar" else 3)


def test_forced_tokens_are_accepted_together(engine):
    """The keys of a schema need no decoding: the source named grammar brings them in, and others pay for them."""
    sampling = SamplingParams(max_new_tokens=150, json_schema=json.dumps(SCHEMA), temperature=1.0)
    steps = {}
    for sources in (("suffix",), ("suffix", "grammar")):
        setting = LookaheadConfig(planner=False, sources=sources, row_budget=12, share=False)
        steps[sources] = engine.generate([[5, 6, 7]], sampling, setting)[0].usage
    assert steps["suffix", "grammar"].num_new_tokens == steps[("suffix",)].num_new_tokens
    assert steps["suffix", "grammar"].num_steps < 0.5 * steps[("suffix",)].num_steps


def test_candidates_that_a_grammar_forbids_are_not_run(engine):
    """Every row of a step but the prompt's is legal where it stands."""
    rows = []
    execute = engine.executor.execute
    engine.executor.execute = lambda plan, *rest: (
        rows.append((plan.num_rows, len(plan.masked))),
        execute(plan, *rest),
    )[1]
    try:
        engine.generate([[9] * 5], SamplingParams(max_new_tokens=30, regex="[ab]{20}"), WIDE)
    finally:
        engine.executor.execute = execute
    assert all(masked == count for count, masked in rows[1:]) and max(count for count, _ in rows[1:]) > 2


def test_a_conversation_has_a_form_for_each_turn(engine):
    said = []
    for lookahead in (PLAIN, WIDE):
        session = engine.open_session()
        turns = [{"choice": ("one", "two")}, {}, {"regex": "[0-9]{4}"}]
        said.append(
            [
                engine.tokenizer.decode(
                    [
                        t
                        for o in engine.stream([65, 66], {"max_new_tokens": 9, **turn}, lookahead, session)
                        for t in o.text_ids
                    ]
                )
                for turn in turns
            ]
        )
        engine.close_session(session)
    assert said[0] == said[1] and said[0][0] in ("one", "two") and re.fullmatch(r"\d{4}", said[0][2])


HOSTILE = {
    "recursion": {"grammar": 'start: start start | "a" start | ""'},
    "unknown name": {"grammar": "start: foo"},
    "no start": {"grammar": 'stop: "a"'},
    "nothing": {"grammar": ""},
    "impossible number": {"json_schema": {"type": "integer", "minimum": 5, "maximum": 4}},
    "contradiction": {"json_schema": {"allOf": [{"type": "string"}, {"type": "object"}]}},
    "false": {"json_schema": "false"},
    "no schema": {"json_schema": '{"type": 7}'},
    "no JSON": {"json_schema": "{"},
    "guidance": {"json_schema": {"type": "string", "x-guidance": {"lenient": True}}},
    "remote": {"json_schema": {"$ref": "https://example.org/schema.json"}},
    "loop": {"json_schema": {"$ref": "#"}},
    "exponential": {"regex": "(a|aa)+" * 30 + "b{1,100000}"},
    "states": {"regex": "(.*a.{40}){20}"},
    "repeats": {"regex": "([a-z]*[0-9]){1000,2000}"},
    "bad regex": {"regex": "(a"},
    "huge": {"regex": "a" * 100_000},
    "intersections": {"grammar": "start: /(.*a.{20}.*)&(.*b.{20}.*)&(.*c.{20}.*)/"},
    "products": {
        "json_schema": {
            "allOf": [
                {"anyOf": [{"type": "object", "properties": {f"k{i}{j}": {"type": "string"}}} for j in range(20)]}
                for i in range(6)
            ]
        }
    },
    "many keys": {"json_schema": {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(1500)}}},
    "nesting": {"json_schema": '{"type":"array","items":' * 500 + "{}" + "}" * 500},
    "abyss": {"json_schema": '{"not":' * 9000 + "{}" + "}" * 9000},
    "choices": {"choice": tuple(str(i) * 20 for i in range(2000))},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_or_bounded(engine, name):
    """As many processor seconds as a second allows on a machine that does other work, too; at each step a fraction."""
    engine.make_request([1], {"choice": ("warm",)})
    started = time.thread_time()
    try:
        request = engine.make_request([1, 2], {"max_new_tokens": 12, **HOSTILE[name]})
    except InvalidRequestError as error:
        assert error.field.startswith("sampling.")
        assert time.thread_time() - started < 1.0
        return
    assert time.thread_time() - started < 1.0
    engine.add_request(request)
    while engine.has_work:
        began = time.thread_time()
        outputs = engine.step()
        assert time.thread_time() - began < 0.5
    assert outputs[-1].finish_reason is not None


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"json_object": True, "regex": "a"}, "regex"),
        ({"regex": "a+", "min_new_tokens": 3}, "min_new_tokens"),
        ({"choice": ("a",), "ignore_eos": True}, "ignore_eos"),
        ({"json_schema": 5}, "json_schema"),
    ],
)
def test_contradictions_are_refused_by_name(engine, given, field):
    with pytest.raises(InvalidRequestError, match=field):
        engine.make_request([1], given)
