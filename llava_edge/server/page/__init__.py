"""The chat page: one HTML file with inline style and script, and its example photos."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files


class Page:
    """html: the file. headers: a CSP that allows exactly its inline content. examples: JPEG files by name."""

    def __init__(self) -> None:
        folder = files(__name__)
        self.html = (folder / "index.html").read_text("utf-8")
        policy = [
            "default-src 'none'",
            "img-src 'self' data: blob:",
            "connect-src 'self'",
            f"style-src {self._hashes('style')}",
            f"script-src {self._hashes('script')}",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
        self.headers = {"Content-Security-Policy": "; ".join(policy)}
        pictures = [file for file in folder.iterdir() if file.name.endswith(".jpg")]
        self.examples = {file.name: file.read_bytes() for file in pictures}

    def _hashes(self, tag: str) -> str:
        """CSP hashes of the contents of all `tag` elements."""
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", self.html, re.DOTALL)
        digests = [hashlib.sha256(content.encode("utf-8")).digest() for content in contents]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode('ascii')}'" for digest in digests)
