"""Checks of the values in a task file; every message names the key."""

import math
import re
from collections.abc import Sequence
from typing import Any

from utils import UserError

Json = Any  # a value of json.loads
# No control characters, and no surrogates, which JSON can contain.
WORD = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+"


def require(condition: object, key: str, message: str) -> None:
    if not condition:
        raise UserError(f'"{key}": {message}')


def require_keys(
    value: object, required: Sequence[str], optional: Sequence[str] = (), inside: str = ""
) -> None:
    """Raise a UserError unless a JSON value is an object with these keys."""
    known = (*required, *optional)
    if not isinstance(value, dict):
        raise UserError(f"{inside}give an object, {{...}}, with the keys {', '.join(known)}")
    unknown = [key for key in value if key not in known]
    missing = [key for key in required if key not in value]
    if unknown:
        raise UserError(f'{inside}unknown key "{unknown[0]}"; known: {", ".join(known)}')
    if missing:
        raise UserError(f'{inside}the key "{missing[0]}" is missing')


def require_one_of(record: dict[str, Json], first: str, second: str) -> None:
    if (first in record) == (second in record):
        reason = "not both" if first in record else "none is there"
        raise UserError(f'give one of the keys "{first}" and "{second}", {reason}')


def matches(pattern: str, word: Json) -> bool:
    return isinstance(word, str) and re.fullmatch(pattern, word) is not None


def are_distinct(words: Json, least: int, most: float = math.inf) -> bool:
    """Return whether a JSON value is a list of `least` to `most` distinct words."""
    if not isinstance(words, list) or not all(matches(WORD, word) for word in words):
        return False
    return least <= len(words) <= most and len(set(words)) == len(words)
