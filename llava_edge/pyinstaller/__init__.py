"""What PyInstaller has to know to freeze an app that uses this package; it asks by the entry point in setup.py."""

from __future__ import annotations

from pathlib import Path


def hook_dirs() -> list[str]:
    """Folders of hooks."""
    return [str(Path(__file__).parent)]
