"""Entry point of `llava-edge` and `python -m llava_edge`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; neither Ctrl-C during its imports nor a missing dependency ends it with a traceback."""
    try:
        from llava_edge import cli

        cli.main()
    except ModuleNotFoundError as error:
        from llava_edge.errors import lacking_dependency

        if (problem := lacking_dependency(error)) is None:
            raise
        print(f"llava-edge: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
