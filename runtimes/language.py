"""Tokens and image embeddings -> logits, by llama.cpp through its C functions.

One context, used by one thread. It knows what each position of its KV cache holds, so that a prompt that begins like
the last one is not computed again. Knows nothing about prompts, images or sampling.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from math import inf
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llava_edge import gguf
from llava_edge.errors import BundleError, MemoryLimitError, not_finite
from llava_edge.runtimes import CancelledError, bindings, compute, machine, mapping, native
from llava_edge.runtimes.batch import Batch
from llava_edge.runtimes.native import choice
from llava_edge.runtimes.threads import AdaptiveThreads
from llava_edge.runtimes.vocabulary import Vocabulary
from llava_edge.runtimes.worker import POLL_SECONDS, Worker, wait_result

Array = np.ndarray[Any, Any]
Key = int | tuple[str, int]  # what a position holds: a token id, or (hash of an image, row of its embeddings)

BATCH = 512  # default batch size in positions; cancelling a prompt takes effect after at most one batch
# Multiplications of a product with a square matrix, about 3 ms of one thread. In a larger product the free threads take
# over work from one that shares its processor, so all threads pay off; in a smaller one all wait for it (threads.py).
SMALL_PRODUCT = 1 << 28
# Values of all positions up to which one thread computes what our kernels leave to llama.cpp, such as norms: starting
# others, several times in each block, takes longer.
SMALL_ROWS = 8192
MAX_BRANCHES = 8  # as many rows as `speculation.WIDTHS` allows: more gain little, and answers wait for each other
# Positions, about, of a prompt that are evaluated while other answers wait for their next token. With fewer, not all
# weight types would be multiplied by our kernels for many rows (native/choice.py), and rows would have other bits.
SHARED_BATCH = 128
_SEQUENCE = 0
_ABORTED, _NO_MEMORY = 2, -2  # statuses of llama_decode
_NEVER = threading.Event()


class LanguageModel:
    """language.gguf, mapped, with a context of `context` positions, and adapter.gguf added to it if there is one.

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
        header = gguf.read(path)
        gguf.check_language(header)
        adapter_header = gguf.read(adapter) if adapter is not None else None
        if adapter_header is not None:
            gguf.check_adapter(adapter_header, header)
        self.library = bindings.library(verbose)
        self.native = native.activate()
        repack = repack and choice.should_repack(self.native, {tensor.kind for tensor in header.tensors.values()})
        self._thread: Worker | None = Worker("llama.cpp") if gpu_layers else compute.shared_worker()
        self._last_call: Future[int] = Future()  # of llama_decode
        self.context_size = context
        self.cached_keys: list[Key] = []  # of the positions in the KV cache
        self.batch = batch
        # Sequence 0, the one that `save_state` copies to and ended branches' come on top. llama.cpp aborts if they do
        # not fit.
        self.max_branches = max(0, min(MAX_BRANCHES, context - 3, batch - 3))
        self._copy, self._ended = 1 + self.max_branches, 2 + self.max_branches
        self._has_branches = False
        self._threads = threads or machine.thread_count()[0]
        self._adaptive = AdaptiveThreads(self._threads)
        self._native_threads = 0  # as many as llama.cpp's own operations
        # Only where the bits stay the same: llama.cpp's own attention splits float16 keys by the number of threads.
        same_bits = kv == "q8_0" or native.supports_attention(header)
        self._threads_vary = not gpu_layers and self.native.few_attention and same_bits
        # Whether a row has the same bits alone and in a batch, wherever its prompt lies in the KV cache.
        ours = native.computes_all(self.native, header, adapter_header)
        self.batch_invariant = not gpu_layers and not repack and kv == "f16" and ours
        self._kv = kv
        self.on_gpu = gpu_layers != 0
        self._settings = [gpu_layers, repack, kv, *self.native.identity]
        self._model: Any = None
        self.context: Any = None
        self._path = path
        self._load(gpu_layers, repack, on_load)
        self.vocabulary = Vocabulary(self.library, self._model, path)
        self.hidden_size = int(self.library.llama_model_n_embd(self._model))
        lora = self._load_adapter(adapter) if adapter is not None else None
        self._open_context()
        if repack:  # from now on only the copies are read
            mapping.release_pages(path)
        self._tokens = Batch(self.library, batch, 0)
        self._embeddings = Batch(self.library, batch, self.hidden_size)
        if lora is not None:
            self._apply_adapter(lora)

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

    def common_prefix(self, keys: Sequence[Key]) -> int:
        """Return the length of the common prefix of the KV cache and `keys`, always below `len(keys)`."""
        length = 0
        while length < min(len(self.cached_keys), len(keys) - 1) and self.cached_keys[length] == keys[length]:
            length += 1
        return length

    def keep_common_prefix(self, keys: Sequence[Key]) -> int:
        """Remove everything else from the KV cache; return the length of that prefix."""
        length = self.common_prefix(keys)
        self.truncate(length)
        return length

    def save_state(self, count: int, max_bytes: float = inf) -> memoryview | None:
        """Return the first `count` positions of the KV cache in llama.cpp's format; None if larger than `max_bytes`.

        Raises `MemoryError`.
        """
        api, copy = self.library, self._copy
        api.llama_memory_seq_cp(self._memory, _SEQUENCE, copy, 0, count)
        try:
            size = api.llama_state_seq_get_size(self.context, copy)
            if size > max_bytes:
                return None
            state = np.empty(size, np.uint8)
            written = api.llama_state_seq_get_data(self.context, _byte_pointer(state), size, copy)
            return state[:written].data
        finally:
            api.llama_memory_seq_rm(self._memory, copy, -1, -1)

    def restore_state(self, state: bytes | memoryview, keys: Sequence[Key]) -> bool:
        """Load what `save_state` returned when the KV cache held `keys`; return whether that succeeded.

        llama.cpp trusts these bytes: only what this program wrote may be passed. A failure leaves an empty KV cache,
        because llama.cpp leaves parts of the state behind: `BundleError` if that ends branches.
        """
        self.truncate(0)
        source = _byte_pointer(np.frombuffer(state, np.uint8))
        read = self.library.llama_state_seq_set_data(self.context, source, len(state), _SEQUENCE)
        first = self.library.llama_memory_seq_pos_min(self._memory, _SEQUENCE)
        last = self.library.llama_memory_seq_pos_max(self._memory, _SEQUENCE)
        if (read, first, last) == (len(state), 0, len(keys) - 1):
            self.cached_keys = list(keys)
            return True
        self._clear()
        if self._has_branches:
            raise BundleError(f"llama.cpp refused a saved state of {self._path}; run 'llava-edge cache clear'.")
        return False

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
        self._adaptive.reset()  # until now our threads waited for processors that CLIP's threads used
        for part in self._batches(len(rows), between):
            chunk = list(keys[part])
            self._embeddings.values[: len(chunk)] = rows[part]
            self._append(self._embeddings, chunk, cancel)

    def evaluate_all_logits(self, tokens: Sequence[int], cancel: threading.Event = _NEVER) -> Array:
        """Append up to `batch` tokens; return the logits of each (n, vocab_size). Raises `CancelledError`."""
        self._tokens.values[: len(tokens)] = tokens
        self._append(self._tokens, list(tokens), cancel, outputs=len(tokens))
        return np.stack([self.logits(i) for i in range(len(tokens))])

    def start_branch(self, branch: int) -> None:
        """Let a sequence share all positions of the KV cache. For `Branches`, as are the next three."""
        self._has_branches = True
        self.library.llama_memory_seq_cp(self._memory, _SEQUENCE, branch, -1, -1)

    def end_branch(self, branch: int, shared: int) -> None:
        """Empty a sequence. From `shared` on its positions stay in their places, unseen, until `clear_branches`."""
        self.library.llama_memory_seq_cp(self._memory, branch, self._ended, shared, -1)
        self.library.llama_memory_seq_rm(self._memory, branch, -1, -1)

    def clear_branches(self) -> None:
        """Remove all positions that only branches have."""
        self._has_branches = False
        for sequence in range(1, 1 + self._ended):
            self.library.llama_memory_seq_rm(self._memory, sequence, -1, -1)

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

    def truncate(self, length: int) -> None:
        """Remove every position from `length` on, including what llama.cpp left there after an abort.

        If llama.cpp cannot, the KV cache is emptied: `BundleError` if that ends branches or loses the first positions.
        """
        del self.cached_keys[length:]
        if not self.library.llama_memory_seq_rm(self._memory, _SEQUENCE, length, -1):
            self._clear()
            if length or self._has_branches:
                raise BundleError(f"llama.cpp cannot remove the last positions from the KV cache of {self._path}.")

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
        return [build, hardware, self.context_size, self._threads, self._settings, self.batch]

    def _clear(self) -> None:
        """Empty the KV cache, its data too: a masked key has weight zero, and zero times NaN is NaN."""
        self.library.llama_memory_clear(self._memory, True)
        self.cached_keys.clear()

    def _load(self, gpu_layers: int, repack: bool, on_load: Callable[[float], bool]) -> None:
        api = self.library
        errors: list[BaseException] = []

        def progress(fraction: float, _: Any) -> bool:
            try:
                if not errors and not on_load(fraction):
                    errors.append(CancelledError())
            except BaseException as error:  # noqa: BLE001 - C cannot pass it on
                errors.append(error)
            return not errors

        settings = api.llama_model_default_params()
        settings.n_gpu_layers = gpu_layers
        no_devices = (ctypes.c_void_p * 1)()  # else large products go to a GPU even without layers on it
        if not gpu_layers:
            settings.devices = ctypes.addressof(no_devices)
        settings.load_mode = api.LLAMA_LOAD_MODE_MMAP
        settings.use_extra_bufts = repack
        callback = api.llama_progress_callback(progress)
        settings.progress_callback = callback
        # In a thread that ends: repacking weights starts OpenMP threads for the thread that loads (compute.py).
        bindings.errors.clear()
        loader = Worker("llama.cpp loading")
        try:
            self._model = loader.submit(api.llama_model_load_from_file, os.fsencode(self._path), settings).result()
        finally:
            loader.shutdown()
        if errors:
            self.close()
            raise errors[0]
        if not self._model:
            if any("allocate" in error for error in bindings.errors):
                raise MemoryLimitError(f"There is not enough memory to load {self._path}: {bindings.errors[0]}")
            raise BundleError(f"llama.cpp cannot load {self._path}: {bindings.last_error()}")

    def _open_context(self) -> None:
        api = self.library
        settings = api.llama_context_default_params()
        settings.n_ctx = self.context_size
        settings.n_batch = settings.n_ubatch = self.batch
        settings.n_threads = settings.n_threads_batch = self._threads
        settings.n_seq_max = min(3 + self.max_branches, self.context_size)
        settings.kv_unified = True  # sequences share the positions of a common prefix
        if self._kv == "q8_0":
            settings.type_k = settings.type_v = api.GGML_TYPE_Q8_0
        # Only flash attention reads 8-bit values. By default llama.cpp turns it off if another device would compute it.
        if self._kv == "q8_0" or (self.native.few_attention and not self.on_gpu):
            settings.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = api.llama_init_from_model(self._model, settings)
        if not self.context:
            self.context = None
            self.close()
            raise MemoryLimitError(
                f"llama.cpp cannot create a context of {self.context_size} positions: {bindings.last_error()} "
                "Use a smaller --context."
            )
        self._memory = api.llama_get_memory(self.context)
        self._cancel = threading.Event()
        self._abort = api.ggml_abort_callback(lambda _: self._cancel.is_set())
        self._no_abort = api.ggml_abort_callback()

    def _load_adapter(self, adapter: Path) -> Any:
        """Load the adapter, which llama.cpp frees together with the model."""
        loaded = self.library.llama_adapter_lora_init(self._model, os.fsencode(adapter))
        if not loaded:
            self.close()
            raise BundleError(f"llama.cpp cannot load {adapter}: {bindings.last_error()}")
        return loaded

    def _apply_adapter(self, lora: Any) -> None:
        handles, scales = (self.library.llama_adapter_lora_p_ctypes * 1)(lora), (ctypes.c_float * 1)(1.0)
        if self.library.llama_set_adapters_lora(self.context, handles, 1, scales):
            self.close()
            raise BundleError(f"llama.cpp cannot apply the adapter of {self._path}: {bindings.last_error()}")

    def _batches(self, count: int, between: Callable[[], None] | None) -> Iterator[slice]:
        """Split positions evenly, because a small rest might be computed by other kernels, which round otherwise."""
        parts = max(-(-count // self.batch), count // SHARED_BATCH if between else 0)
        for i in range(parts):
            if between and i:
                between()
            yield slice(count * i // parts, count * (i + 1) // parts)

    def _append(self, batch: Batch, keys: Sequence[Key], cancel: threading.Event, outputs: int = 1) -> None:
        count, start = len(keys), len(self.cached_keys)
        batch.place(range(start, start + count), outputs, [_SEQUENCE] * count)
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
        if self._threads_vary:
            self._set_threads(batch.handle.n_tokens)
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

    def _set_threads(self, positions: int) -> None:
        small = positions * self.hidden_size**2 < SMALL_PRODUCT
        if not small:
            self._adaptive.reset()
        threads = self._native_threads = self._adaptive.next() if small else self._threads
        if self.batch_invariant and positions * self.hidden_size <= SMALL_ROWS:
            threads = 1
        self.library.llama_set_n_threads(self.context, threads, threads)

    def _llama_decode(self, batch: Batch) -> int:
        """Run in the compute thread. As a bound method it keeps the model from being collected meanwhile."""
        native.set_threads(self._native_threads)
        return int(self.library.llama_decode(self.context, batch.handle))


def _byte_pointer(array: Array) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
