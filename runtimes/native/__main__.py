"""`python -m llava_edge.runtimes.native`: build the native kernels, try them, say what is used. Part of our set-up."""

from __future__ import annotations

import sys

from llava_edge.runtimes import native

if __name__ == "__main__":
    found = native.prepare(lambda line: print(line, file=sys.stderr))
    print(f"Native kernels: {found.reason}", file=sys.stderr)
    sys.exit(1 if found.fix else 0)  # no failure: a machine that has no compiler, or whose processor has its own ways
