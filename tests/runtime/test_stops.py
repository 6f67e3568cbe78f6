"""Stop strings: found wherever they are complete first, and nothing shown that may become one."""

from __future__ import annotations

import random

import pytest

from runtime.stops import StopStrings


def shown_of(text: str, stops: list[str], cuts: list[int], include: bool = False) -> tuple[str, bool]:
    """What is shown of a text that comes in pieces, and whether it ended with a stop string."""
    search, shown = StopStrings(stops), ""
    for piece in (text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)):
        if search.find(piece):
            return shown + search.cut(piece, include), True
        shown += search.push(piece)
        held = text[len(shown) :]
        assert not any(stop in shown for stop in stops)
        assert text.startswith(shown) and all(len(held) or True for _ in stops)
    return shown + search.flush(), False


def first_end(text: str, stops: list[str]) -> tuple[int, int] | None:
    """(start, end) by looking at every beginning of the text."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts), end
    return None


@pytest.mark.parametrize("include", [False, True])
def test_single_characters_and_any_other_pieces_show_the_same(include):
    generator = random.Random(0)
    found = 0
    for _ in range(3000):
        text = "".join(generator.choices("ab", k=generator.randint(0, 12)))
        stops = ["".join(generator.choices("ab", k=generator.randint(1, 5))) for _ in range(generator.randint(1, 3))]
        one_by_one, ended = shown_of(text, stops, list(range(1, len(text))), include)
        end = first_end(text, stops)
        assert ended == (end is not None)
        assert one_by_one == (text if end is None else text[: end[1] if include else end[0]])
        found += ended
        # A longer piece may bring several stop strings: the one that is complete first counts.
        cuts = sorted(generator.sample(range(1, len(text)), min(3, len(text) - 1))) if len(text) > 1 else []
        assert shown_of(text, stops, cuts, include) == (one_by_one, ended)
    assert found > 500


def test_text_is_held_back_no_longer_than_it_may_become_a_stop_string():
    search = StopStrings(["\n\nUser:", "END"])
    pieces = ["Hello", "\n", "\nUs", "age", " EN", "E", "EN", "x"]
    assert [search.push(piece) for piece in pieces] == ["Hello", "", "", "\n\nUsage", " ", "EN", "E", "ENx"]
