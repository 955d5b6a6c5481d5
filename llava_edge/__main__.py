"""Entry point of `llava-edge` and `python -m llava_edge`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; Ctrl-C during its imports ends it without a traceback, too."""
    try:
        from llava_edge import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
