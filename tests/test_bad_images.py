"""Everything that is not an acceptable picture gets one sentence and its exit code: never a traceback, a hang, a
huge allocation or half a picture.
"""

from __future__ import annotations

import io
import os
import random
import socket
import sys
import textwrap
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from images import HEIC, bmp_header, encode, exif, jpeg_sized, picture, png_file, smooth, webp_canvas
from PIL import Image
from processes import in_child

from llava_edge import image as image_module
from llava_edge.errors import ImageError, LlavaEdgeError, MissingError
from llava_edge.image import MAX_BYTES, load_image, square_and_resize

PICTURE = picture(48, 40)
JPEG = encode(PICTURE, "JPEG")
JPEG_PROGRESSIVE = encode(PICTURE, "JPEG", progressive=True)
PNG = encode(PICTURE, "PNG")
GIF = encode(PICTURE, "GIF")
BMP = encode(PICTURE, "BMP")
WEBP = encode(PICTURE, "WEBP", lossless=True)
THUMBNAIL = b"\xff\xe1\x00\x10" + b"\xff\xd8\xff\xda....\xff\xd9...."  # a segment with markers of its own


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def text_mode(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@cache
def packed_zeros() -> bytes:
    """64 MiB of them, in zlib's format."""
    return zlib.compress(bytes(64 << 20))


def zlib_bomb(kind: bytes) -> bytes:
    """A PNG with a small text or profile chunk that grows to 64 MiB."""
    head = {b"zTXt": b"Comment\0\0", b"iCCP": b"profile\0\0", b"iTXt": b"Comment\0\1\0\0\0"}[kind]
    return png_file(8, 8, raw=bytes(25 * 8), chunks=((kind, head + packed_zeros()),))


MISLABELLED = {  # content -> a word the sentence must have
    "empty": (b"", "is empty"),
    "zero bytes": (bytes(5000), "5000 zero bytes"),
    "plain text": (b"a picture of a cat\n", "is not a picture"),
    "random bytes": (random.Random(1).randbytes(5000), "is not a picture"),
    "one byte": (b"\xff", "is not a picture"),
    "json": (b'{"image": "cat.jpg"}', "is not a picture"),
    "python": (b"import os\n", "is not a picture"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "svg after a prolog": (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- x -->\n<svg/>', "SVG"),
    "html": (b"<!DOCTYPE html><html><body>404", "web page"),
    "html, indented": (b"\n\n  <HTML>", "web page"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "data url": (b"data:image/png;base64,iVBORw0KGgo=", "data: URL"),
    "base64": (b"iVBORw0KGgoAAAANSUhEUgAA", "is base64 text; pass what base64.b64decode"),
    "zip": (b"PK\x03\x04" + bytes(40), "ZIP"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(20), "gzip"),
    "7z": (b"7z\xbc\xaf\x27\x1c", "7-Zip"),
    "pdf": (encode(PICTURE, "PDF"), "PDF"),
    "postscript": (encode(PICTURE, "EPS"), "PostScript"),
    "tiff": (encode(PICTURE, "TIFF"), "TIFF"),
    "tiff, big endian": (b"MM\0*" + bytes(20), "TIFF"),
    "psd": (b"8BPS\0\1" + bytes(30), "Photoshop"),
    "heic": (HEIC, "HEIC"),
    "heic, and what is read": (HEIC, "llava-edge reads JPEG, PNG, WebP, GIF and BMP"),
    "heic, and its converter": (HEIC, "heif-convert photo.heic photo.jpg"),
    "avif": (encode(PICTURE, "AVIF"), "AVIF"),
    "jpeg 2000": (encode(PICTURE, "JPEG2000"), "JPEG 2000"),
    "jpeg xl": (b"\xff\x0a\x7a\x1f", "JPEG XL"),
    "icon": (encode(PICTURE, "ICO"), "icon"),
    "ppm": (encode(PICTURE, "PPM"), "PPM"),
    "qoi": (encode(PICTURE, "QOI"), "QOI"),
    "dds": (encode(PICTURE, "DDS"), "DDS"),
    "fits": (b"SIMPLE  =                    T", "FITS"),
    "dicom": (bytes(128) + b"DICM", "DICOM"),
    "mp4": (b"\0\0\0\x18ftypisom\0\0\2\0", "video"),
    "webm": (b"\x1aE\xdf\xa3\x01", "video"),
    "avi": (b"RIFF\0\0\0\0AVI LIST", "video"),
    "gguf": (b"GGUF\3\0\0\0", "GGUF model"),
}

DAMAGED = {
    "jpeg cut in half": half(JPEG),
    "jpeg, progressive, cut in half": half(JPEG_PROGRESSIVE),
    "jpeg with the rest zero": half(JPEG) + bytes(len(JPEG) // 2),
    "jpeg with a thumbnail, the rest zero": JPEG[:2] + THUMBNAIL + half(JPEG)[2:] + bytes(len(JPEG) // 2),
    "jpeg without its end marker": JPEG[:-2],
    "jpeg start only": JPEG[:4],
    "jpeg of 65500 zeros": b"\xff\xd8\xff" + bytes(65_500),
    "png cut in half": half(PNG),
    "png signature only": PNG[:8],
    "png without its last chunk": PNG[:-12],
    "png with a flipped pixel bit": flipped(PNG, len(PNG) // 2),
    "png with a flipped header bit": flipped(PNG, 20),
    "png through a text mode transfer": text_mode(PNG),
    "png without pixels": PNG[:33] + PNG[-12:],
    "png zero pixels wide": png_file(0, 40),
    "png of 3 bits a sample": png_file(8, 8, bits=3, raw=bytes(999)),
    "gif cut in half": half(GIF),
    "gif without frames": GIF[:13] + b"\x3b",
    "bmp cut in half": half(BMP),
    "bmp header only": bmp_header(40, 40),
    "bmp two letters": b"BM",
    "webp cut in half": half(WEBP),
    "webp header only": WEBP[:20],
    "webp with zeros for a header": WEBP[:12] + bytes(len(WEBP) - 12),
    "gif with the rest zero": half(GIF) + bytes(len(GIF) // 2),
}

TOO_LARGE = {
    "png of 1.6 gigapixels": png_file(40_000, 40_000),
    "png just above the limit": png_file(8193, 8192),
    "png of 100 megapixels": png_file(10_000, 10_000),
    "png strip": png_file(1, 60_000),
    "gif of 4 gigapixels": GIF[:6] + b"\xff\xff\xff\xff" + GIF[10:],
    "bmp of 2 gigapixels": bmp_header(50_000, 45_000),
    "jpeg of 4 gigapixels": jpeg_sized(65_500, 65_500),
}
if int(PIL.__version__.split(".")[0]) >= 13:  # before, it was called damaged
    TOO_LARGE["webp of 268 megapixels"] = webp_canvas(16_384, 16_384)


def check(error: LlavaEdgeError, name: str, word: str = "") -> None:
    """One printable sentence that says which picture and what is wrong."""
    message = str(error)
    rest = message.replace(name, "")
    assert name in message
    assert word in message
    assert message.isprintable(), "one line, nothing a terminal would act upon"
    assert message.endswith(".")
    assert ". " not in rest, "one sentence"
    assert "0x" not in rest, "no addresses"
    assert len(rest) < 200


def refused(data: bytes, folder: Path, word: str = "") -> None:
    path = folder / "holiday photo.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        load_image(path)
    check(caught.value, str(path), word)
    assert caught.value.exit_code == 65
    with pytest.raises(ImageError) as caught:
        load_image(data)
    check(caught.value, "The picture", word)


@pytest.mark.parametrize(("data", "word"), MISLABELLED.values(), ids=MISLABELLED)
def test_other_content(data: bytes, word: str, tmp_path: Path) -> None:
    refused(data, tmp_path, word)


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damaged(data: bytes, tmp_path: Path) -> None:
    refused(data, tmp_path)


@pytest.mark.parametrize("data", TOO_LARGE.values(), ids=TOO_LARGE)
def test_too_large(data: bytes, tmp_path: Path) -> None:
    refused(data, tmp_path, "pixels")


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_growing_chunks(kind: bytes, tmp_path: Path) -> None:
    data = zlib_bomb(kind)
    assert len(data) < 100_000
    refused(data, tmp_path)


def missing(folder: Path) -> Iterator[tuple[str, str | Path, str]]:
    """(what, path, a word of the sentence) for everything that has no bytes to read."""
    yield "missing", folder / "cat.jpg", "does not exist"
    yield "missing folder", folder / "no" / "cat.jpg", "does not exist"
    yield "folder", folder, "folder"
    yield "web address", "https://example.org/cat.jpg", "download"
    yield "long web address", "https://example.org/" + "x" * 260, "download"
    (folder / "file").write_bytes(JPEG)
    yield "below a file", folder / "file" / "cat.jpg", "does not exist"
    (folder / "dangling").symlink_to(folder / "nowhere")
    yield "broken link", folder / "dangling", "does not exist"
    (folder / "loop").symlink_to(folder / "loop")
    yield "link to itself", folder / "loop", "cannot be read"
    os.mkfifo(folder / "pipe")
    yield "pipe nobody writes to", folder / "pipe", "pipe or device"
    yield "device without end", "/dev/zero", "pipe or device"
    yield "null device", "/dev/null", "pipe or device"
    yield "name too long", "x" * 300, "cannot be read"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices of POSIX")
def test_nothing_to_read(tmp_path: Path) -> None:
    for what, path, word in missing(tmp_path):
        with pytest.raises(MissingError) as caught:
            load_image(path)
        check(caught.value, str(path), word)
        assert caught.value.exit_code == 66, what


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_no_folder(path: str) -> None:
    with pytest.raises(MissingError, match=f"^A picture is given as '{path}'; expected the path of a picture.$"):
        load_image(path)


@pytest.mark.parametrize("length", [1, 99])
def test_a_data_url_is_no_file(length: int) -> None:
    with pytest.raises(MissingError, match=r"^data:image/jpeg;base... is a data: URL, not a file; pass the bytes it"):
        load_image("data:image/jpeg;base64," + "/9j/" * length)


@pytest.mark.parametrize("length", [1, 99])
def test_base64_is_no_file(length: int) -> None:
    with pytest.raises(MissingError, match=r"^iVBORw0KGgoiVBORw0KG?.*\.\.\. is base64 text, not a file"):
        load_image("iVBORw0KGgo" * 2 * length)


@pytest.mark.skipif(sys.platform == "win32", reason="sockets of POSIX")
def test_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(MissingError, match="pipe or device"):
            load_image("socket")


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "private.jpg"
    path.write_bytes(JPEG)
    path.chmod(0)
    monkeypatch.chdir(tmp_path)
    root = os.geteuid() == 0
    if root:  # whom permissions do not bind
        os.seteuid(65_534)
    try:
        with pytest.raises(MissingError) as caught:
            load_image("private.jpg")
    finally:
        if root:
            os.seteuid(0)
    check(caught.value, "private.jpg", "Permission denied")


@pytest.mark.parametrize("name", ["", "a\nb.jpg", "\x1b[2Jcat.jpg", "a\0b.jpg", "\ud800.jpg", "y" * 9000])
def test_hostile_names_stay_on_one_line(name: str) -> None:
    with pytest.raises(MissingError) as caught:
        load_image(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    """Where address space is limited there may be no room for the largest."""
    (tmp_path / "small.png").write_bytes(PNG)
    tracemalloc.start()
    load_image(tmp_path / "small.png")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1 << 24


def test_too_many_bytes(tmp_path: Path) -> None:
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.write(PNG)
        file.truncate(MAX_BYTES + 1_000_000)
    with pytest.raises(ImageError) as caught:
        load_image(path)
    check(caught.value, str(path), f"{MAX_BYTES + 1_000_000:,} bytes")


def closed() -> Image.Image:
    image = Image.open(io.BytesIO(PNG))
    image.close()
    return image


def cut() -> Image.Image:
    return Image.open(io.BytesIO(JPEG[:-40]))


OBJECTS: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: None, "NoneType"),
    "number": (lambda: 7, "int"),
    "list": (lambda: [PICTURE], "list"),
    "array of floats": (lambda: PICTURE / 255, "float64"),
    "array of int16": (lambda: PICTURE.astype(np.int16), "int16"),
    "array of bool": (lambda: PICTURE > 5, "bool"),
    "array, channels first": (lambda: PICTURE.transpose(2, 0, 1), "(3, 40, 48)"),
    "array of five channels": (lambda: np.zeros((4, 4, 5), np.uint8), "(4, 4, 5)"),
    "array of one axis": (lambda: np.zeros(9, np.uint8), "(9,)"),
    "array of a batch": (lambda: PICTURE[None], "(1, 40, 48, 3)"),
    "array without pixels": (lambda: PICTURE[:0], "48 x 0"),
    "array too large": (lambda: np.broadcast_to(np.uint8(0), (20_000, 2)), "20000"),
    "pillow without pixels": (lambda: Image.new("RGB", (0, 9)), "0 x 9"),
    "pillow 32-bit": (lambda: Image.new("I", (9, 9)), "mode I"),
    "pillow float": (lambda: Image.new("F", (9, 9)), "mode F"),
    "pillow closed": (closed, "was closed"),
    "pillow of a cut file": (cut, "damaged"),
}


@pytest.mark.parametrize(("make", "word"), OBJECTS.values(), ids=OBJECTS)
def test_objects(make: Callable[[], Any], word: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(make())
    check(caught.value, "The picture", word)


def test_limits_of_pixels_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "MAX_SIDE", 20)
    assert load_image(encode(picture(20, 1), "PNG")).size == (20, 1)
    with pytest.raises(ImageError, match="1 x 21"):
        load_image(encode(picture(1, 21), "PNG"))
    monkeypatch.setattr(image_module, "MAX_PIXELS", 100)
    assert load_image(encode(picture(10, 10), "PNG")).size == (10, 10)
    with pytest.raises(ImageError, match="101 x 1"):
        load_image(encode(picture(101, 1), "PNG"))


def test_a_strip_no_model_can_crop() -> None:
    with pytest.raises(ImageError, match="1 x 60000 pixels is too thin"):
        square_and_resize(Image.new("RGB", (1, 60_000)), 336, (0.5, 0.5, 0.5), "crop")
    with pytest.raises(ImageError, match="mode RGBA"):
        square_and_resize(Image.new("RGBA", (9, 9)), 336, (0.5, 0.5, 0.5), "pad")


CUTS = {
    "jpeg": JPEG,
    "jpeg progressive": JPEG_PROGRESSIVE,
    "png": PNG,
    "png palette": encode(Image.fromarray(PICTURE).quantize(64), "PNG"),
    "gif": GIF,
    "bmp": encode(Image.fromarray(PICTURE).quantize(64), "BMP"),
    "webp lossless": WEBP,
    "webp": encode(smooth(), "WEBP"),
}


@pytest.mark.parametrize("data", CUTS.values(), ids=CUTS)
def test_cut_anywhere_is_refused_or_whole(data: bytes) -> None:
    whole = np.asarray(load_image(data))
    lengths = sorted({*range(0, len(data), max(1, len(data) // 150)), *range(len(data) - 20, len(data))})
    refusals = 0
    for length in lengths:
        try:
            assert np.array_equal(np.asarray(load_image(data[:length])), whole), f"half a picture from {length} bytes"
        except ImageError:
            refusals += 1
    assert refusals >= len(lengths) - 2


def test_remarks_that_a_camera_or_program_spoilt_cost_no_picture() -> None:
    """Only chunks that pixels depend on have to be right, as in every viewer."""
    remark = b"\0\0\0\4tEXtspam\0\0\0\0"  # its checksum is another
    assert load_image(PNG[:-12] + remark + PNG[-12:]).tobytes() == PICTURE.tobytes()


@pytest.mark.parametrize("stray", [b"\0" * 7, b"\xff\xff", b"\xff\0", b"spam"])
def test_stray_bytes_between_the_segments_of_a_jpeg_are_skipped(stray: bytes) -> None:
    """Some programs pad segments; viewers and Pillow skip what is no marker."""
    end = JPEG.index(b"\xff\xdb")
    padded = JPEG[:end] + stray + JPEG[end:]
    assert load_image(padded).tobytes() == load_image(JPEG).tobytes()


def test_every_flipped_bit_in_a_png_is_found() -> None:
    """Pillow alone lets some through: it does not compare the checksums of pixel data."""
    generator = random.Random(3)
    data = encode(smooth(), "PNG", compress_level=1)
    silent = 0
    for _ in range(300):
        broken = flipped(data, generator.randrange(len(data)))
        with pytest.raises(ImageError):
            load_image(broken)
        try:
            silent += not np.array_equal(np.asarray(Image.open(io.BytesIO(broken))), smooth())
        except Exception:  # noqa: BLE001 - whatever Pillow raises
            continue
    assert silent > 0, "Pillow has become stricter and is_complete may no longer be needed"


@pytest.mark.parametrize("data", [JPEG, PNG, GIF, BMP, WEBP, encode(PICTURE, "PNG", exif=exif(6))])
def test_mutations_raise_nothing_else(data: bytes) -> None:
    generator = random.Random(len(data))
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            broken[generator.randrange(min(len(broken), 400))] = generator.choice((0, 1, 0x7F, 0x80, 0xFF))
        try:
            assert load_image(bytes(broken)).mode == "RGB"
        except ImageError as error:
            check(error, "The picture")


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_bombs_take_no_memory(tmp_path: Path) -> None:
    """In a process of its own: what is refused costs under 64 MiB, and so does a strip that is accepted."""
    bombs = [*TOO_LARGE.values(), *(zlib_bomb(kind) for kind in (b"zTXt", b"iCCP", b"iTXt"))]
    for number, data in enumerate(bombs):
        (tmp_path / str(number)).write_bytes(data)
    code = """
        import resource, sys
        from pathlib import Path
        from PIL import Image
        from llava_edge.errors import ImageError
        from llava_edge.image import load_image, square_and_resize

        def peak() -> int:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

        start = peak()
        for path in Path(sys.argv[1]).iterdir():
            try:
                load_image(path)
            except ImageError:
                continue
            sys.exit(f"{path} was accepted")
        after_bombs = peak()
        for size in ((1, 8000), (8000, 1)):
            square_and_resize(load_image(Image.new("RGB", size)), 336, (0.5, 0.5, 0.5), "pad")
        print(after_bombs - start, peak() - after_bombs)
    """
    bombs_mib, strips_mib = map(int, in_child(textwrap.dedent(code), tmp_path).stdout.split())
    assert bombs_mib < 64
    assert strips_mib < 64
