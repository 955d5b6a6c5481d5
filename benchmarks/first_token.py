"""Times a new process to the first token of an answer about a picture: `llava-edge run` beside llama-cpp-python.

    python benchmarks/first_token.py BUNDLE MMPROJ --image FILE [--threads N] [--repeats N]

Times count from the start of the process, imports and loading included. llama-cpp-python reads the same language.gguf
with its Llava15ChatHandler and an mmproj of the same CLIP (`llava-edge export --emit-mmproj`); both answer with one
token and use the same threads and context. `positions` is the length of each one's prompt. Ours runs with `--no-cache`,
and once more as users run it, when the picture is known from the warm-up.
"""

from __future__ import annotations

import argparse
import base64
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from interleave import report, run_fresh

from llava_edge.bundle import LANGUAGE

QUESTION = "Describe this image in one sentence."
CONTEXT = 2048


def ours(arguments: argparse.Namespace, *options: str) -> None:
    """Run the command line as users do; its times count from its own start."""
    command = [sys.executable, "-m", "llava_edge", "run", "--model", str(arguments.bundle.resolve()), "--json"]
    command += ["--image", str(arguments.image), "--prompt", QUESTION, "--max-tokens", "1"]
    command += ["--threads", str(arguments.threads), "--context", str(CONTEXT), *options, *arguments.ours]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result = json.loads(done.stdout.splitlines()[-1])
    whole, timings = (time.monotonic() - start) * 1000, result["timings"]
    print(json.dumps({"ms": timings["ttft_ms"], "positions": result["prompt_tokens"], **timings, "whole": whole}))


def theirs(arguments: argparse.Namespace) -> None:
    """Use llama-cpp-python as documented, with a short system prompt, as ours has one."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Llava15ChatHandler

    handler = Llava15ChatHandler(str(arguments.mmproj), verbose=False)
    llama = Llama(
        str(arguments.bundle / LANGUAGE), chat_handler=handler, n_ctx=CONTEXT, n_threads=arguments.threads,
        n_threads_batch=arguments.threads, verbose=False,
    )  # fmt: skip
    url = "data:image/jpeg;base64," + base64.b64encode(arguments.image.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": QUESTION}]
    messages: Any = [{"role": "system", "content": arguments.system}, {"role": "user", "content": content}]
    llama.create_chat_completion(messages=messages, max_tokens=1, temperature=0)
    print(json.dumps({"at": time.monotonic(), "positions": llama.n_tokens}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("mmproj", type=Path)
    parser.add_argument("--image", type=Path, required=True, help="JPEG")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="rounds; without one, the first known picture is none")
    parser.add_argument("--system", default="You are a helpful assistant.", help="for llama-cpp-python")
    parser.add_argument(
        "--ours", action="append", default=[], help="further option of `llava-edge run`, e.g. --ours=--verbose"
    )
    parser.add_argument("--worker", choices=("ours", "known", "theirs"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker == "theirs":
        theirs(arguments)
        return
    if arguments.worker:
        ours(arguments, *(["--no-cache"] if arguments.worker == "ours" else []))
        return
    names = {"llava-edge": "ours", "llava-edge, known picture": "known", "llama-cpp-python": "theirs"}
    peers = {name: [sys.executable, *sys.argv, "--worker", worker] for name, worker in names.items()}
    report(run_fresh(peers, arguments.repeats, arguments.warmup), "llava-edge")


if __name__ == "__main__":
    main()
