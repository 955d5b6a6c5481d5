"""What a download may leave in the place of a file: a Git LFS pointer, or the web page of an error."""

from __future__ import annotations

PREFIX_BYTES = 512  # enough of a file to tell


def describe_placeholder(start: bytes) -> str:
    """Name what a file that starts with `start` is instead, for error messages; empty if it is neither."""
    text = start[:PREFIX_BYTES].decode("utf-8-sig", "ignore").lstrip().lower()
    if text.startswith("version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (run 'git lfs pull' in its folder)"
    if text.startswith(("<!doctype html", "<html", "<?xml")):
        return "a web page, perhaps the error page of a download, not the file itself"
    return ""
