"""Data sets that are generated in code, so that smoke runs and tests need no download.

Owns the rows of `embedded:NAME`. Reading them as a source, rendering and packing are left to `rows/scan.py` and
whoever calls it.

`orders` teaches a small model a strict output format: a free-text request becomes one line of JSON with the
keys `name, item, count, color, city, priority`. Most values are copied; four need a little thought: `item` is
singular, `count` a number ("a pair of" is 2), `color` is null when any will do, and `priority` follows from
the wording (`normal` when nothing is said):

    Could you ship a pair of red mugs to Oslo for Anna? It can wait, low priority.
    {"name":"Anna","item":"mug","count":2,"color":"red","city":"Oslo","priority":"low"}

`orders-pairs` asks the same and gives two answers: the right one, and one in which one or two values are wrong.
`python-docs` is general text (`python_docs.py`).

Why train and eval cannot overlap: every answer belongs to one split, decided by a residue of its values alone
(`_is_eval_answer`), and a request names all values of its answer, so equal requests have equal answers. Eval
also draws from names and cities that train never sees. Rows depend on the split's seed and on nothing else:
no clock, no environment, no order of a set.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Final

from dist_ft.data.sources.python_docs import passages
from dist_ft.errors import DataError
from dist_ft.records import Message

SYSTEM_MESSAGE: Final = "Turn the request into JSON."

NUM_EVAL_ONLY: Final = 10
"""The last so many names and cities occur in eval only."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# The words of a request. No word is in two lists, no color or item starts with a vowel ("a red mug"), and
# every plural is the item + "s". Nearly all are one or two tokens for SmolLM2 when they follow a quote.
NAMES: Final = _words(
    """
    Anna Ben David Henry Jack Maria Paul Sam Tom Victor Alice Carl George Mark Peter Simon Adam Martin
    Sarah James Robert Daniel Frank Jane Alex Chris Joseph Thomas Andrew Michael William Charles Edward
    Arthur Clara Emma Grace Kate Leo Nina Rosa Eric Hannah Ivan Julia Kevin Omar Ahmed Mei Diego Oscar
    Laura Rachel Lucy Brian Helen Chen Louis Pablo Iris
    """
)
CITIES: Final = _words(
    """
    Paris London Rome Boston Chicago Oxford Cambridge Oslo Berlin Madrid Vienna Athens Moscow Cairo Delhi
    Mumbai Tokyo Seoul Beijing Melbourne Toronto Montreal Denver Seattle Dallas Miami Portland Detroit
    Geneva Milan Venice Naples Lyon Brussels Amsterdam Stockholm Nairobi Lima Perth Auckland Singapore
    Manila Leeds Glasgow Hamburg Copenhagen Istanbul Budapest Edinburgh Cardiff Memphis Cleveland Tampa
    Orlando
    """
)
ITEMS: Final = _words(
    """
    mug chair hat bag phone clock pen plate cup shirt belt wallet table rug ball camera ring folder coat
    sock jar pan pot radio card lamp desk jacket notebook bottle pillow blanket towel bowl basket candle
    backpack kettle mirror vase tent bike helmet speaker keyboard cable charger pencil
    """
)
COLORS: Final = _words("red blue green black white yellow purple gray brown gold pink")

_COUNT_WORDS: Final[Mapping[int, tuple[str, ...]]] = MappingProxyType(
    {
        1: ("a", "one", "1"),
        2: ("two", "2", "a pair of"),
        3: ("three", "3"),
        4: ("four", "4"),
        5: ("five", "5"),
        6: ("six", "6"),
        7: ("seven", "7"),
        8: ("eight", "8"),
        9: ("nine", "9"),
        12: ("twelve", "12", "a dozen"),
    }
)
_PRIORITY_NOTES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "high": ("It's urgent.", "Please hurry.", "High priority.", "As soon as possible."),
        "normal": ("",),
        "low": ("Low priority.", "No rush, low priority.", "This has low priority.", "It can wait, low priority."),
    }
)
_PHRASINGS: Final = (
    "Please send {goods} to {name} in {city}.",
    "{name} from {city} would like {goods}.",
    "I need {goods} for {name} in {city}.",
    "Could you ship {goods} to {city} for {name}?",
    "{goods} for {name}, {city}.",
    "Can {name} get {goods} delivered to {city}?",
    "This is {name} from {city}. I want {goods}.",
    "My name is {name}. Send {goods} to {city}.",
    "Order for {name}: {goods}, to {city}.",
    "We owe {name} {goods}. Ship to {city}.",
    "Deliver to {city}: {goods}. The customer is {name}.",
    "I'd like {goods}, shipped to {city}. {name} here.",
    "Put {name} in {city} down for {goods}.",
    "Our customer {name} ({city}) wants {goods}.",
    "{city} needs {goods}, attention {name}.",
    "Get {name} {goods}. It goes to {city}.",
)
# Noise that says nothing about the answer; the empty ones keep most requests short.
_GREETINGS: Final = ("", "", "", "Hi!", "Hello.", "Good morning.")
_THANKS: Final = ("", "", "", "Thanks!", "Thank you.", "Cheers.")


@dataclass(frozen=True)
class Order:
    """The answer to one request; the order of the fields is the order of the JSON keys."""

    name: str
    item: str
    count: int
    color: str | None
    city: str
    priority: str

    def to_json(self) -> str:
        """Return the strict answer: one line, fixed key order, no spaces, null for no color."""
        return json.dumps(asdict(self), separators=(",", ":"))


@dataclass(frozen=True)
class _Split:
    seed: int
    num_rows: int
    is_eval: bool
    is_of_pairs: bool = False


EMBEDDED: Final[Mapping[str, _Split]] = MappingProxyType(
    {
        "orders/train": _Split(seed=20240, num_rows=2000, is_eval=False),
        "orders/eval": _Split(seed=20241, num_rows=200, is_eval=True),
        "orders-pairs/train": _Split(seed=20242, num_rows=1000, is_eval=False, is_of_pairs=True),
        "orders-pairs/eval": _Split(seed=20243, num_rows=100, is_eval=True, is_of_pairs=True),
    }
)
"""Every embedded data set that is drawn, by name, as written after `embedded:`."""
EMBEDDED_TEXTS: Final[Mapping[str, bool]] = MappingProxyType({"python-docs/train": False, "python-docs/eval": True})
"""Every embedded text by name; whether it is held out."""


def embedded_rows(name: str) -> list[dict[str, str | list[Message]]]:
    """Return the rows of an embedded data set, the same ones in every process.

    Args:
        name: A key of `EMBEDDED` or `EMBEDDED_TEXTS`, without the `embedded:` prefix.

    Returns:
        For each row `{"messages": [system, user, assistant]}`, or of pairs `{"prompt": [system, user], "chosen":
        [assistant], "rejected": [assistant]}`, or `{"text": passage}`; a new list that the caller may change.

    Raises:
        DataError: If there is no data set of that name.
    """
    if name in EMBEDDED_TEXTS:
        return [{"text": passage} for passage in passages(is_eval=EMBEDDED_TEXTS[name])]
    split = EMBEDDED.get(name)
    if split is None:
        raise DataError(
            f"embedded:{name}: no such embedded data set (there are {', '.join([*EMBEDDED, *EMBEDDED_TEXTS])}); "
            "name one of these or the path of a JSONL file"
        )
    rng = random.Random(split.seed)
    make = _pair if split.is_of_pairs else _row
    return [make(rng, _draw_order(rng, split)) for _ in range(split.num_rows)]


def _draw_order(rng: random.Random, split: _Split) -> Order:
    end = None if split.is_eval else -NUM_EVAL_ONLY
    while True:
        order = Order(
            name=rng.choice(NAMES[:end]),
            item=rng.choice(ITEMS),
            count=rng.choice(tuple(_COUNT_WORDS)),
            color=rng.choice(COLORS) if rng.random() < 0.75 else None,
            city=rng.choice(CITIES[:end]),
            priority=rng.choice(tuple(_PRIORITY_NOTES)),
        )
        if _is_eval_answer(order) == split.is_eval:
            return order


def _is_eval_answer(order: Order) -> bool:
    # One answer in ten. It reads the answer only, so the split of an answer never depends on the draw.
    indexes = (NAMES.index(order.name), ITEMS.index(order.item), CITIES.index(order.city))
    return (sum(indexes) + order.count) % 10 == 0


def _row(rng: random.Random, order: Order) -> dict[str, str | list[Message]]:
    return {"messages": _turns(rng, order)}


def _turns(rng: random.Random, order: Order) -> list[Message]:
    return [
        {"role": "system", "content": SYSTEM_MESSAGE},
        {"role": "user", "content": _request(rng, order)},
        {"role": "assistant", "content": order.to_json()},
    ]


def _pair(rng: random.Random, order: Order) -> dict[str, str | list[Message]]:
    *prompt, chosen = _turns(rng, order)
    choices: dict[str, tuple[str | int | None, ...]] = {
        "name": NAMES[:-NUM_EVAL_ONLY], "item": ITEMS, "count": tuple(_COUNT_WORDS), "color": (*COLORS, None),
        "city": CITIES[:-NUM_EVAL_ONLY], "priority": tuple(_PRIORITY_NOTES),
    }  # fmt: skip
    wrong = asdict(order)
    for key in rng.sample(tuple(choices), rng.choice((1, 2))):
        wrong[key] = rng.choice([value for value in choices[key] if value != wrong[key]])
    return {
        "prompt": prompt,
        "chosen": [chosen],
        "rejected": [{"role": "assistant", "content": Order(**wrong).to_json()}],
    }


def _request(rng: random.Random, order: Order) -> str:
    item = order.item if order.count == 1 else f"{order.item}s"
    count = rng.choice(_COUNT_WORDS[order.count])
    goods = f"{count} {order.color} {item}" if order.color else f"{count} {item} in any color"
    phrase = rng.choice(_PHRASINGS).format(goods=goods, name=order.name, city=order.city)
    parts = (
        rng.choice(_GREETINGS),
        phrase[0].upper() + phrase[1:],
        rng.choice(_PRIORITY_NOTES[order.priority]),
        rng.choice(_THANKS),
    )
    return " ".join(part for part in parts if part)
