"""Twenty JSON schemas of the kinds that people ask models to fill in, each with what is asked."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "maxLength": 60}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 100000}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
FLAG: Schema = {"type": "boolean"}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def some(items: Schema, least: int = 1, most: int = 4) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def record(optional: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """An object with these keys and no others; all are required but the optional ones."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


PLACE = record(city=TEXT, country=TEXT)
PERSON = record(name=TEXT, age={"type": "integer", "minimum": 0, "maximum": 130})
STEP = record(title=TEXT, minutes=COUNT)

SCHEMAS: dict[str, tuple[str, Schema]] = {
    "person": ("Invent a person.", PERSON),
    "address": ("Where is the Eiffel Tower?", PLACE),
    "mood": ('What is the mood of "I love this film"?', record(mood=one_of("good", "bad", "neutral"), sure=SHARE)),
    "tags": ("Name tags for an article about the sea.", record(tags=some(TEXT))),
    "recipe": (
        "Describe pancakes.",
        record(name=TEXT, serves=COUNT, ingredients=some(TEXT, 2, 5), steps=some(STEP, 1, 3)),
    ),
    "event": ("Plan a picnic.", record(title=TEXT, place=PLACE, guests=some(PERSON, 1, 2))),
    "product": (
        "Describe a red bicycle.",
        record(name=TEXT, price=COUNT, colour=one_of("red", "green", "blue"), sold=FLAG),
    ),
    "ticket": ("My printer is broken.", record(("notes",), subject=TEXT, urgency=one_of(1, 2, 3), notes=TEXT)),
    "planets": ("Name planets.", some(record(name=TEXT, moons=COUNT), 2, 3)),
    "matrix": ("Give a small matrix.", some(some({"type": "integer", "minimum": -9, "maximum": 9}, 2, 2), 2, 2)),
    "call": ("What is the weather in Rome?", record(name=one_of("weather", "time"), arguments=record(place=TEXT))),
    "either": ("A number or a word?", {"anyOf": [COUNT, one_of("many", "few")]}),
    "empty or text": ("What is missing here?", record(answer={"anyOf": [TEXT, {"type": "null"}]})),
    "date": ("When was the moon landing?", record(date={"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"})),
    "colours": ("Mix two colours.", record(mix=some(one_of("red", "yellow", "blue", "white"), 2, 2), result=TEXT)),
    "quiz": ("Ask a question about Rome.", record(question=TEXT, options=some(TEXT, 3, 3), right=one_of(0, 1, 2))),
    "tree": (
        "Draw a family tree.",
        record(name=TEXT, children=some(record(name=TEXT, children=some(PERSON, 0, 1)), 1, 2)),
    ),
    "settings": ("Set up a quiet phone.", record(("ring",), volume=COUNT, silent=FLAG, ring=TEXT)),
    "review": (
        "Review a sandwich.",
        record(stars={"type": "integer", "minimum": 1, "maximum": 5}, pros=some(TEXT, 1, 2)),
    ),
    "constant": ("Say which version this is.", record(version={"const": "1.0"}, stable=FLAG)),
}
"""By name, the question and the answer's schema."""
