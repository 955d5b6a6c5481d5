"""Checkpoint folder -> published bundle, step by step.

    1 read and check the checkpoint and its tokenizer      4 read everything back
    2 check the target and the space on its disk           5 measure parity with PyTorch
    3 write the parts into a folder beside the target      6 manifest, flush, publish by rename

If anything fails, the target is unchanged. Knows nothing about the command line.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np

from llava_edge import __version__
from llava_edge.bundle import (
    ADAPTER,
    FORMAT_VERSION,
    LANGUAGE,
    PARTS,
    PROJECTOR,
    VISION,
    Bundle,
    LanguagePart,
    Manifest,
    ParityRow,
    Preprocessing,
    ProjectorPart,
    Provenance,
    Square,
    VisionPart,
    file_entry,
    write_manifest,
)
from llava_edge.errors import (
    VERIFY_HINT,
    BundleError,
    CannotCreateError,
    CheckpointError,
    OptionError,
    StorageError,
    UsageError,
)
from llava_edge.export import Progress, held_out, importance, parity, publish, report, verify
from llava_edge.export.adapter import LowRank, read_back_adapter, write_adapter
from llava_edge.export.checkpoint import Checkpoint, LanguageFile
from llava_edge.export.clip_onnx import ACTIVATION_BITS, Precision, write_clip
from llava_edge.export.llm_gguf import float16_bytes, write_language
from llava_edge.export.mmproj import check_mmproj, write_mmproj
from llava_edge.export.opening import check_arguments, open_source
from llava_edge.export.projector import write_projector
from llava_edge.export.quantize import BITS, QUANTS, Quant, quantize
from llava_edge.export.tokenizer import read_after_control, read_tokenizer
from llava_edge.export.tower import write_tower
from llava_edge.export.vocabulary import Vocabulary, make_control
from llava_edge.interrupts import held_back
from llava_edge.models.shapes import language_shapes, projector_shapes, vision_shapes
from llava_edge.options import MAX_THREADS
from llava_edge.outputs import check_output, check_space
from llava_edge.runtimes import mapping, probe

OnReport = Callable[[report.Report], None]

VISION_PRECISIONS: tuple[Precision, ...] = get_args(Precision)
TOWER_PICTURES = 8  # to measure an int8 tower on


@dataclass(frozen=True)
class ExportOptions:
    """What to export and how.

    checkpoint: a LLaVA folder of any layout, or the language GGUF of a pair. out: the bundle folder to create.
    base, vision_tower, template, square, mmproj: see `open_source`. With `mmproj`, `quant` is the language file's own.
    emit_mmproj: also write the vision tower and projector to this file, for llama.cpp's programs.
    name: of the model; by default the name of `out`. provenance: the sources of its parts.
    force: replace an existing bundle. force_publish: publish even if parity fails.
    threads: for llama.cpp's quantizer; 0 is all cores.
    fine_blocks: number of blocks, from the front, of an int8 tower that get finer weights; by default searched for.
    known_manifest: of an earlier export; its parity table is reused if every file comes out identical.
    imatrix: quantize with an importance matrix from the pictures in the folder `calibrate`, or from sample pictures.
    report_data: conversations for the report (`report.measure`).
    low_rank: the language model as a finished file and an adapter, which together must equal the checkpoint's.
    """

    checkpoint: Path
    out: Path
    quant: Quant = "q4_k_m"
    vision: Precision = "int8"
    base: Path | None = None
    vision_tower: Path | None = None
    template: str | None = None
    square: Square | None = None
    name: str = ""
    provenance: tuple[Provenance, ...] = ()
    force: bool = False
    force_publish: bool = False
    threads: int = 0
    fine_blocks: int | None = None
    known_manifest: Manifest | None = None
    mmproj: Path | None = None
    emit_mmproj: Path | None = None
    imatrix: bool = False
    calibrate: Path | None = None
    report_data: Path | None = None
    low_rank: LowRank | None = None

    def __post_init__(self) -> None:
        for value, allowed in ((self.quant, QUANTS), (self.vision, VISION_PRECISIONS)):
            if value not in allowed:
                raise UsageError(f"{value!r} is not a precision; expected one of {', '.join(allowed)}.")
        if self.imatrix and self.quant in ("f16", "q8_0"):
            raise UsageError(f"{self.quant} ignores an importance matrix; choose a quantization of 4 or 5 bits for it.")
        if not 0 <= self.threads <= MAX_THREADS:  # llama.cpp's quantizer ends the process where it cannot start one
            raise OptionError("threads", f"is {self.threads}; expected an integer from 0 to {MAX_THREADS}.")
        if not self.name.isprintable() or self.name.isspace():
            raise UsageError(f"{self.name!r} cannot be a model's name; expected printable characters.")
        check_arguments(self.checkpoint, self.base, self.vision_tower, self.mmproj)


def export(
    options: ExportOptions, progress: Progress = lambda stage, share: None, on_report: OnReport | None = None
) -> Manifest:
    """Create the bundle.

    on_report: gets a comparison of all quantizations, which is only measured if given.

    Raises `MissingError` or `CheckpointError` for the source, `CannotCreateError` for the target, `StorageError` if
    the disk fails, `UnavailableError` if an engine does, and `ParityError` if a stage exceeds its limit.
    """
    require_extra()
    out = _real_target(options.out)
    progress("reading the checkpoint", None)
    checkpoint = open_source(
        options.checkpoint,
        base=options.base,
        vision_tower=options.vision_tower,
        mmproj=options.mmproj,
        template=options.template,
        square=options.square,
    )
    for note in checkpoint.notes:
        progress(note, None)
    language = checkpoint.language_file or read_tokenizer(checkpoint.tokenizer, checkpoint.config)
    publish.check_target(out, options.force)
    if options.emit_mmproj:
        inputs = [path for path in (options.checkpoint, options.mmproj) if path]
        check_output(options.emit_mmproj, distinct_from=[*inputs, out], bundles=[out])
        check_mmproj(checkpoint.config, options.emit_mmproj, options.force)
    probe.require_working_build()
    if options.imatrix or on_report:
        importance.check_pictures(options.calibrate)
    if on_report and options.report_data:
        held_out.check_data(options.report_data, checkpoint.config.image_tokens)
    with publish.staging(out) as temp:
        try:
            check_space(out.parent, _estimate(checkpoint, options, with_report=on_report is not None), "The export")
            name = options.name or _printable(out.name)
            manifest = _Export(options, checkpoint, language, temp, name, progress).run(on_report)
            if options.emit_mmproj:
                progress(f"writing {options.emit_mmproj}", None)
                write_mmproj(checkpoint, options.emit_mmproj, manifest.name)
            progress("publishing", None)
            publish.check_target(out, options.force)
            publish.publish(temp, out, force=options.force)
        except OSError as error:
            reason = error.strerror or f"{error}, as when the disk is full"  # numpy gives no errno, only byte counts
            raise StorageError(
                f"Writing the bundle failed: {error.filename or temp}: {reason}. {out} is unchanged."
            ) from error
        except BundleError as error:
            problem = str(error).replace(f"{temp}{os.sep}", "").removesuffix(f" {VERIFY_HINT}")
            raise CheckpointError(
                f"The weights of {options.checkpoint} give a bundle that cannot be used, so nothing was published: "
                f"{problem}"
            ) from error
    return manifest


def require_extra() -> None:
    """Raise `ModuleNotFoundError` early if the extra [export] is not installed."""
    with held_back():
        for package in ("gguf", "onnx", "safetensors"):
            import_module(package)


def _real_target(out: Path) -> Path:
    """The bundle folder's path, without links in its parents. Raises `CannotCreateError` if it can be none."""
    target = Path(os.path.realpath(out.parent)) / out.name
    if target.name in ("", "..", "."):
        raise CannotCreateError(f"{out} is not a name for a bundle folder.")
    try:
        str(target).encode()
    except UnicodeEncodeError as error:
        raise CannotCreateError(
            f"{os.fsencode(target)!r} is not UTF-8, which ONNX Runtime requires of paths."
        ) from error
    return target


def _estimate(checkpoint: Checkpoint, options: ExportOptions, *, with_report: bool) -> int:
    """Bytes on disk needed while exporting: float16 and quantized language file, vision up to twice, projector; for a
    report another quantized file, image embeddings and logits. A finished language file is only copied."""
    config = checkpoint.config
    language, vision, projector = (
        sum(int(np.prod(shape)) for shape in shapes.values())
        for shapes in (language_shapes(config), vision_shapes(config), projector_shapes(config))
    )
    tower = {"fp32": 4, "fp16": 6, "int8": 6}[options.vision]  # with the float32 copy to measure against
    finished_file = checkpoint.language_file
    text = finished_file.path.stat().st_size if finished_file else int(language * (2 + BITS[options.quant] / 8))
    total = text + vision * tower + projector * 4 + (16 << 20)
    if with_report:
        total += language * 9 // 8 + held_out.scratch_bytes(config.text.hidden_size, config.text.vocab_size)
    return total


def _printable(text: str) -> str:
    """Replace characters that a manifest may not contain, but a folder's name may."""
    return "".join(char if char.isprintable() else "?" for char in text)


@dataclass(frozen=True)
class _Export:
    """A running export.

    language: a finished language file, or the vocabulary to write one with. folder: becomes the bundle.
    """

    options: ExportOptions
    checkpoint: Checkpoint
    language: LanguageFile | Vocabulary
    folder: Path
    name: str
    progress: Progress

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    def run(self, on_report: OnReport | None) -> Manifest:
        """Write, read back and measure all parts. Returns the manifest."""
        options, checkpoint, folder = self.options, self.checkpoint, self.folder
        self.scratch.mkdir()
        manifest = _manifest(options, checkpoint, self.name)
        pictures = list(islice(importance.pictures(options.calibrate), TOWER_PICTURES))
        write_tower(Bundle(folder, manifest), checkpoint, options.fine_blocks, pictures, self.scratch, self.progress)
        mapping.trim_heap()
        self.progress("projector", None)
        precision = write_projector(checkpoint.config, checkpoint.tensors, folder / PROJECTOR, self.name)
        manifest = replace(manifest, projector=replace(manifest.projector, precision=precision))
        float16, matrix = self._write_language(manifest, with_matrix=options.imatrix or on_report is not None)
        self._read_back(float16)
        mapping.trim_heap()
        self.progress("hashing", None)
        files = {part: file_entry(folder / part) for part in PARTS if (folder / part).exists()}
        bundle = Bundle(folder, replace(manifest, files=files))
        rows = self._parity(bundle, float16)
        if on_report and matrix and float16:
            on_report(self._report(bundle, float16, matrix))
        shutil.rmtree(self.scratch)
        manifest = replace(bundle.manifest, parity=rows)
        write_manifest(folder, manifest)
        Bundle.open(folder)  # never publish what the runtime would refuse
        return manifest

    def _write_language(
        self, manifest: Manifest, *, with_matrix: bool
    ) -> tuple[Path | None, importance.Importance | None]:
        """Write language.gguf, and adapter.gguf if there is one. Returns the float16 file, if one was needed, and with
        `with_matrix` its importance matrix."""
        options, language, target = self.options, self.language, self.folder / LANGUAGE
        if options.low_rank:
            write_adapter(options.low_rank, self.checkpoint.config.text, self.folder / ADAPTER, self.name)
            language = options.low_rank.base
        if isinstance(language, LanguageFile):
            self.progress(f"copying {language.path.name}", None)
            shutil.copyfile(language.path, target)
            if language.new_controls:
                make_control(target, language.new_controls)
            return None, None
        float16 = self._write_float16(language)
        matrix = self._importance(manifest, float16) if with_matrix else None
        progress = partial(self.progress, f"quantizing to {options.quant}")
        quantize(float16, target, options.quant, options.threads, matrix if options.imatrix else None, progress)
        return float16, matrix

    def _write_float16(self, vocabulary: Vocabulary) -> Path:
        path = self.scratch / "float16.gguf"
        stage = f"language model as float16 ({float16_bytes(self.checkpoint) / 1e9:.2f} GB)"
        write_language(self.checkpoint, vocabulary, path, self.name, partial(self.progress, stage))
        return path

    def _importance(self, manifest: Manifest, float16: Path) -> importance.Importance:
        folder = self.options.calibrate
        stage = f"importance matrix from {importance.describe(folder)}"
        self.progress(stage, None)
        return importance.measure(self.checkpoint, manifest, float16, folder, partial(self.progress, stage))

    def _read_back(self, float16: Path | None) -> None:
        verify.read_back_projector(self.folder / PROJECTOR, self.checkpoint)
        shipped = self.folder / LANGUAGE
        if self.options.low_rank:
            read_back_adapter(shipped, self.folder / ADAPTER, self.checkpoint)
            return
        for path in (float16, shipped) if float16 and self.options.quant != "f16" else (shipped,):
            verify.read_back_language(path, self.checkpoint, partial(self.progress, "reading back"))

    def _parity(self, bundle: Bundle, float16: Path | None) -> list[ParityRow]:
        options = self.options
        if options.known_manifest and options.known_manifest.files == bundle.manifest.files:
            self.progress("parity is known: every file is identical to the one it was measured on", None)
            return options.known_manifest.parity
        if reason := parity.unavailable_reason():
            self.progress(reason, None)
            return []
        if options.low_rank and not isinstance(self.language, LanguageFile):
            float16 = self._write_float16(self.language)
        float32 = self.scratch if options.vision != "fp32" else None
        if float32 and not (float32 / VISION).exists():  # as the search for an int8 tower leaves it
            write_clip(self.checkpoint.config, self.checkpoint.tensors, float32, "fp32")
        rows = parity.measure(
            bundle,
            self.checkpoint,
            float16,
            float32,
            lambda what, share: self.progress(f"parity with PyTorch: {what}", share),
        )
        failed = [row for row in rows if not row.passed]
        if failed and not options.force_publish:
            raise ParityError(
                "The bundle does not match the checkpoint, so nothing was published: "
                + "; ".join(f"{row.stage} has {row.measure} {row.value:.3g}, limit {row.limit:g}" for row in failed)
                + ". --force-publish publishes it anyway.",
                rows,
            )
        return rows

    def _report(self, bundle: Bundle, float16: Path, matrix: importance.Importance) -> report.Report:
        scratch, options = self.scratch / "report", self.options
        scratch.mkdir()
        calibration, data = importance.describe(options.calibrate), options.report_data
        return report.measure(bundle, float16, scratch, matrix, calibration, data, options.threads, self.progress)


class ParityError(CheckpointError):
    """A stage exceeds its limit. `rows` is the complete table."""

    def __init__(self, message: str, rows: list[ParityRow]) -> None:
        super().__init__(message)
        self.rows = rows


def _manifest(options: ExportOptions, checkpoint: Checkpoint, name: str) -> Manifest:
    """The manifest without files and parity."""
    config = checkpoint.config
    finished_file = options.low_rank.base if options.low_rank else checkpoint.language_file
    return Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        family="llava",
        created_by=f"llava-edge {__version__}",
        template=config.template,
        preprocessing=_preprocessing(checkpoint),
        vision=VisionPart(
            hidden_layer=config.vision_feature_layer,
            feature=config.feature,
            image_pool=config.image_pool,
            image_tokens=config.image_tokens,
            width=config.vision.hidden_size,
            precision=options.vision,
            attention=config.vision_blocks > 0,
            activation_bits=ACTIVATION_BITS if options.vision == "int8" else 8,
        ),
        projector=ProjectorPart(config.projector_type, "f32"),
        language=LanguagePart(
            hidden_size=config.text.hidden_size,
            context_length=config.text.max_position_embeddings,
            vocab_size=config.text.vocab_size,
            quantization=finished_file.quantization if finished_file else options.quant,
            calibration=importance.describe(options.calibrate) if options.imatrix else "",
        ),
        files={},
        provenance=list(options.provenance or _sources(options)),
        image_markers=list(config.image_markers),
        after_control=read_after_control(checkpoint.tokenizer, config),
    )


def _sources(options: ExportOptions) -> tuple[Provenance, ...]:
    terms, name = "as the checkpoint's", _printable(options.checkpoint.resolve().name)
    if options.mmproj is None:
        return (Provenance("all parts", name, terms),)
    encoder = _printable(options.mmproj.resolve().name)
    return Provenance("language", name, terms), Provenance("vision and projector", encoder, terms)


def _preprocessing(checkpoint: Checkpoint) -> Preprocessing:
    config, (mean, std) = checkpoint.config, checkpoint.normalisation
    return Preprocessing(config.vision.image_size, mean, std, config.square, config.grids, config.merge)
