"""GSM8K as 8-shot chain of thought: the prompt, the answer that is scored, and the number read out of a text.

The layout is that of lm-evaluation-harness' task `gsm8k_cot`: "Q: ...\\nA: ..." blocks that end in "The answer is N.".
Records keep GSM8K's own reasoning lines; its calculator annotations (<<48/2=24>>) are taken out and its last line
("#### 24") becomes "The answer is 24.", so that the model reads and is scored on plain text only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ANNOTATION = re.compile(r"<<.*?>>")
STRICT = re.compile(r"The answer is \$?(-?[0-9.,]+)")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
"""lm-evaluation-harness' filter `flexible-extract`; the last match counts."""


@dataclass(frozen=True)
class Problem:
    """A question, its reasoning in plain text, and the number that answers it."""

    question: str
    reasoning: str
    number: str

    @classmethod
    def parse(cls, line: str) -> Problem:
        """Read one JSON line {"question", "answer"}. Raises ValueError where that is not what it is."""
        record = json.loads(line)
        reasoning, mark, number = record["answer"].partition("####")
        if not mark:
            raise ValueError(f'an answer without "####": {record["answer"][-60:]!r}')
        return cls(record["question"].strip(), ANNOTATION.sub("", reasoning).strip(), normalise(number))

    @property
    def answer(self) -> str:
        """What follows "A:"."""
        return f" {self.reasoning}\nThe answer is {self.number}."


def read_problems(path: Path, limit: int | None = None) -> list[Problem]:
    """The problems of a JSON-lines file, or its first `limit`."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Problem.parse(line) for line in lines[:limit]]


def prompt(shots: Sequence[Problem], problem: Problem) -> str:
    """The solved `shots`, then the question with its answer left open."""
    solved = "".join(f"Q: {shot.question}\nA:{shot.answer}\n\n" for shot in shots)
    return f"{solved}Q: {problem.question}\nA:"


def tokenise(
    encode: Callable[..., Sequence[int]], shots: Sequence[Problem], problem: Problem
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the reference answer, each encoded by itself; `encode` is a Tokenizer's."""
    return list(encode(prompt(shots, problem))), list(encode(problem.answer, add_special_tokens=False))


def normalise(number: str) -> str:
    """A number without thousands separators, dollar signs and a closing full stop."""
    return number.strip().replace(",", "").replace("$", "").removesuffix(".")


def finished(text: str) -> bool:
    """Whether a generated answer has given its number, or has gone on to a question of its own."""
    return "Q:" in text or re.search(r"The answer is \$?-?[0-9.,]*[0-9]\.?[^0-9.,]", text) is not None


def strict_answer(text: str) -> str | None:
    """The number after the first "The answer is", if there is one."""
    found = STRICT.search(_own(text))
    return normalise(found[1]) if found else None


def flexible_answer(text: str) -> str | None:
    """The last number of the answer, however it is introduced."""
    found = FLEXIBLE.findall(_own(text))
    return normalise(found[-1]) if found else None


def _own(text: str) -> str:
    """The answer up to the next question, where the model goes on to make one up."""
    return text.partition("Q:")[0]
