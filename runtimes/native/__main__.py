"""`python -m llava_edge.runtimes.native`: build and test the native kernels and print which are used."""

from __future__ import annotations

import argparse
import sys

from llava_edge.runtimes import native

if __name__ == "__main__":
    argparse.ArgumentParser(description="Build and test the native kernels of this machine.").parse_args()
    status = native.prepare(lambda line: print(line, file=sys.stderr))
    print(f"Native kernels: {status.reason}", file=sys.stderr)
    sys.exit(1 if status.fix else 0)  # 0 too without a compiler, or if llama.cpp's own kernels are faster
