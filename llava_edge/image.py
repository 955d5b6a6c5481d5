"""Image files -> RGB -> CLIP's input pixels. Used by the trainer, the exporter's checks and the runtime.

`load_image` decodes a picture and normalises orientation, transparency, bit depth and colour model; `preprocess`
does LLaVA's preprocessing. Pictures are untrusted: only five parsers can ever run, sizes are checked before decoding,
and a truncated or damaged file is refused rather than shown half grey.

Knows nothing about models, engines or the network. Colour profiles (ICC) are ignored, as in LLaVA.
"""

from __future__ import annotations

import io
import os
import stat
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, WebPImagePlugin  # noqa: F401 - without WebP, Pillow would import all its parsers

from llava_edge.bundle import Preprocessing, Square
from llava_edge.errors import ImageError, LlavaEdgeError, MissingError
from llava_edge.image_format import ACCEPTED, BASE64, describe_bytes, detect_format, is_complete
from llava_edge.locks import fork_safe_lock

ImageInput = str | Path | bytes | Image.Image | np.ndarray[Any, Any]

BACKGROUND = (255, 255, 255)  # shows through transparent pixels: most such pictures are drawn for a white page
MAX_PIXELS = 1 << 26  # 67 megapixels; Pillow keeps 4 bytes a pixel, so 256 MiB
MAX_SIDE = 1 << 14  # pixels; the cost of `_pad` grows with its square, and no phone takes a wider panorama
MAX_BYTES = 1 << 28  # of an encoded file
BAND_PIXELS = 1 << 20  # that each thread of `_pad` pads at a time
BAND_THREADS = 2
RESCALE = 0.00392156862745098  # 1/255 as CLIP's preprocessor_config.json has it

PILLOW_LOCK = fork_safe_lock()  # Pillow images load pixels and EXIF lazily, which is not thread-safe
_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: ImageInput, name: str = "") -> Image.Image:
    """Decode to RGB, uint8, upright, first frame. A Pillow image that already is all of that is returned unchanged.

    source: a path, an encoded file as bytes, a Pillow image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4):
        grey, RGB or RGBA.
    name: name for error messages, if `source` is not a path.

    EXIF orientation is applied (LLaVA's own code does not). Transparency is blended with `BACKGROUND`. 16-bit grey is
    divided by 257 and rounded; 16-bit colour keeps its high byte, which is all Pillow provides.
    Only PNG has checksums: in the other formats, changed or zeroed bytes can go unnoticed.

    Raises `MissingError` if there is nothing to read, `ImageError` if it is not an acceptable picture.
    """
    if isinstance(source, str | os.PathLike):
        source, name = read_image(source)
    elif isinstance(source, ImageFile.ImageFile) and source.filename:
        name = _display_name(os.fsdecode(source.filename))
    name = name or "The picture"
    try:
        with warnings.catch_warnings(), PILLOW_LOCK if isinstance(source, Image.Image) else nullcontext():
            warnings.simplefilter("ignore")  # Pillow's warnings about metadata do not help the user
            image = _open(source, name)
            _check_size(image.size, name)
            image.load()
            rgb = _to_rgb(_apply_orientation(image), name)  # no copy of an RGB image: saves 40 ms for a phone photo
            if rgb is not source:
                rgb.info = {}
            return rgb
    except (LlavaEdgeError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has more than {MAX_PIXELS:,} pixels, the limit; make it smaller first.") from error
    except Exception as error:  # Pillow's parsers raise SyntaxError, struct.error, KeyError, ... on bad data
        if isinstance(source, Image.Image) and "closed" in str(error):
            raise ImageError(f"{name} is a Pillow image that was closed; open it again.") from error
        raise ImageError(f"{name} is damaged or truncated and cannot be decoded; get the file again.") from error


def read_image(path: str | os.PathLike[str]) -> tuple[bytes, str]:
    """A file's bytes, and its name for error messages. Raises `MissingError`, or `ImageError` if it is too large."""
    if not isinstance(path, str | Path):
        path = Path(os.fsdecode(path))
    name = _display_name(path)
    return _read(path, name), name


def pixel_count(data: bytes) -> int:
    """Number of pixels by the header of an encoded picture; 0 if `load_image` will refuse it anyway."""
    kind = detect_format(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            width, height = Image.open(io.BytesIO(data), formats=[kind] if kind else []).size
    except Exception:  # noqa: BLE001 - Pillow's parsers raise anything, and `load_image` reports it
        return 0
    return width * height


def preprocess(image: Image.Image, spec: Preprocessing) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Preprocess a picture of one crop ("pad", "crop") for CLIP: float32, (3, S, S). `anyres.crops` handles all kinds.

    `image` is from `load_image`. Bit-identical to transformers' CLIPImageProcessor (the Pillow one), after LLaVA's
    padding if `spec.square` is "pad". Raises `ImageError` for modes other than RGB.
    """
    return normalise(square_and_resize(image, spec.image_size, spec.mean, spec.square), spec)


def normalise(image: Image.Image, spec: Preprocessing) -> np.ndarray[Any, np.dtype[np.float32]]:
    """RGB (H, W) -> float32 (3, H, W), C-contiguous, (x/255 - mean) / std."""
    pixels = np.asarray(image)
    scaled = (pixels.astype(np.float64) * RESCALE).astype(np.float32)  # rounded here, as in CLIPImageProcessor
    normalised = (scaled - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))


def square_and_resize(image: Image.Image, size: int, mean: tuple[float, float, float], square: Square) -> Image.Image:
    """The uint8 part of `preprocess`: an RGB image of `size` x `size`, by Pillow's antialiased bicubic filter."""
    if image.mode != "RGB":
        raise ImageError(f"Preprocessing expects an RGB picture from load_image, not one of mode {image.mode}.")
    if square == "anyres":
        raise ValueError("anyres makes several crops of a picture; use anyres.crops")
    return _pad(image, size, mean) if square == "pad" else _crop(image, size)


def _pad(image: Image.Image, size: int, mean: tuple[float, float, float]) -> Image.Image:
    """Centre on a square of the mean colour (llava/mm_utils.py, expand2square), then resize; bit-identical.

    The square is never allocated: for a strip of 1 x 16,384 it would take 1 GiB. Pillow resizes rows first and
    columns second, rounding to uint8 in between, so rows can be padded and resized in bands.
    """
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    colour = (int(255 * mean[0]), int(255 * mean[1]), int(255 * mean[2]))  # truncated, as in expand2square
    rows = max(1, BAND_PIXELS // side)

    def resize_band(y: int) -> Image.Image:
        band = Image.new("RGB", (side, min(rows, height - y)), colour)
        band.paste(image.crop((0, y, width, y + band.height)), (left, 0))
        return band.resize((size, band.height), Image.Resampling.BICUBIC)

    resized = Image.new("RGB", (size, side), colour)
    band_starts = iter(range(0, height, rows))  # each thread takes the next one
    errors: list[BaseException] = []

    def resize_bands() -> None:
        try:
            for y in band_starts:
                resized.paste(resize_band(y), (0, top + y))
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    # Pillow resizes without the GIL. A concurrent.futures pool would refuse work once the main thread has ended.
    threads = [threading.Thread(target=resize_bands, daemon=True) for _ in range(BAND_THREADS)]
    try:
        for thread in threads:
            thread.start()
    except RuntimeError:  # no more threads
        resize_bands()
    for thread in threads:
        if thread.ident is not None:  # it was started
            thread.join()
    if errors:
        raise errors[0]
    return resized.resize((size, size), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size`, then crop the centre (CLIPImageProcessor)."""
    width, height = image.size
    long = int(size * max(width, height) / min(width, height))
    if size * long > MAX_PIXELS:
        raise ImageError(f"A picture of {width} x {height} pixels is too thin for this model; crop it first.")
    wide, tall = (size, long) if width <= height else (long, size)
    left, top = (wide - size) // 2, (tall - size) // 2
    return image.resize((wide, tall), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def _display_name(path: str | Path) -> str:
    """A file name for messages: on one line, without control characters, of at most 300 characters."""
    text = str(path)
    text = text if text.isprintable() and text else repr(text)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _read(path: str | Path, name: str) -> bytes:
    """All bytes of a regular file. Never opens a pipe or device, which could block forever."""
    if not str(path).strip():
        raise MissingError(f"A picture is given as {str(path)!r}; expected the path of a picture.")
    try:
        info = Path(path).stat()
        if not stat.S_ISREG(info.st_mode):
            kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe or device"
            raise MissingError(f"{name} is {kind}, not a picture file.")
        _check_bytes(info.st_size, name)
        with Path(path).open("rb") as file:
            return file.read(info.st_size)  # Python allocates as many bytes as are requested
    except OSError as error:
        start = str(path)[:6].lower()
        if start.startswith("data:"):
            problem = f"{name[:20]}... is a data: URL, not a file; pass the bytes it encodes."
        elif start.startswith(("http:", "https:")):
            problem = f"{name} is a web address, not a file; download the picture first."
        elif str(path).startswith(BASE64):
            problem = f"{name[:20]}... is base64 text, not a file; pass the bytes that base64.b64decode returns."
        elif isinstance(error, FileNotFoundError | NotADirectoryError):
            problem = f"{name} does not exist; expected the path of a picture."
        else:
            problem = f"{name} cannot be read: {error.strerror}."
        raise MissingError(problem) from error
    except ValueError as error:  # contains NUL or half a surrogate pair
        raise MissingError(f"{name} cannot be the name of a file.") from error


def _open(source: ImageInput, name: str) -> Image.Image:
    """Open a source as a Pillow image, whose pixels may not be decoded yet."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))):
            raise ImageError(
                f"{name} is an array of {source.dtype} with shape {source.shape}; "
                "expected uint8 of shape (H, W), (H, W, 3) or (H, W, 4)."
            )
        _check_size((source.shape[1], source.shape[0]), name)
        return Image.fromarray(np.ascontiguousarray(source))
    if not isinstance(source, bytes):
        hint = "; pass what its read() returns" if hasattr(source, "read") else ""
        raise ImageError(
            f"{name} is a Python {type(source).__name__}; expected a path, bytes, an image or an array{hint}."
        )
    _check_bytes(len(source), name)
    kind = detect_format(source)
    if kind is None:
        raise ImageError(f"{name} {describe_bytes(source)}; llava-edge reads {ACCEPTED}.")
    if not is_complete(source, kind):
        raise ValueError(f"{kind} without its end marker or with a wrong checksum")
    image = Image.open(io.BytesIO(source), formats=[kind])
    if kind == "PNG":
        _scale_colour_key(image, bits=source[24])
    return image


def _scale_colour_key(image: Image.Image, bits: int) -> None:
    """Scale a PNG's transparent colour to 8 bits, as Pillow does with the pixels but not with this."""
    key = image.info.get("transparency")
    highest = (1 << bits) - 1
    if image.mode == "L" and isinstance(key, int):
        image.info["transparency"] = (key & highest) * 255 // highest
    elif image.mode == "RGB" and isinstance(key, tuple):
        image.info["transparency"] = tuple((value & highest) >> (bits - 8) for value in key)


def _check_bytes(count: int, name: str) -> None:
    if count > MAX_BYTES:
        raise ImageError(f"{name} has {count:,} bytes; the limit is {MAX_BYTES:,}, so make the picture smaller first.")


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageError(f"{name} has no pixels: it is {width} x {height}.")
    if width * height > MAX_PIXELS or max(size) > MAX_SIDE:
        raise ImageError(
            f"{name} has {width} x {height} pixels; the limit is {MAX_PIXELS:,} in all and {MAX_SIDE:,} a side, "
            "so make it smaller first."
        )


def _apply_orientation(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. Unreadable EXIF is ignored, as in every viewer."""
    try:
        transpose = _TRANSPOSE_BY_ORIENTATION.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - damaged EXIF raises anything
        return image
    return image if transpose is None else image.transpose(transpose)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _16_bit_grey_to_8(image)
    if image.mode in ("I", "F"):
        raise ImageError(f"{name} has mode {image.mode}, whose values have no fixed range; convert it to 8 bits first.")
    if image.format == "BMP" and image.mode == "RGBA" and image.getbbox() is None:
        image = image.convert("RGB")  # programs reserve alpha and write none; browsers show such a file
    if image.has_transparency_data:
        layer = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        rgb = Image.new("RGB", image.size, BACKGROUND)
        rgb.paste(layer, mask=layer)
        return rgb
    return image if image.mode == "RGB" else image.convert("RGB")


def _16_bit_grey_to_8(image: Image.Image) -> Image.Image:
    """16-bit grey -> L, or LA if the PNG has a transparent value. Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values * 255 + 32_895) >> 16).astype(np.uint8))  # = round(value / 257)
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey
