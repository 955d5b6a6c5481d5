"""`llava-edge doctor`: check that everything an answer needs works here, and if not, say what to run.

Engines are tested in child processes (runtimes/probe.py), so that a broken one cannot end this command.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING

import click

from llava_edge import __version__, store
from llava_edge.cli.types import MODEL
from llava_edge.errors import LlavaEdgeError, MissingError, StorageError, UnavailableError
from llava_edge.outputs import write_problem

if TYPE_CHECKING:
    from pathlib import Path

    from llava_edge.bundle import Bundle
    from llava_edge.runtimes.probe import Report


@dataclass(frozen=True)
class Finding:
    """One line of the report. level: "ok", "note" (worth knowing) or "broken" (no answer without it)."""

    subject: str
    level: str
    text: str
    fix: str = ""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@click.option("--model", type=MODEL, default=store.DEFAULT_MODEL, metavar="NAME|DIR", help="Model to check.")
@click.option("--tune", is_flag=True, help="First find the fastest settings for encoding images; later runs use them.")
def doctor(as_json: bool, model: str, tune: bool) -> None:
    """Check this machine and suggest fixes. Exits with 69 if something required is broken."""
    findings = [*_machine(), *_engines(), *_models(model, tune)]
    broken = [finding for finding in findings if finding.level == "broken"]
    if as_json:
        click.echo(json.dumps({"ok": not broken, "findings": [asdict(finding) for finding in findings]}))
    else:
        for finding in findings:
            click.echo(f"{finding.level:7} {finding.subject:14} {finding.text}")
            if finding.fix:
                click.echo(f"{'':22} run: {finding.fix}")
    if broken:
        sentences = [f"Not everything works: {', '.join(finding.subject for finding in broken)}."]
        sentences += [finding.text for finding in broken if not finding.fix]  # these texts include what to do
        sentences += ["Run the commands shown above."] if any(finding.fix for finding in broken) else []
        raise UnavailableError(" ".join(sentences))


def _machine() -> list[Finding]:
    from llava_edge.runtimes import machine

    name, features = machine.processor()
    threads, reason = machine.thread_count()
    memory = machine.available_memory()
    free = "unknown" if memory is None else f"{memory / 2**30:.1f} GiB available"
    versions = ", ".join(f"{package} {_version(package)}" for package in ("numpy", "pillow", "click"))
    system = Finding("system", "ok", f"{platform.system()} {platform.release()} {platform.machine()}")
    try:
        machine.require_proc()
    except UnavailableError as error:
        system = Finding("system", "broken", str(error))
    return [
        Finding("llava-edge", "ok", f"{__version__}, Python {platform.python_version()} in {sys.prefix}, {versions}"),
        system,
        Finding("processor", "ok", f"{name}: {' '.join(features) or 'no special features known'}"),
        Finding("threads", "ok", f"{threads} ({reason})"),
        Finding("memory", "ok", free),
    ]


def _engines() -> list[Finding]:
    from llava_edge.runtimes import probe

    try:
        llama = probe.check("llama_cpp")
    except StorageError as error:  # no folder for its model
        llama = probe.Report(str(error))
    ort = probe.check("onnxruntime")
    findings = [_engine("llama.cpp", llama, "build"), _engine("onnxruntime", ort, "providers")]
    gpus = [f"{name}: {llama.facts.get(name, 'not tested').rstrip('.')}" for name in ("cuda", "metal")]
    findings.append(Finding("devices", "note" if llama.problem else "ok", "; ".join(["cpu works", *gpus])))
    return [*findings, _native_kernels(llama)]


def _native_kernels(llama: Report) -> Finding:
    """Which kernels llama.cpp's test has loaded; if that failed, which it would have loaded."""
    from llava_edge.runtimes import native
    from llava_edge.runtimes.native.choice import Status

    loaded = llama.facts.get("native")
    kernels = Status(**loaded) if loaded else native.status()
    if kernels.fix and _mounted_noexec():
        text = f"Not used: {store.home()} is mounted noexec, so no library in it can be loaded."
        return Finding("native kernels", "note", text, "export LLAVA_EDGE_HOME=FOLDER")
    return Finding("native kernels", "ok" if kernels.used else "note", kernels.reason, kernels.fix)


def _mounted_noexec() -> bool:
    with suppress(OSError, LlavaEdgeError):
        return bool(os.statvfs(store.home()).f_flag & os.ST_NOEXEC)
    return False


def _engine(subject: str, report: Report, detail: str) -> Finding:
    if report.problem:
        return Finding(subject, "broken", report.problem, report.fix)
    details = report.facts[detail]
    details = details if isinstance(details, str) else ", ".join(details)
    return Finding(subject, "ok", f"{report.facts['version']} works. {details}")


def _models(model: str, tune: bool) -> list[Finding]:
    try:
        findings = [_cache_folder(store.home()), _image_cache()]
        installed = {entry.name for entry in store.entries() if entry.folder is not None}
    except MissingError as error:  # no home folder, which a model in another folder does not need
        if model == store.DEFAULT_MODEL:
            return [Finding("cache folder", "broken", str(error))]
        findings, installed = [Finding("cache folder", "note", str(error))], set()
    if model == store.DEFAULT_MODEL and model not in installed:
        return [
            *findings,
            Finding("default model", "note", f"{model} is not installed.", f"llava-edge models pull {model}"),
        ]
    from llava_edge.bundle import Bundle

    subject = "default model" if model == store.DEFAULT_MODEL else "model"
    try:
        bundle = Bundle.open(store.resolve(model))
    except LlavaEdgeError as error:
        rebuildable = model in store.KNOWN_MODELS and not isinstance(error, MissingError)  # else its folder is closed
        fix = f"llava-edge models pull {model} --force" if rebuildable else ""
        return [*findings, Finding(subject, "broken", str(error), fix)]
    return [*findings, Finding(subject, "ok", f"{model} in {bundle.folder}"), *_vision(model, bundle, tune)]


def _vision(model: str, bundle: Bundle, measure: bool) -> list[Finding]:
    from llava_edge.cli.terminal import status_line
    from llava_edge.runtimes import tune

    command = "llava-edge doctor --tune" + ("" if model == store.DEFAULT_MODEL else f" --model {shlex.quote(model)}")
    if measure:
        try:
            with status_line("Measuring the fastest way to encode images") as status:
                status(None)
                tune.measure(bundle)
        except LlavaEdgeError as error:
            level = "note" if isinstance(error, UnavailableError) else "broken"
            return [Finding("vision", level, str(error), command)]
    settings = tune.load(bundle)
    if measure and not settings:
        text = "measured, but the results cannot be stored; default settings are used."
        return [Finding("vision", "note", text, "export LLAVA_EDGE_HOME=FOLDER")]
    if not settings:
        text = "not tuned on this machine; default settings are used."
        return [Finding("vision", "note", text, command)]
    findings = [Finding("vision", "ok", f"measured here: {item}") for item in settings]
    for preset, copies in (("latency", True), ("memory", False)):
        setting = tune.choose(settings, copies)
        findings.append(Finding("vision", "ok", f"{preset} uses {setting}"))
    return findings


def _cache_folder(folder: Path) -> Finding:
    problem = write_problem(folder)
    if not problem:
        return Finding("cache folder", "ok", str(folder))
    text = f"{folder} cannot be written to ({problem}): models cannot be pulled, and nothing is cached."
    return Finding("cache folder", "note", text, "export LLAVA_EDGE_HOME=FOLDER")


def _image_cache() -> Finding:
    from llava_edge.cache import user_cache

    try:
        cache = user_cache()
    except LlavaEdgeError as error:
        return Finding("image cache", "broken", str(error), "unset LLAVA_EDGE_CACHE_MIB")
    try:
        entries, problem = cache.entries(), cache.disabled_reason()
    except OSError as error:
        return Finding("image cache", "note", f"nothing is cached: {cache.folder} cannot be read ({error.strerror}).")
    size = sum(entry.size for entry in entries)
    text = f"{len(entries)} entries, {size / 1e6:.1f} of {cache.limit / 1e6:.0f} MB"
    return Finding("image cache", "note" if problem else "ok", f"{text}; {problem}" if problem else text)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"
