"""Tokens and image embeddings -> logits, by llama.cpp through its C functions.

One context, used by one thread; what its positions hold is the part of kv_cache.py. Knows nothing about prompts, images
or sampling.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Literal

import numpy as np

from llava_edge import gguf
from llava_edge.errors import BundleError, MemoryLimitError, not_finite
from llava_edge.runtimes import CancelledError, bindings, compute, gguf_loading, machine, mapping, native
from llava_edge.runtimes.batch import Batch
from llava_edge.runtimes.kv_cache import PROMPT, Array, Key, KvCache, branch_limit, sequence_limit
from llava_edge.runtimes.native import choice
from llava_edge.runtimes.threads import PassThreads
from llava_edge.runtimes.vocabulary import Vocabulary
from llava_edge.runtimes.worker import POLL_SECONDS, Worker, wait_result

BATCH = 512  # default batch size in positions; cancelling a prompt takes effect after at most one batch
# Positions, about, of a prompt that are evaluated while other answers wait for their next token. With fewer, not all
# weight types would be multiplied by our kernels for many rows (native/choice.py), and rows would have other bits.
SHARED_BATCH = 128
_ABORTED, _NO_MEMORY = 2, -2  # statuses of llama_decode
_NEVER = threading.Event()


class LanguageModel(KvCache):
    """language.gguf, mapped, with a context of `context` positions, and adapter.gguf added to it if there is one.

    As a `KvCache` it can be truncated, saved and shared by branches; here is what evaluates.
    header: of the file, if it has been read and passed `gguf.check_language`.
    threads: 0 is one for each physical core.
    batch: positions per batch. A whole picture should fit: each batch reads and dequantizes all weights again.
    on_load: called with the loaded fraction; returning False stops loading, which then raises `CancelledError`. What it
        raises also stops loading, and is raised here.
    Raises `BundleError` if the file is refused, `MemoryLimitError` if the context does not fit into memory.
    """

    def __init__(
        self,
        path: Path,
        *,
        header: gguf.Gguf | None = None,
        adapter: Path | None = None,
        context: int,
        threads: int = 0,
        batch: int = BATCH,
        gpu_layers: int = 0,
        repack: bool = True,
        kv: Literal["f16", "q8_0"] = "f16",
        verbose: bool = False,
        on_load: Callable[[float], bool] = lambda fraction: True,
    ) -> None:
        header = header or _read_header(path)
        adapter_header = _read_adapter(adapter, header) if adapter else None
        api, self.native = bindings.library(verbose), native.activate()
        repack = repack and choice.should_repack(self.native, {tensor.kind for tensor in header.tensors.values()})
        self._thread: Worker | None = Worker("llama.cpp") if gpu_layers else compute.shared_worker()
        self._last_call: Future[int] = Future()  # of llama_decode
        self.context_size = context
        self.batch = batch
        self.on_gpu = gpu_layers != 0
        self._settings = [gpu_layers, repack, kv, *self.native.identity]
        eight_bits, few_attention = kv == "q8_0", self.native.few_attention and not gpu_layers
        ours = native.computes_all(self.native, header, adapter_header, eight_bits=eight_bits)
        # Whether a row has the same bits alone and in a batch, wherever its prompt lies in the KV cache.
        self.batch_invariant = not gpu_layers and not repack and ours
        # Only where the bits stay the same: llama.cpp's own attention splits float16 keys by the number of threads.
        vary = (eight_bits or native.supports_attention(header, eight_bits=False)) and few_attention
        self._threads = PassThreads(threads or machine.thread_count()[0], vary=vary, all_ours=self.batch_invariant)
        self._native_threads = 0  # as many as llama.cpp's own operations
        settings = gguf_loading.Settings(
            gpu_layers=gpu_layers,
            repack=repack,
            context=context,
            batch=batch,
            sequences=sequence_limit(context, batch),
            eight_bits=eight_bits,
            # Only this reads 8-bit values. By default llama.cpp turns it off if another device would compute it.
            flash_attention=eight_bits or few_attention,
        )
        self._model, pointer = gguf_loading.load(api, path, adapter, settings, on_load)
        super().__init__(api, pointer, branch_limit(context, batch), path)
        self.vocabulary = Vocabulary(api, self._model, path)
        self.hidden_size = int(api.llama_model_n_embd(self._model))
        if repack:  # from now on only the copies are read
            mapping.release_pages(path)
        self._tokens = Batch(api, batch, 0)
        self._embeddings = Batch(api, batch, self.hidden_size)
        self._cancel = threading.Event()
        self._abort = api.ggml_abort_callback(lambda _: self._cancel.is_set())
        self._no_abort = api.ggml_abort_callback()

    def close(self) -> None:
        """Free everything. Harmless when repeated."""
        while self._thread and self._thread.alive and not self._last_call.cancel():  # Ctrl-C may have left it running
            if wait([self._last_call], POLL_SECONDS).done:
                break
        if self.context is not None:
            self._tokens.free()
            self._embeddings.free()
            self.library.llama_free(self.context)
            self.context = None
        if self._model is not None:
            self.library.llama_model_free(self._model)
            self._model = None
        self._thread = None  # the thread ends when no other model uses it

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def evaluate_tokens(
        self, tokens: Sequence[int], cancel: threading.Event = _NEVER, between: Callable[[], None] | None = None
    ) -> None:
        """Append tokens; `logits` then returns those of the last one. Raises `CancelledError`.

        between: called between parts of `SHARED_BATCH` or more positions; it may evaluate other branches.
        """
        for part in self._batches(len(tokens), between):
            chunk = list(tokens[part])
            self._tokens.values[: len(chunk)] = chunk
            self._append(self._tokens, chunk, cancel)

    def evaluate_embeddings(
        self,
        rows: Array,
        keys: Sequence[Key],
        cancel: threading.Event = _NEVER,
        between: Callable[[], None] | None = None,
    ) -> None:
        """Append image embeddings (n, hidden size) float32, one key for each row. Otherwise like `evaluate_tokens`."""
        self._threads.reset()
        for part in self._batches(len(rows), between):
            chunk = list(keys[part])
            self._embeddings.values[: len(chunk)] = rows[part]
            self._append(self._embeddings, chunk, cancel)

    def evaluate_all_logits(self, tokens: Sequence[int], cancel: threading.Event = _NEVER) -> Array:
        """Append up to `batch` tokens; return the logits of each (n, vocab_size). Raises `CancelledError`."""
        self._tokens.values[: len(tokens)] = tokens
        self._append(self._tokens, list(tokens), cancel, outputs=len(tokens))
        return np.stack([self.logits(i) for i in range(len(tokens))])

    def evaluate_branches(self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]) -> None:
        """Append a token to each of several branches; compute the logits of all."""
        self._tokens.values[: len(tokens)] = tokens
        self._tokens.place(positions, len(tokens), sequences)
        self._evaluate(self._tokens, _NEVER, few=True)

    def output_hidden_states(self, enabled: bool) -> None:
        """Let the next evaluations, of single tokens or with all logits, keep the hidden states for `hidden_state`."""
        self.library.llama_set_embeddings(self.context, enabled)

    def hidden_state(self, row: int = -1) -> Array:
        """(hidden_size,) float32 from which a row's logits are computed: a view, valid until the next evaluation."""
        pointer = self.library.llama_get_embeddings_ith(self.context, row)
        values: Array = np.ctypeslib.as_array(pointer, (self.hidden_size,))
        return values

    def logits(self, row: int = -1) -> Array:
        """(vocab_size,) float32 of the last position, or of one from `evaluate_all_logits`: a view, valid until the
        next evaluation. Raises `BundleError` if a value is not finite, after emptying the KV cache.
        """
        pointer = self.library.llama_get_logits_ith(self.context, row)
        values: Array = np.ctypeslib.as_array(pointer, (self.vocabulary.size,))
        if not np.isfinite(values).all():
            self._clear()
            raise not_finite(self._path)
        return values

    def greedy_token(self) -> int:
        """Return the most likely next token; the first one of a tie, as llama.cpp's greedy sampler does."""
        return int(np.argmax(self.logits()))

    @property
    def identity(self) -> list[object]:
        """What results depend on besides files and prompt: the build of llama.cpp, the processor and the settings."""
        folder = Path(self.library.__file__).parent / "lib"
        build = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.iterdir())]
        hardware = [machine.processor(), machine.nvidia_gpus()] if self.on_gpu else machine.processor()
        return [build, hardware, self.context_size, self._threads.maximum, self._settings, self.batch]

    def _batches(self, count: int, between: Callable[[], None] | None) -> Iterator[slice]:
        """Split positions evenly, because a small rest might be computed by other kernels, which round otherwise."""
        parts = max(-(-count // self.batch), count // SHARED_BATCH if between else 0)
        for i in range(parts):
            if between and i:
                between()
            yield slice(count * i // parts, count * (i + 1) // parts)

    def _append(self, batch: Batch, keys: Sequence[Key], cancel: threading.Event, outputs: int = 1) -> None:
        count, start = len(keys), len(self.cached_keys)
        batch.place(range(start, start + count), outputs, [PROMPT] * count)
        try:
            self._evaluate(batch, cancel, few=count == outputs)
        except Exception:
            self.truncate(start)
            raise
        self.cached_keys += keys

    def _evaluate(self, batch: Batch, cancel: threading.Event, *, few: bool) -> None:
        if cancel.is_set():
            raise CancelledError
        self._cancel = cancel
        # The callback is Python and is called between graph nodes; a few tokens are fast enough to do without.
        self.library.llama_set_abort_callback(self.context, self._no_abort if few else self._abort, None)
        threads, self._native_threads = self._threads.choose(batch.handle.n_tokens, self.hidden_size)
        self.library.llama_set_n_threads(self.context, threads, threads)
        assert self._thread is not None, "closed"
        self._last_call = self._thread.submit(self._llama_decode, batch)
        status = wait_result(self._last_call, cancel)
        if status == _ABORTED:
            raise CancelledError
        if status == _NO_MEMORY:
            raise MemoryLimitError("There is not enough memory to compute an answer; use a smaller --context.")
        if status:
            positions = len(self.cached_keys)
            raise BundleError(
                f"llama.cpp failed with status {status} after {positions} positions: {bindings.last_error()}"
            )

    def _llama_decode(self, batch: Batch) -> int:
        """Run in the compute thread. As a bound method it keeps the model from being collected meanwhile."""
        native.set_threads(self._native_threads)
        return int(self.library.llama_decode(self.context, batch.handle))


def _read_header(path: Path) -> gguf.Gguf:
    header = gguf.read(path)
    gguf.check_language(header)
    return header


def _read_adapter(path: Path, base: gguf.Gguf) -> gguf.Gguf:
    header = gguf.read(path)
    gguf.check_adapter(header, base)
    return header
