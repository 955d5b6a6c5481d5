"""`llava-edge`, and `python -m llava_edge`: the command line, in peace from its first moment on."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. Ctrl-C ends it without a traceback while its modules are still being imported, too."""
    try:
        from llava_edge import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
