"""The bundle: a folder whose `manifest.json` is the contract between exporter and runtime.

    manifest.json    everything below, with the size and SHA-256 of every other file
    vision.onnx      CLIP up to the chosen layer (weights in vision.onnx.data, memory-mapped)
    projector.gguf   projector weights
    language.gguf    LLaMA and tokenizer, quantized
    adapter.gguf     its LoRA adapter, if there is one

Nothing is guessed from names. Opening checks structure, sizes and, by a sample, that each part belongs to the bundle;
`Bundle.verify` reads every byte. This module knows nothing about engines or tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from llava_edge.errors import BundleError, MissingError
from llava_edge.outputs import flush_to_disk
from llava_edge.placeholder import PREFIX_BYTES, describe_placeholder
from llava_edge.prompt import AfterControl
from llava_edge.templates import TEMPLATES
from llava_edge.typed import Printable, build

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20
SAMPLES, SAMPLE_BYTES = 32, 4096  # pieces of each part, read in a millisecond
MAX_IMAGE_SIZE = 4096  # pixels on a side; published CLIP towers have 224 to 448
MAX_TILES = 36  # of one picture; LLaVA-1.6 has at most 4

VISION = "vision.onnx"
VISION_DATA = "vision.onnx.data"
PROJECTOR = "projector.gguf"
LANGUAGE = "language.gguf"
ADAPTER = "adapter.gguf"
PARTS = (VISION, VISION_DATA, PROJECTOR, LANGUAGE, ADAPTER)

Text = Annotated[str, Printable()]
Square = Literal["pad", "crop", "anyres"]
Merge = Literal["flat", "spatial_unpad"]


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes crops: made square, resized (Pillow bicubic) to `image_size`, (x/255 - mean) / std.

    grids, merge: only for "anyres", see `llava_edge.anyres`: canvas sizes (width, height) in pixels that may be split
    into tiles, and how the crops' embeddings are merged ("spatial_unpad" uses `image_newline` of projector.gguf).
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    square: Square
    grids: tuple[tuple[int, int], ...] = ()
    merge: Merge = "flat"


@dataclass(frozen=True)
class VisionPart:
    """vision.onnx: `pixels` (batch, 3, S, S) float32 -> `features` (batch, image_tokens, width) float32.

    attention: whether there is a second output `attention` (batch, image_tokens) float32, of the class token.
    activation_bits: of the activations of an int8 graph. 7 are exact everywhere; with 8, sums of u8 x s8 products
    overflow on processors without VNNI, unless ONNX Runtime is set to use slower products.
    """

    hidden_layer: int  # index into CLIP's hidden states; may be negative, as in the checkpoint
    feature: Literal["patch", "cls_patch"]
    image_pool: int
    image_tokens: int
    width: int
    precision: Literal["fp32", "fp16", "int8"]
    attention: bool = False
    activation_bits: Literal[7, 8] = 8


@dataclass(frozen=True)
class ProjectorPart:
    """projector.gguf: tensors `mm.0.weight`, `mm.0.bias`, `mm.2.weight`, ... (GELU, erf form, in between).

    With merge "spatial_unpad" also `image_newline` (language hidden size), the embedding that ends each row of patches.
    """

    type: Text
    precision: Text


@dataclass(frozen=True)
class LanguagePart:
    """language.gguf as llama.cpp loads it. calibration: data of its importance matrix; empty without one."""

    hidden_size: int
    context_length: int
    vocab_size: int
    quantization: Text
    calibration: Text = ""


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of one part; `sample`: of pieces of it, which opening compares."""

    size: int
    sha256: Text
    sample: Text = ""


@dataclass(frozen=True)
class ParityRow:
    """One stage compared with PyTorch: largest absolute and relative (l2) difference, and the limit on `measure`."""

    stage: Text
    measure: Text  # what `value` is: "max_abs", "relative", "cosine" or "agreement" (share of equal greedy tokens)
    value: float
    limit: float
    max_abs: float
    relative: float
    passed: bool


@dataclass(frozen=True)
class Provenance:
    """Source and licence of a part."""

    part: Text
    source: Text
    licence: Text
    sha256: Text = ""


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime knows about a bundle."""

    format_version: int
    name: Text
    family: Literal["llava"]
    created_by: Text
    template: Text
    preprocessing: Preprocessing
    vision: VisionPart
    projector: ProjectorPart
    language: LanguagePart
    files: dict[Text, FileEntry]
    parity: list[ParityRow] = field(default_factory=list)
    provenance: list[Provenance] = field(default_factory=list)
    # Fields added later have defaults, which apply to bundles without them.
    image_markers: list[Text] = field(default_factory=list)  # the control tokens before and after an image, or none
    after_control: AfterControl = "prefix"

    @property
    def identity(self) -> str:
        """Hash over the hashes of all parts; equal for bundles of equal content."""
        joined = "\n".join(f"{name} {entry.sha256}" for name, entry in sorted(self.files.items()))
        return hashlib.sha256(joined.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(entry.size for entry in self.files.values())


@dataclass(frozen=True)
class Bundle:
    """An opened bundle folder."""

    folder: Path
    manifest: Manifest

    @staticmethod
    def open(folder: Path) -> Bundle:
        """Check structure, sizes and a sample of each part. Raises `MissingError` or `BundleError`."""
        manifest = read_manifest(folder)
        for name, entry in manifest.files.items():
            _check_file(folder, name, entry)
        for name in PARTS:
            if name not in manifest.files and os.path.lexists(folder / name):
                raise BundleError(f"{folder / name} is not in the manifest: it is from another bundle. Remove it.")
        return Bundle(folder, manifest)

    def part(self, name: str) -> Path:
        """Path of one part, e.g. `bundle.part(LANGUAGE)`."""
        return self.folder / name

    @property
    def adapter(self) -> Path | None:
        """Path of the language model's LoRA adapter, if the bundle has one."""
        return self.part(ADAPTER) if ADAPTER in self.manifest.files else None

    def verify(self, progress: Callable[[int], None] = lambda n: None) -> None:
        """Read every byte and compare hashes. `progress` gets counts of bytes read. Raises `BundleError`."""
        for name, entry in self.manifest.files.items():
            actual = sha256_of(self.part(name), progress)
            if actual != entry.sha256:
                raise BundleError(
                    f"{self.part(name)} is damaged or from another bundle: SHA-256 is {actual}, "
                    f"the manifest says {entry.sha256}. Export or pull the bundle again."
                )


def read_manifest(folder: Path) -> Manifest:
    """Parse and check `manifest.json`. Raises `MissingError` or `BundleError` with what was expected."""
    path = folder / MANIFEST
    try:
        raw = json.loads(_manifest_text(folder))  # a second value of a key replaces the first, in the checksum too
    except (ValueError, RecursionError) as error:
        raise _invalid_manifest(path, error) from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise BundleError(
            f"{path} has bundle format version {version}, this program reads version {FORMAT_VERSION}: a newer "
            "llava-edge wrote it. Update llava-edge."
        )
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path} has bundle format version {str(version)[:40]!r}, this program reads version {FORMAT_VERSION}. "
            "Export the checkpoint again with this version of llava-edge."
        )
    checksum = raw.pop("checksum", None)
    try:
        manifest = build(Manifest, raw)
        _check_values(manifest)
    except ValueError as error:
        raise _invalid_manifest(path, error) from error
    if checksum != _checksum(raw):
        raise BundleError(f"{path} was changed after it was written (its checksum differs). Export or pull it again.")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` and flush it to disk."""
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        raw = asdict(manifest)
        json.dump({**raw, "checksum": _checksum(raw)}, file, indent=2, allow_nan=False)
        file.write("\n")
    flush_to_disk(folder / MANIFEST)


def file_entry(path: Path) -> FileEntry:
    """Size and hashes of a part."""
    return FileEntry(path.stat().st_size, sha256_of(path), _sample_of(path))


def sha256_of(path: Path, progress: Callable[[int], None] = lambda n: None) -> str:
    """SHA-256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def _sample_of(path: Path) -> str:
    """SHA-256 of pieces from all over a file: two models of one size differ in some of them."""
    digest, last = hashlib.sha256(), max(path.stat().st_size - SAMPLE_BYTES, 0)
    with path.open("rb", buffering=0) as file:
        for number in range(SAMPLES):
            file.seek(last * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _checksum(raw: dict[str, Any]) -> str:
    """SHA-256 of the manifest's content: a changed digit in `mean` would otherwise silently give wrong answers."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def _manifest_text(folder: Path) -> str:
    path = folder / MANIFEST
    try:
        size = _stat_regular_file(path).st_size
        if size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes, so it is not a bundle manifest.")
        return path.read_bytes().decode("utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        if not folder.exists():
            raise MissingError(f"{folder} does not exist; expected a bundle folder or a model name.") from error
        raise BundleError(f"{folder} is not a bundle{_explain_non_bundle(folder)}") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}.") from error


def _explain_non_bundle(folder: Path) -> str:
    """What was given instead of a bundle, and what to do."""
    if not folder.is_file():
        return f": it has no {MANIFEST}. Create one with 'llava-edge export'."
    if (folder.parent / MANIFEST).is_file():
        return f" but a part of one; give its folder, {folder.parent}."
    if folder.suffix == ".gguf":
        return f" but a GGUF file; run: llava-edge export {shlex.quote(str(folder))} BUNDLE --mmproj FILE"
    return " but a file; expected a bundle folder. Create one with 'llava-edge export'."


def _stat_regular_file(path: Path) -> os.stat_result:
    """Status of a regular file without symbolic or hard links. Raises `BundleError`, `OSError`."""
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
        raise BundleError(f"{path} must be a regular file, not a link, folder, pipe or device.")
    return info


def _invalid_manifest(path: Path, error: Exception) -> BundleError:
    remedy = "Export or pull the bundle again with this version of llava-edge."
    return BundleError(f"{path} is not a valid manifest: {error}. {remedy}")


def _check_values(manifest: Manifest) -> None:
    """Raise `ValueError` for values that have the right type but are impossible, or contradict each other."""
    missing = [name for name in (VISION, PROJECTOR, LANGUAGE) if name not in manifest.files]
    unknown = [name for name in manifest.files if name not in PARTS]
    if missing or unknown:
        raise ValueError(f"it lists the wrong files: missing {missing}, unknown {unknown}")
    if manifest.template not in TEMPLATES:
        raise ValueError(f"it names the prompt template {manifest.template!r}; known: {', '.join(TEMPLATES)}")
    if len(manifest.image_markers) not in (0, 2):
        raise ValueError(f"it has {len(manifest.image_markers)} image_markers; expected two or none")
    pixels, vision, language = manifest.preprocessing, manifest.vision, manifest.language
    sizes = [vision.image_tokens, vision.width, vision.image_pool]
    sizes += [language.hidden_size, language.context_length, language.vocab_size]
    if min(sizes) < 1 or max(sizes) > 1 << 24:
        raise ValueError(f"it has a size out of range: {sizes}")
    if not 1 <= pixels.image_size <= MAX_IMAGE_SIZE:
        raise ValueError(f"it has image_size {pixels.image_size}; expected 1 to {MAX_IMAGE_SIZE}")
    if min(pixels.std) <= 0:
        raise ValueError(f"it has a std that is not positive: {pixels.std}")
    problem = tiling_problem(pixels.image_size, pixels.square, pixels.grids, pixels.merge, vision.image_tokens)
    if problem:
        raise ValueError(problem)


def tiling_problem(
    size: int, square: Square, grids: tuple[tuple[int, int], ...], merge: Merge, image_tokens: int
) -> str:
    """What is wrong with a tiling (see `Preprocessing`) of crops with `image_tokens` embeddings; empty if valid."""
    if square != "anyres":
        return "grids and merge need square anyres" if grids or merge != "flat" else ""
    if not grids:
        return "square anyres needs at least one grid"
    for width, height in grids:
        if min(width, height) < 1 or width % size or height % size or width * height > MAX_TILES * size * size:
            return f"a grid of {width} x {height} pixels is not 1 to {MAX_TILES} tiles of {size} x {size}"
    if merge == "spatial_unpad" and math.isqrt(image_tokens) ** 2 != image_tokens:
        return f"merge spatial_unpad needs a square number of embeddings per crop, not {image_tokens}"
    return ""


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    path = folder / name
    try:
        size = _stat_regular_file(path).st_size
    except OSError as error:
        raise BundleError(f"{path} is missing from the bundle ({error.strerror}). Export or pull it again.") from error
    try:
        sample = _sample_of(path)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}.") from error
    if size != entry.size:
        raise BundleError(
            f"{path} has {size} bytes, the manifest says {entry.size}: it is truncated or from another "
            f"bundle.{_mixup_hint(path)} Export or pull the bundle again."
        )
    if entry.sample and sample != entry.sample:
        raise BundleError(f"{path} is damaged or from another bundle. Export or pull the bundle again.")


def _mixup_hint(path: Path) -> str:
    """What the file is instead, if it is one of the usual mix-ups."""
    with path.open("rb") as file:
        placeholder = describe_placeholder(file.read(PREFIX_BYTES))
    return f" It is {placeholder}." if placeholder else ""
