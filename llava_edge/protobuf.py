"""Minimal protobuf wire format for ONNX graphs and SentencePiece models: fields <-> bytes.

Saves depending on `onnx` and `sentencepiece` at run time. Knows no message types: field numbers come from .proto files.
"""

from __future__ import annotations

from collections.abc import Iterator

Field = tuple[int, bytes | int]  # number and value

_INTEGER, _BYTES = 0, 2  # wire types
_SIZES = {1: 8, 5: 4}  # bytes of the fixed-size wire types


def fields(message: bytes) -> Iterator[Field]:
    """Number and value of each field: an integer (unsigned, 64 bits), or bytes.

    Raises `IndexError` or `ValueError` if `message` is malformed.
    """
    position, end = 0, len(message)
    while position < end:
        key, position = (
            _decode_varint(message, position) if message[position] > 127 else (message[position], position + 1)
        )  # most have one byte
        number, wire = key >> 3, key & 7
        if wire == _INTEGER:
            value, position = _decode_varint(message, position)
            yield number, value
            continue
        if wire == _BYTES:
            size, position = (
                _decode_varint(message, position) if message[position] > 127 else (message[position], position + 1)
            )
        elif wire in _SIZES:
            size = _SIZES[wire]
        else:
            raise ValueError(f"there is no wire type {wire}")
        if position + size > end:
            raise ValueError("a field extends beyond its message")
        yield number, message[position : position + size]
        position += size


def varints(packed: bytes) -> list[int]:
    """Decode a packed field of integers. Raises as `fields` does."""
    values, position = [], 0
    while position < len(packed):
        value, position = _decode_varint(packed, position)
        values.append(value)
    return values


def encode(number: int, value: bytes | int) -> bytes:
    """Encode one field; integers must not be negative."""
    if isinstance(value, int):
        return _encode_varint(number << 3) + _encode_varint(value)
    return _encode_varint(number << 3 | _BYTES) + _encode_varint(len(value)) + value


def _decode_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 127) << shift
        shift, position = shift + 7, position + 1
        if byte < 128:
            return value, position
        if shift > 63:
            raise ValueError("a number has more than 64 bits")


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
