"""The desktop example under a virtual display: photo in, answer out, stop works, the window never waits."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_edge import Chunk, Llava, Options

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def desktop() -> Any:
    """The example as a module, and an application without a display."""
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    widgets = pytest.importorskip("PySide6.QtWidgets", reason="PySide6 is not installed", exc_type=ImportError)
    spec = importlib.util.spec_from_file_location("desktop_app", ROOT / "examples" / "desktop" / "app.py")
    assert spec
    assert spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.application = widgets.QApplication.instance() or widgets.QApplication([])
    return module


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 48), "red").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def window(desktop: Any, micro_bundle: Path) -> Iterator[Any]:
    made = desktop.Window(desktop.Model(str(micro_bundle)))
    made.show()
    assert not made.button.isEnabled()  # it is there before the model is
    wait(desktop, lambda: made.statusBar().currentMessage().startswith("Ready"))
    yield made
    made.close()


def wait(desktop: Any, condition: Callable[[], bool], seconds: float = 30) -> float:
    """Let the application work until `condition()`; returns the longest time it did not come round, in seconds."""
    end, longest = time.monotonic() + seconds, 0.0
    while not condition():
        start = time.monotonic()
        desktop.application.processEvents()
        longest = max(longest, time.monotonic() - start)
        assert time.monotonic() < end
        time.sleep(0.001)
    return longest


def test_photo_in_answer_out(desktop: Any, window: Any, photo: Path, micro_bundle: Path) -> None:
    with Llava.load(micro_bundle, device="cpu") as llava:
        wanted = llava.ask("What colour?", photo, Options(max_tokens=256)).text
    window.open(photo)
    assert window.photo.pixmap().width() > 64  # shown, and larger than it is
    window.question.setText("What colour?")
    window.button.click()
    assert window.button.text() == "Stop"
    wait(desktop, lambda: window.button.text() == "Ask")
    assert window.answer.toPlainText().split() == wanted.replace("\0", "").split()
    assert window.statusBar().currentMessage().startswith("First word after")


def test_the_window_does_not_wait_for_the_model(
    desktop: Any, window: Any, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that says nothing until it is allowed to: the window goes on all the same."""
    go_on = threading.Event()
    stream = Llava.stream

    def silent(*arguments: Any, **more: Any) -> Iterator[Chunk]:
        assert go_on.wait(60)
        yield from stream(*arguments, **more)

    monkeypatch.setattr(Llava, "stream", silent)
    window.open(photo)
    window.button.click()
    window.question.setText("typed meanwhile")
    window.resize(700, 400)
    wait(desktop, lambda: window.statusBar().currentMessage() == "Looking ..." and window.photo.width() < 400)
    assert (window.button.text(), window.answer.toPlainText()) == ("Stop", "")
    assert not go_on.is_set()
    go_on.set()
    wait(desktop, lambda: window.button.text() == "Ask")
    assert window.answer.toPlainText()


def test_a_photo_lying_on_its_side_is_shown_upright(window: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (64, 32), "red").save(tmp_path / "side.jpg", exif=exif)
    window.open(tmp_path / "side.jpg")
    shown = window.photo.pixmap()
    assert shown.height() > shown.width()


def test_dropping_a_photo(desktop: Any, window: Any, photo: Path) -> None:
    from PySide6.QtCore import QMimeData, QPointF, Qt, QUrl
    from PySide6.QtGui import QDropEvent

    dropped = QMimeData()
    dropped.setUrls([QUrl.fromLocalFile(str(photo))])
    copy, left, none = Qt.DropAction.CopyAction, Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier
    window.dropEvent(QDropEvent(QPointF(5, 5), copy, dropped, left, none))
    assert window.photo.pixmap().width() > 64
    assert window.button.isEnabled()


def test_closing_while_the_model_loads(micro_bundle: Path) -> None:
    """The program ends by itself, and in peace."""
    code = f"""
import runpy, sys
from PySide6.QtCore import QTimer
from PySide6.QtWidgets import QApplication
desktop = runpy.run_path({str(ROOT / "examples" / "desktop" / "app.py")!r})
application = QApplication([])
window = desktop["Window"](desktop["Model"]({str(micro_bundle)!r}))
window.show()
QTimer.singleShot(1, window.close)
sys.exit(application.exec())
"""
    pytest.importorskip("PySide6.QtWidgets", reason="PySide6 is not installed", exc_type=ImportError)
    environment = {**os.environ, "QT_QPA_PLATFORM": "offscreen"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr.count(b"Traceback")) == (0, 0), done.stderr


def test_stop(desktop: Any, window: Any, photo: Path) -> None:
    window.open(photo)
    window.button.click()
    wait(desktop, lambda: bool(window.answer.toPlainText()))
    window.button.click()
    wait(desktop, lambda: window.button.text() == "Ask")
    assert window.statusBar().currentMessage().startswith("Stopped")
    window.button.click()  # and it can be asked again
    wait(desktop, lambda: window.statusBar().currentMessage().startswith("First word after"))


def test_a_file_that_is_no_picture(window: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    window.open(tmp_path / "notes.txt")
    assert "not a picture" in window.statusBar().currentMessage()
    assert not window.button.isEnabled()


def test_a_model_that_is_not_there(desktop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda thread: thread.run())  # it fails before anything else happens
    window = desktop.Window(desktop.Model(str(tmp_path / "nothing")))
    wait(desktop, lambda: "neither a bundle folder" in window.statusBar().currentMessage())
    assert not window.button.isEnabled()
    window.close()
