"""`python -m llava_edge.runtimes.native`: build the native kernels, try them, say what is used. Part of our set-up."""

from __future__ import annotations

import sys

from llava_edge.runtimes import native

if __name__ == "__main__":
    found = native.prepare(lambda line: print(line, file=sys.stderr))
    print(f"Native kernels: {found.reason}", file=sys.stderr)
