"""Protocol buffers, as far as ONNX graphs and SentencePiece models need them: fields <-> bytes.

By hand, because neither the package `onnx` nor `sentencepiece` is needed otherwise. Knows no message: numbers of fields
are those of its .proto file.
"""

from __future__ import annotations

from collections.abc import Iterator

Field = tuple[int, bytes | int]  # number and value

_INTEGER, _BYTES = 0, 2  # wire types; of the others only sizes are known
_SIZES = {1: 8, 5: 4}


def fields(message: bytes) -> Iterator[Field]:
    """Number and value of each field: an integer (unsigned, 64 bits), or bytes.

    Raises `IndexError` or `ValueError` if it is no message.
    """
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at) if message[at] > 127 else (message[at], at + 1)  # most have one byte
        number, wire = key >> 3, key & 7
        if wire == _INTEGER:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(message, at) if message[at] > 127 else (message[at], at + 1)
        elif wire in _SIZES:
            size = _SIZES[wire]
        else:
            raise ValueError(f"there is no wire type {wire}")
        if at + size > end:
            raise ValueError("a field ends behind its message")
        yield number, message[at : at + size]
        at += size


def varints(packed: bytes) -> list[int]:
    """Integers that are packed into one field. Raises as `fields` does."""
    found, at = [], 0
    while at < len(packed):
        value, at = _varint(packed, at)
        found.append(value)
    return found


def encode(number: int, value: bytes | int) -> bytes:
    """One field; an integer is not negative."""
    if isinstance(value, int):
        return _encoded(number << 3) + _encoded(value)
    return _encoded(number << 3 | _BYTES) + _encoded(len(value)) + value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number has more than 64 bits")


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
