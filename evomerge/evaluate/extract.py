"""What a completion says: the numbers and the JSON object in a text, and when two JSON values are equal.

Imports: nothing of evomerge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

# English number format. A minus or plus is a sign unless it follows a letter or digit ("10-3", "COVID-19");
# a comma groups three digits exactly ("1,234", but "1,23" is 1 and then 23).
_NUMBER = re.compile(
    r"(?P<sign>(?<![0-9A-Za-z])[-+])?[$€£]?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?P<exponent>[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)
_MINUS_SIGNS = str.maketrans({"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-"})


def numbers(text: str) -> Iterator[Decimal]:
    """The numbers in `text`, in order: `1,234`, `-3`, `3.50`, `$5`, `2e3`; a unicode minus counts as one."""
    for match in _NUMBER.finditer(text.translate(_MINUS_SIGNS)):
        sign, digits, exponent = (match[name] or "" for name in ("sign", "digits", "exponent"))
        yield Decimal(sign + digits.replace(",", "") + exponent)


def first_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in `text`, whatever stands around it; None when there is none."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            return dict(decoder.raw_decode(text, match.start())[0])
        except (ValueError, RecursionError):  # not an object from here on
            continue
    return None


def same_json(left: Any, right: Any) -> bool:
    """Equality of JSON values: like Python's, but true is not 1."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_json(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_json, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)
