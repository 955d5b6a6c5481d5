"""PyInstaller hook for `onnxruntime`, replacing that of pyinstaller-hooks-contrib."""

from __future__ import annotations

from PyInstaller.utils.hooks import collect_dynamic_libs

binaries = collect_dynamic_libs("onnxruntime")
excludedimports = ["onnxruntime.transformers.machine_info"]  # a debugging aid that imports 1.3 GB of torch
