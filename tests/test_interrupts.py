"""Signals that end a program clean up like Ctrl-C, and wait while a C++ extension is imported, which would fail."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from processes import in_child

from llava_edge.interrupts import held_back, interrupt_on_termination

# What is imported, and where.
IMPORTERS = {
    "onnxruntime": "from llava_edge.runtimes import bindings; bindings.onnxruntime()",
    "onnx": "from llava_edge.export import exporter; exporter.require_extra()",
    "torch, parity": "from llava_edge.export import parity; parity.unavailable_reason()",
    "torch, calibration": "from llava_edge.export import importance; importance.check_pictures(None)",
    "torch, pickle": "from llava_edge.export import tensors; tensors.open_file(folder / 'weights.bin')",
    "torch, training": "main(['train', 'micro', '--out', str(folder)])",
    "torch, evaluation": "main(['eval', '--checkpoint', str(folder), '--photos', str(folder)])",
}
CHILD = """
import sys
from pathlib import Path
from llava_edge.cli import execute
folder = Path(sys.argv[1])
def main(arguments):
    if execute(arguments) == 130:
        raise KeyboardInterrupt
try:
    {}
except KeyboardInterrupt:
    print("interrupted")
"""
INTERRUPTED = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
print("imported")
"""


def test_a_request_to_end_is_ctrl_c_but_for_what_nohup_ignores() -> None:
    kinds = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGHUP, signal.SIG_IGN)]
    try:
        with interrupt_on_termination():
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert [signal.getsignal(kind) for kind in kinds] == [signal.SIG_DFL, signal.SIG_IGN]
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def test_signals_are_handled_at_the_end() -> None:
    before = signal.getsignal(signal.SIGINT)
    events = []

    def work() -> None:
        with held_back():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(number)
            events.append("end of the import")
        events.append("not reached")

    with pytest.raises(KeyboardInterrupt), interrupt_on_termination():
        work()
    assert events == ["end of the import"]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("importer", IMPORTERS)
def test_extensions_are_imported_to_their_end(importer: str, tmp_path: Path) -> None:
    (tmp_path / f"{importer.split(',')[0]}.py").write_text(INTERRUPTED)
    (tmp_path / "weights.bin").write_bytes(bytes(100))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = in_child(CHILD.format(IMPORTERS[importer]), tmp_path, environment=environment)
    assert done.stdout.split() == ["imported", "interrupted"]
