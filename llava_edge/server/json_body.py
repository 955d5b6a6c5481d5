"""The body of a request -> a JSON object. Depth and number of values are bounded before parsing."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from llava_edge.server.limits import Limits
from llava_edge.server.problems import Problem, bad_request


def parse(body: bytes, limits: Limits) -> dict[str, Any]:
    """Parse a body. Raises `Problem` (400, 413) on anything but one JSON object in UTF-8."""
    _check_structure(_strip_strings(body, limits), limits)
    try:
        text = body.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_unique_names, parse_float=_parse_float, parse_constant=_reject_constant
        )
    except UnicodeDecodeError as error:
        raise bad_request("The body is not UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise bad_request("The body is not valid JSON.") from error
    if not isinstance(value, dict):
        raise bad_request("The body must be a JSON object.")
    return value


def _strip_strings(body: bytes, limits: Limits) -> bytes:
    """Everything outside of quotes. In a body that is not JSON this may differ from the parser's view, but only after
    the point where the parser stops.

    Not by a regular expression, which takes 50 bytes of memory per quote.
    """
    plain = body
    if b"\\" in body:  # base64 has none
        plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if plain.count(b'"') > 2 * limits.structure + 2:  # strings have separators between them
        raise _too_large(limits)
    return b"".join(plain.split(b'"')[::2])


def _too_large(limits: Limits) -> Problem:
    return Problem(413, f"The body has more than {limits.structure} bytes of JSON outside of strings.")


def _check_structure(structure: bytes, limits: Limits) -> None:
    if len(structure) > limits.structure:
        raise _too_large(limits)
    depth = 0
    for byte in structure:
        depth += (byte in b"[{") - (byte in b"]}")
        if depth > limits.depth:
            raise bad_request(f"The JSON is nested deeper than {limits.depth} levels.")


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise bad_request("The JSON has an object with the same name twice.")
    return value


def _parse_float(text: str) -> float:
    """20.0 as the integer 20, up to JavaScript's safe integers: some clients write integers like this."""
    number = float(text)
    if math.isinf(number):
        raise bad_request("The body has a number that is too large; expected at most 1.7e308.")
    return int(number) if number.is_integer() and abs(number) < 1 << 53 else number


def _reject_constant(name: str) -> NoReturn:
    raise bad_request(f"{name} is not valid JSON.")
