"""PyInstaller hook for `llava_edge`: the engines, which are imported by name, and their data files."""

from __future__ import annotations

from PyInstaller.utils.hooks import collect_data_files, collect_dynamic_libs, copy_metadata

from llava_edge.runtimes import probe

probe.require_working_build()  # the frozen app does not check it

hiddenimports = ["llava_edge.api", "onnxruntime"]
# The files that runtimes/bindings.py executes, and their imports, which PyInstaller does not detect.
datas = collect_data_files("llama_cpp", True, includes=["__init__.py", "_ctypes_extensions.py", "llama_cpp.py"])
hiddenimports += ["ctypes", "functools", "pathlib", "typing_extensions", "warnings"]
binaries = collect_dynamic_libs("llama_cpp")
# Its version is read from there, to find the settings measured for it.
datas += collect_data_files("onnxruntime", True, includes=["__init__.py"])
datas += copy_metadata("llguidance")  # which asks for its version when it is imported
# The sources of the native kernels are part of the key under which they were built for this machine.
datas += collect_data_files("llava_edge.runtimes.native", True, excludes=["**/__pycache__/*"])
# So are those of what computes cached results (runtimes/picture_cache.py).
datas += collect_data_files("llava_edge", True, includes=["anyres.py", "token_budget.py"])
datas += collect_data_files("llava_edge.runtimes", True, includes=["*.py"])
