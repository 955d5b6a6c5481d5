"""PyInstaller hooks for apps that use this package, found through the entry point in setup.py."""

from __future__ import annotations

from pathlib import Path


def hook_dirs() -> list[str]:
    """Folders that contain hooks."""
    return [str(Path(__file__).parent)]
