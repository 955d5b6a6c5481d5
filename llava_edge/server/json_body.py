"""Bytes of a request -> a JSON object, with its depth and number of values bounded before it is parsed."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from llava_edge.server.limits import Limits
from llava_edge.server.problems import Problem, bad


def parse(body: bytes, limits: Limits) -> dict[str, Any]:
    """Parse. Raises `Problem` (400, 413) on anything but one plain JSON object in UTF-8."""
    _check_structure(_without_texts(body, limits), limits)
    try:
        text = body.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_object, parse_float=_number, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise bad("The body is not UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise bad("The body is not valid JSON.") from error
    if not isinstance(value, dict):
        raise bad("The body must be a JSON object.")
    return value


def _without_texts(body: bytes, limits: Limits) -> bytes:
    """What stands outside of quotes. Where a body is no JSON, the parser stops before it means anything else to it.

    Without a regular expression, which takes 50 bytes of memory for each quote that it finds.
    """
    plain = body
    if b"\\" in body:  # pictures have none
        plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if plain.count(b'"') > 2 * limits.structure + 2:  # texts have something between them
        raise _too_large(limits)
    return b"".join(plain.split(b'"')[::2])


def _too_large(limits: Limits) -> Problem:
    return Problem(413, f"The body has more than {limits.structure} bytes of JSON that are not text.")


def _check_structure(structure: bytes, limits: Limits) -> None:
    if len(structure) > limits.structure:
        raise _too_large(limits)
    depth = 0
    for mark in structure:
        depth += (mark in b"[{") - (mark in b"]}")
        if depth > limits.depth:
            raise bad(f"The JSON is nested deeper than {limits.depth} levels.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise bad("The JSON has an object with the same name twice.")
    return found


def _number(text: str) -> float:
    """20.0 as 20, up to JavaScript's safe integers: JSON does not tell them apart, and some programs write it so."""
    number = float(text)
    return int(number) if number.is_integer() and abs(number) < 1 << 53 else number


def _constant(name: str) -> NoReturn:
    raise bad(f"{name} is not JSON.")
