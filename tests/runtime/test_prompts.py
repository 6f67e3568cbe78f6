"""What is handed in as a prompt is taken for what it means, or refused in words that name it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime import Config, Engine, SamplingParams
from runtime.errors import InvalidRequestError
from runtime.prompts import as_messages, as_prompt, as_prompts, as_token_ids, kind_of

IDS = [1, 2, 3]
TALK = [{"role": "user", "content": "Hi"}]

ONE: dict[str, Any] = {
    "a list": IDS,
    "a tuple": (1, 2, 3),
    "a range": range(1, 4),
    "an array": np.array(IDS),
    "an array of bytes": np.array(IDS, np.uint8),
    "numpy's numbers": list(np.array(IDS)),
    "a tensor": torch.tensor(IDS),
    "torch's numbers": list(torch.tensor(IDS)),
    "mixed numbers": [1, np.int32(2), torch.tensor(3)],
}


@pytest.mark.parametrize("name", ONE)
def test_token_ids_of_any_kind_are_pythons_numbers(name: str) -> None:
    value = ONE[name]
    for found in (
        as_prompt(value),
        as_token_ids(value),
        *as_prompts(value),
        *as_prompts([value]),
        as_prompt(iter(value)),
    ):
        assert found == IDS and all(type(number) is int for number in found)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("text", ["text"]),
        (np.str_("text"), ["text"]),
        (TALK, [TALK]),
        (tuple(TALK), [TALK]),
        ([], []),
        ((), []),
        (iter(()), []),
        ([TALK, TALK], [TALK, TALK]),
        (["a", "b"], ["a", "b"]),
        ((text for text in "ab"), ["a", "b"]),
        (["a", IDS, TALK, np.array(IDS)], ["a", IDS, TALK, IDS]),
        (np.array([IDS, IDS]), [IDS, IDS]),
        (torch.tensor([IDS]), [IDS]),
        ([torch.tensor(IDS)], [IDS]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_prompt_or_several(given: Any, meant: list) -> None:
    assert as_prompts(given) == meant


@pytest.mark.parametrize(
    ("given", "field", "named"),
    [
        (None, "prompts", "None"),
        (b"text", "prompts", "Decode"),
        ([b"text"], "prompts[0]", "Decode"),
        (Path("prompt.txt"), "prompts", "is a path"),
        (3, "prompts", "of type int"),
        (np.int64(3), "prompts", "0 dimensions"),
        (TALK[0], "prompts", "into a list"),
        ({"input_ids": IDS}, "prompts", "input_ids"),
        ({1, 2}, "prompts", "of type set"),
        (["a", None], "prompts[1]", "None"),
        (["a", 3], "prompts[1]", "of type int"),
        ([True, False], "token_ids[0]", "of type bool"),
        ([1, 2.0], "token_ids[1]", "of type float"),
        ([1, "2"], "token_ids[1]", "of type str"),
        ([1, None], "token_ids[1]", "of type NoneType"),
        ([[1, b"2"]], "prompts[0][1]", "of type bytes"),
        ([[IDS]], "prompts[0][0]", "of type list"),
        (np.array([1.0]), "token_ids[0]", "of type float"),
        (np.array([True]), "token_ids[0]", "of type bool"),
        ([torch.tensor(True)], "token_ids[0]", "of type Tensor"),
        (torch.zeros(1, 2, 3), "prompts", "3 dimensions"),
    ],
    ids=str,
)
def test_what_is_no_prompt_is_refused_in_words(given: Any, field: str, named: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        as_prompts(given)
    assert caught.value.field == field and named in str(caught.value) and caught.value.remedy


def test_one_prompt_is_not_several() -> None:
    for several in (["a", "b"], [IDS, IDS], torch.tensor([IDS])):
        with pytest.raises(InvalidRequestError):
            as_prompt(several)
    with pytest.raises(InvalidRequestError, match="is a text"):
        as_messages("Hi")
    assert [kind_of(as_prompt(one)) for one in ("a", IDS, TALK)] == ["text", "token_ids", "messages"]


def test_the_engine_takes_them(tiny_model: Path) -> None:
    config = Config.from_dict({"model": {"path": str(tiny_model)}, "lookahead": {"enabled": False}})
    with Engine.from_config(config) as engine:
        plain = engine.generate([IDS], SamplingParams(max_new_tokens=3))[0]
        for sampling in ({"max_new_tokens": 3}, SamplingParams(max_new_tokens=3)):
            for given in (IDS, np.array([IDS]), (IDS for _ in range(1)), [torch.tensor(IDS)]):
                (found,) = engine.generate(given, sampling)
                assert (found.prompt_ids, found.token_ids) == (plain.prompt_ids, plain.token_ids)
            streamed = [token for output in engine.stream(np.array(IDS), sampling) for token in output.token_ids]
            assert tuple(streamed) == plain.token_ids
        assert engine.generate([]) == []
        assert len(engine.generate("one text", {"max_new_tokens": 1})) == 1
        assert len(engine.generate(TALK, {"max_new_tokens": 1}, {"enabled": True, "planner": False})) == 1
        for wrong in (
            {"sampling": 3},
            {"sampling": {"max_tokens": 3}},
            {"sampling": {"top_p": "high"}},
            {"lookahead": True},
            {"lookahead": SamplingParams()},
        ):
            with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
                engine.generate([IDS], **wrong)
        with pytest.raises(InvalidRequestError, match="token id"):
            next(engine.stream([1, 10**9]))
