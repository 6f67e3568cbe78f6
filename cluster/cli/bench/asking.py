"""What a load test asks: the records of a file, or made-up prompts of given lengths."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

from cluster.cli.batch.records import BadRecord, Input, Record, read_record, unreadable
from runtime.errors import ConfigError, InvalidRequestError

WORDS = (
    "about above after again along always among animal answer around because before began being below better "
    "between black book both bring brother build called came carry change city clear close color could country "
    "course cover cross dark deep different door down early earth enough even every example face family father feel "
    "field figure find first follow food found four friend from garden give good great green ground group hand hard "
    "have head hear help here high hold home horse hour house idea just keep kind know land language large last "
    "late learn leave left letter life light line list little live long look made make many mark mean measure money "
    "morning mother mountain move much music name near need never next night north nothing notice number often open "
    "order other over page paper part pass people perhaps piece place plain plan plant point power problem question "
    "quick reach read ready real river rock room round rule same school science second sentence several ship short "
    "should side simple since sing small snow song soon sound south space spell stand star start state stay step "
    "still stood stop story street strong study such summer table take talk teach tell than their then there these "
    "thing think though thought thousand three through time together took town travel tree true turn under until "
    "usual very voice wait walk want warm watch water week weight well went west wheel where which while white "
    "whole wind winter with without wood word work world would write year young"
).split()
PROBE_WORDS = 16


def from_file(source: Path) -> list[Record]:
    """All records, in the form that `outrider batch` reads. Raises ConfigError, InvalidRequestError."""
    with closing(Input(source)) as lines:
        try:
            records = [read_record(line) for line in lines.lines()]
        except OSError as error:
            raise unreadable(source, error) from error
    found: list[Record] = []
    for record in records:
        if isinstance(record, BadRecord):
            problem = f"record {record.id} is none: {record.error}"
            raise InvalidRequestError("PROMPTS", str(source), problem, "Mend it, or leave it out.")
        found.append(record)
    if not found:
        raise ConfigError("PROMPTS", str(source), "has no records", "Write one a line.")
    return found


def read_lengths(text: str) -> tuple[int, int]:
    """Of N or MIN:MAX. Raises ConfigError."""
    low, _, high = text.partition(":")
    try:
        lengths = int(low), int(high or low)
        if not 1 <= lengths[0] <= lengths[1]:
            raise ValueError
        return lengths
    except ValueError:
        problem, remedy = "is no length", "Write a number of tokens, or MIN:MAX."
        raise ConfigError("--prompt-tokens", text, problem, remedy) from None


async def made_up(
    lengths: tuple[int, int], chat: bool, seed: int, num_tokens: Callable[[Record], Awaitable[int]]
) -> Iterator[Record]:
    """Endless records of random common words, about as long in tokens as `lengths` says, evenly spread between the two.

    How many words that takes is found with the server's own count (`num_tokens`) of two prompts.
    """
    generator = random.Random(seed)

    def prompt(number: int) -> Record:
        text = " ".join(generator.choices(WORDS, k=number))
        return Record(0, [{"role": "user", "content": text}] if chat else text)

    few = await num_tokens(prompt(PROBE_WORDS))
    many_words = max(2 * PROBE_WORDS, round(PROBE_WORDS * lengths[1] / few))
    per_word = (await num_tokens(prompt(many_words)) - few) / (many_words - PROBE_WORDS)
    around = few - PROBE_WORDS * per_word  # what template and special tokens take

    def records() -> Iterator[Record]:
        for _ in count():
            length = generator.randint(*lengths)
            yield prompt(max(1, round((length - around) / per_word)))

    return records()
