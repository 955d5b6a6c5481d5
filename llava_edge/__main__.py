"""`python -m llava_edge` is the same as `llava-edge`."""

from llava_edge.cli import main

if __name__ == "__main__":
    main()
