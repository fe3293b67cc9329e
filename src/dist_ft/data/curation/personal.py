"""Finds personal data and secrets in text by patterns and checksums, and replaces them by the names of their kinds.

Owns the patterns, which are built to have few false positives: a card number needs an issuer's prefix, its length and
a Luhn checksum; an IBAN needs its country's length and checksum. Data without a fixed form (names, addresses, national
phone numbers outside North America) is not found.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from dist_ft.records import Record

PersonalKind = Literal["private_key", "api_key", "email", "iban", "card", "phone"]
KINDS: tuple[PersonalKind, ...] = get_args(PersonalKind)
"""All kinds, in the order of the search: if two values overlap, the first kind wins."""
PATTERNS_VERSION = 1
"""Part of the key of redacted data; raise it when a pattern changes."""

_SHOWN = 2
_LONG_ENOUGH = 12


@dataclass(frozen=True)
class Found:
    """A value that was found, and its position in the text."""

    kind: PersonalKind
    start: int
    end: int


def find_personal(text: str, kinds: Collection[PersonalKind] = KINDS) -> list[Found]:
    """Return the values that are found, in order of position and without overlaps."""
    found: list[Found] = []
    is_taken = bytearray(len(text))
    for kind in KINDS:
        for start, end in _FINDERS[kind](text) if kind in kinds else ():
            if not is_taken.count(1, start, end):
                is_taken[start:end] = b"\1" * (end - start)
                found.append(Found(kind, start, end))
    return sorted(found, key=lambda one: one.start)


def mask(kind: PersonalKind, value: str) -> str:
    """Return a masked value: its two ends, only the beginning of a short value, nothing of a private key."""
    if kind == "private_key":
        return "a private key"
    return f"{value[:_SHOWN]}…{value[-_SHOWN:]}" if len(value) >= _LONG_ENOUGH else f"{value[:1]}…"


def redact_text(text: str, kinds: Collection[PersonalKind]) -> str:
    """Return the text with `<EMAIL>`, `<PHONE>` and so on in place of the values that are found."""
    # Removing one value can expose another beside it. Loop until none is found: a second pass changes nothing.
    while found := find_personal(text, kinds):
        parts, end = [], 0
        for one in found:
            parts += [text[end : one.start], f"<{one.kind.upper()}>"]
            end = one.end
        text = "".join([*parts, text[end:]])
    return text


def redact(record: Record, kinds: Collection[PersonalKind]) -> Record:
    """Return the record with its texts redacted; turn, roles and weights stay."""
    return record.map_texts(partial(redact_text, kinds=kinds)) if kinds else record


Spans = Iterator[tuple[int, int]]

_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?P<what>(?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?)-----"
    r"(?P<body>(?:(?!-----BEGIN)[\s\S]){0,16384}?-----END (?P=what)-----|[A-Za-z0-9+/=\s\\]{0,16384})"
)
_BASE64 = re.compile(r"[A-Za-z0-9+/]")
_MIN_KEY_CHARACTERS = 40


def _private_keys(text: str) -> Spans:
    for match in _PRIVATE_KEY.finditer(text) if "PRIVATE KEY" in text else ():
        if len(_BASE64.findall(match["body"].split("-----END", 1)[0])) >= _MIN_KEY_CHARACTERS:  # not only spoken of
            yield match.start(), match.start() + len(match[0].rstrip())


_SECRETS = re.compile(
    r"(?<![A-Za-z0-9_])(?:"
    + "|".join(
        (
            r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])",  # AWS, key id
            r"gh[pousr]_[A-Za-z0-9]{36,255}",  # GitHub
            r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}",
            r"glpat-[A-Za-z0-9_-]{20,64}",  # GitLab
            r"sk-ant-[A-Za-z0-9_-]{20,200}",  # Anthropic
            r"sk-(?:proj|svcacct|admin)-[A-Za-z0-9_-]{20,200}",  # OpenAI
            r"sk-(?=[A-Za-z]{0,60}[0-9])(?=[0-9]{0,60}[A-Za-z])[A-Za-z0-9]{32,64}(?![A-Za-z0-9])",
            r"xox[abeoprs]-[A-Za-z0-9-]{10,250}",  # Slack
            r"xapp-\d-[A-Za-z0-9-]{10,250}",
            r"hf_[A-Za-z0-9]{30,50}(?![A-Za-z0-9])",  # Hugging Face
            r"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])",  # Google
            r"ya29\.[A-Za-z0-9_-]{30,500}",
            r"GOCSPX-[A-Za-z0-9_-]{28}",
            r"(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{16,250}",  # Stripe
            r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}",  # SendGrid
            r"npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])",
            r"pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,500}",
        )
    )
    + r")"
)
_SLACK_HOOK = re.compile(r"hooks\.slack\.com/services/T[A-Z0-9]{8,12}/B[A-Z0-9]{8,12}/[A-Za-z0-9]{20,30}")
_AWS_SECRET = re.compile(
    r"(?i:aws_?secret_?(?:access_?)?key)[\"']?\s{0,3}[=:]\s{0,3}[\"']?(?P<value>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])"
)
_JWT = re.compile(r"(?<![\w-])(?P<head>eyJ[\w-]{8,2000})\.eyJ[\w-]{8,8000}\.[\w-]{16,2000}", re.ASCII)


def _api_keys(text: str) -> Spans:
    for pattern in (_SECRETS, _SLACK_HOOK):
        yield from (match.span() for match in pattern.finditer(text))
    yield from (match.span("value") for match in _AWS_SECRET.finditer(text))
    yield from (match.span() for match in _JWT.finditer(text) if _is_jwt_head(match["head"]))


def _is_jwt_head(head: str) -> bool:
    try:
        return "alg" in json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except (binascii.Error, ValueError, TypeError, RecursionError):
        return False


_EMAIL = re.compile(
    r"(?<![\w.+%-])(?P<user>[A-Za-z0-9][A-Za-z0-9._%+-]{0,63})@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}(?P<top>[A-Za-z]{2,12})(?![\w(\[-])(?!:\S)"
)
_TOP = re.compile(
    "[a-z]{2}|com|org|net|edu|gov|mil|int|info|biz|name|pro|app|dev|xyz|online|site|tech|store|cloud|email|academy|"
    "agency|consulting|digital|engineer|finance|group|health|live|mobi|news|solutions|studio|systems|team|today|work|"
    "world|museum|travel|jobs|coop|aero|shop|blog|page|wiki|design|example|test|invalid",
    re.IGNORECASE,
)
"""Top-level domains: a country's, or one of these. `W@x.shape` is a product of matrices, not an address."""


def _emails(text: str) -> Spans:
    for match in _EMAIL.finditer(text) if "@" in text else ():
        if _TOP.fullmatch(match["top"]) and match["user"].lower() != "git":  # git@host is not a person
            yield match.span()


_IBAN = re.compile(r"(?<![A-Za-z0-9])(?P<country>[A-Z]{2})\d{2}(?: ?[A-Z0-9]){11,30}")
_IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB NI PL SV",
        29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip


def _ibans(text: str) -> Spans:
    for match in _IBAN.finditer(text):
        length = _IBAN_LENGTHS.get(match["country"], 0)
        places = [i for i in range(*match.span()) if text[i] != " "][:length]
        if not length or len(places) < length:
            continue
        end, value = places[-1] + 1, "".join(text[i] for i in places)
        if not text[end : end + 1].isalnum() and _is_iban(value):
            yield match.start(), end


def _is_iban(value: str) -> bool:
    """Check an IBAN by ISO 13616: with its first four characters moved to the end, its remainder mod 97 is 1."""
    return int("".join(str(int(character, 36)) for character in value[4:] + value[:4])) % 97 == 1


_CARD = re.compile(
    r"(?<![\w.-])(?:\d{14,16}|\d{4}(?P<of_four>[ -])\d{4}(?P=of_four)\d{4}(?P=of_four)\d{4}"
    r"|\d{4}(?P<of_three>[ -])\d{6}(?P=of_three)\d{4,5})(?![\w-]|\.\d)",
    re.ASCII,
)
_ISSUERS = re.compile(
    r"4\d{15}|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}"
    r"|(?:6011|65\d\d|64[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}|62\d{14}"
)
"""Visa, Mastercard, American Express, Discover, JCB, Diners Club, UnionPay."""


def _cards(text: str) -> Spans:
    for match in _CARD.finditer(text):
        digits = match[0].replace(" ", "").replace("-", "")
        if _ISSUERS.fullmatch(digits) and _has_luhn_checksum(digits):
            yield match.span()


def _has_luhn_checksum(digits: str) -> bool:
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (doubled + sum(map(int, digits[-1::-2]))) % 10 == 0


_INTERNATIONAL = re.compile(  # not behind a number and a space: that is a sum
    r"(?<![\w+.*/=^)-])(?<![\d)] )\+[1-9]\d{0,2}(?:[ .-]?(?:\(\d{1,5}\)|\d{1,5})){2,6}(?![\w+*/^-]|\.\d)", re.ASCII
)
_AMERICAN = re.compile(
    r"(?<![\w.+/*=-])(?:1[ .-])?(?:\([2-9]\d\d\) ?\d{3}-\d{4}|[2-9]\d\d-\d{3}-\d{4}|[2-9]\d\d\.[2-9]\d\d\.\d{4})"
    r"(?![\w/*=-]|\.\d)",
    re.ASCII,
)
_MIN_DIGITS, _MAX_DIGITS = 10, 15


def _phones(text: str) -> Spans:
    for match in _INTERNATIONAL.finditer(text) if "+" in text else ():
        digits = "".join(filter(str.isdigit, match[0]))
        if _MIN_DIGITS <= len(digits) <= _MAX_DIGITS and (digits[0] != "1" or _is_american(digits)):
            yield match.span()
    yield from (match.span() for match in _AMERICAN.finditer(text))


def _is_american(digits: str) -> bool:
    return len(digits) == 11 and digits[1] not in "01"


_FINDERS: dict[PersonalKind, Callable[[str], Spans]] = {
    "private_key": _private_keys, "api_key": _api_keys, "email": _emails, "iban": _ibans, "card": _cards,
    "phone": _phones,
}  # fmt: skip
