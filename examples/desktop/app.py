"""A desktop app around llava_edge: open or drop a photo, ask, read the answer as it is written, stop it.

    pip install . PySide6-Essentials
    python examples/desktop/app.py [MODEL]

Run these in the clone, after building llama.cpp as README.md says.

The window never blocks: the model is loaded and asked in threads, which report back through Qt signals.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

from PySide6.QtCore import QObject, Qt, Signal
from PySide6.QtGui import (
    QCloseEvent,
    QDragEnterEvent,
    QDropEvent,
    QImageReader,
    QKeySequence,
    QPixmap,
    QResizeEvent,
    QShortcut,
)
from PySide6.QtWidgets import (
    QApplication,
    QFileDialog,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QMainWindow,
    QPlainTextEdit,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from llava_edge import Llava, LlavaEdgeError, Options

PHOTO_FILTER = "Photos (*.jpg *.jpeg *.png *.webp *.gif *.bmp)"


class Model(QObject):
    """The model, in background threads. Its methods return at once."""

    loaded = Signal(str)  # device
    chunk_received = Signal(str)  # the next piece of an answer
    finished = Signal(str)  # how an answer ended, for the status bar
    failed = Signal(str)  # an error message for the user

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._llava: Llava | None = None
        self._cancel = threading.Event()

    def load(self) -> None:
        """Load the model, then emit `loaded` or `failed`; connect these first, as a wrong name fails at once."""
        self._run_in_thread(self._load)

    def ask(self, question: str, photo: Path) -> None:
        """Answer a question: emit `chunk_received`, then `finished`, or `failed`."""
        self._cancel = cancel = threading.Event()
        self._run_in_thread(lambda: self._answer(question, photo, cancel))

    def stop(self) -> None:
        """Stop the current answer."""
        self._cancel.set()

    def close(self) -> None:
        """Stop the current answer and free the model."""
        self.stop()
        if self._llava:
            self._llava.close()

    def _load(self) -> None:
        self._llava = Llava.load(self._name)
        self.loaded.emit(self._llava.device)

    def _answer(self, question: str, photo: Path, cancel: threading.Event) -> None:
        assert self._llava
        for chunk in self._llava.stream(question, photo, Options(max_tokens=256), cancel=cancel):
            self.chunk_received.emit(chunk.text)
            if chunk.final:
                timings = chunk.final.timings
                outcome = (
                    "Stopped" if chunk.finish_reason == "cancelled" else f"First word after {timings.ttft_ms:.0f} ms"
                )
                self.finished.emit(f"{outcome}, {timings.decode_tokens_per_s:.0f} tokens/s")

    def _run_in_thread(self, task: Callable[[], None]) -> None:
        def run() -> None:
            try:
                task()
            except LlavaEdgeError as error:
                self.failed.emit(str(error))

        threading.Thread(target=run, daemon=True).start()


class Photo(QLabel):
    """Shows a picture scaled to the available space; emits `clicked` to choose another."""

    clicked = Signal()

    def __init__(self) -> None:
        super().__init__("Click to open a photo (Ctrl+O), or drop one here")
        self.setAlignment(Qt.AlignmentFlag.AlignCenter)
        self.setMinimumSize(320, 240)
        self.setStyleSheet("border: 1px dashed palette(mid); border-radius: 12px;")
        self._original = QPixmap()

    def show_file(self, path: Path) -> bool:
        """Show a file; returns whether it is a picture."""
        reader = QImageReader(str(path))
        reader.setAutoTransform(True)  # upright, as the model sees it
        self._original = QPixmap.fromImageReader(reader)
        self._fit()
        return not self._original.isNull()

    def mousePressEvent(self, event: object) -> None:
        self.clicked.emit()

    def resizeEvent(self, event: QResizeEvent) -> None:
        self._fit()

    def _fit(self) -> None:
        if not self._original.isNull():
            smooth = Qt.TransformationMode.SmoothTransformation
            available = self.contentsRect().size()
            self.setPixmap(self._original.scaled(available, Qt.AspectRatioMode.KeepAspectRatio, smooth))


class Window(QMainWindow):
    """A photo on the left, question and answer on the right."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.setWindowTitle("llava-edge")
        self.setAcceptDrops(True)
        self.resize(860, 480)
        self._model = model
        self._path: Path | None = None
        self._ready = self._busy = False
        self.photo = Photo()
        self.question = QLineEdit("What is in the picture?")
        self.button = QPushButton("Ask")
        self.answer = QPlainTextEdit(readOnly=True, placeholderText="The answer appears here.")
        self._build_layout()
        self.photo.clicked.connect(self._choose)
        QShortcut(QKeySequence(QKeySequence.StandardKey.Open), self, self._choose)
        self.question.returnPressed.connect(self._ask)
        self.button.clicked.connect(self._ask_or_stop)
        model.loaded.connect(self._on_loaded)
        model.chunk_received.connect(self._append_text)
        model.finished.connect(self._finish)
        model.failed.connect(self._finish)
        self.statusBar().showMessage("Loading the model ...")
        self._update()
        model.load()

    def open(self, path: Path) -> None:
        """Show a photo, which later questions are about."""
        if self.photo.show_file(path):
            self._path = path
            self.question.setFocus()
        else:
            self.statusBar().showMessage(f"{path.name} is not a picture.")
        self._update()

    def dragEnterEvent(self, event: QDragEnterEvent) -> None:
        if event.mimeData().hasUrls():
            event.acceptProposedAction()

    def dropEvent(self, event: QDropEvent) -> None:
        self.open(Path(event.mimeData().urls()[0].toLocalFile()))

    def closeEvent(self, event: QCloseEvent) -> None:
        self._model.close()

    def _build_layout(self) -> None:
        row = QHBoxLayout()
        row.addWidget(self.question, 1)
        row.addWidget(self.button)
        right_column = QVBoxLayout()
        right_column.addLayout(row)
        right_column.addWidget(self.answer, 1)
        columns = QHBoxLayout()
        columns.addWidget(self.photo, 1)
        columns.addLayout(right_column, 1)
        central = QWidget()
        central.setLayout(columns)
        self.setCentralWidget(central)

    def _choose(self) -> None:
        name, _ = QFileDialog.getOpenFileName(self, "Open a photo", "", PHOTO_FILTER)
        if name:
            self.open(Path(name))

    def _ask_or_stop(self) -> None:
        if self._busy:
            self._model.stop()
        else:
            self._ask()

    def _ask(self) -> None:
        if not self._ready or self._busy or self._path is None:
            return
        self._busy = True
        self.answer.clear()
        self.statusBar().showMessage("Looking ...")
        self._model.ask(self.question.text(), self._path)
        self._update()

    def _on_loaded(self, device: str) -> None:
        self._ready = True
        self.statusBar().showMessage(f"Ready on {device}")
        self._update()

    def _append_text(self, text: str) -> None:
        cursor = self.answer.textCursor()
        cursor.movePosition(cursor.MoveOperation.End)
        cursor.insertText(text)

    def _finish(self, message: str) -> None:
        self._busy = False
        self.statusBar().showMessage(message)
        self._update()

    def _update(self) -> None:
        self.button.setText("Stop" if self._busy else "Ask")
        self.button.setEnabled(self._busy or (self._ready and self._path is not None))


def main() -> int:
    """Run the app with the model named on the command line, or `smol`."""
    app = QApplication(sys.argv)
    window = Window(Model(sys.argv[1] if len(sys.argv) > 1 else "smol"))
    window.show()
    return app.exec()


if __name__ == "__main__":
    sys.exit(main())
