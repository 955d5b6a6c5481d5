"""Tokens and image embeddings -> logits, by llama.cpp through its C functions.

One context, one sequence, used by one thread. It remembers what each position of its memory holds, so that a prompt
that begins like the last one is not computed again. Knows nothing about prompts, images or sampling strategy.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llava_edge import gguf
from llava_edge.errors import BundleError, ContextOverflowError, MemoryLimitError
from llava_edge.runtimes import CancelledError, bindings, compute, devices, limit_spinning, mapping, native
from llava_edge.runtimes.batch import Batch
from llava_edge.runtimes.jobs import POLL_SECONDS, Worker, wait_result
from llava_edge.runtimes.native import choice
from llava_edge.runtimes.threads import Threads

Array = np.ndarray[Any, Any]
Key = int | tuple[str, int]  # what a position holds: a token id, or (hash of an image, row of its embeddings)

BATCH = 512  # positions evaluated at once, unless more are asked for; a cancelled prompt stops within one such chunk
# Multiplications of a product with a square matrix, about 3 ms of a thread: then those who are free take more parts of
# it than one who shares its processor, and all threads pay. In smaller ones all wait for that one, see threads.py.
SMALL = 1 << 28
MAX_TEXT_BYTES = 1 << 20  # tokenizers have had overflows in long texts; a prompt of this size fits no context anyway
MAX_BRANCHES = 8  # as many rows as `speculation.WIDTH`: more gain little, and their answers wait for each other
_SEQUENCE = 0
_ABORTED = 2  # llama_decode


class LanguageModel:
    """language.gguf, mapped, with a context of `context` positions, and adapter.gguf added to it if there is one.

    threads: 0 is one for each physical core.
    batch: positions evaluated at once. All of a picture should fit: each batch reads and unpacks all weights again.
    on_load: called with the loaded fraction; returning False stops loading, which then raises `CancelledError`. What it
        raises stops loading, too, and is raised here.
    Raises `BundleError` when the file is refused, `MemoryLimitError` when the context does not fit into memory.
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
        if adapter is not None:
            gguf.check_adapter(gguf.read(adapter), header)
        self.library = library(verbose)
        self.native = native.activate()
        repack = repack and choice.reordering_pays(self.native, {tensor.kind for tensor in header.tensors.values()})
        self._thread: Worker | None = Worker("llama.cpp") if gpu_layers else compute.thread()
        self._decoded: Future[int] = Future()  # the last call
        self.context_size = context
        self.held: list[Key] = []
        self.batch = batch
        # One more sequence is memory itself, and one what `save` saves of it. llama.cpp aborts with more than room.
        self.max_branches = max(0, min(MAX_BRANCHES, context - 2, batch - 2))
        self._threads = threads or devices.thread_count()[0]
        self._team = Threads(self._threads)
        # With the same bits: llama.cpp's own attention divides float16 keys among its threads.
        self._threads_vary = not gpu_layers and self.native.few_attention and (kv == "q8_0" or native.attends(header))
        self._kv = kv
        self.on_gpu = gpu_layers != 0
        self._settings = [gpu_layers, repack, kv, *self.native.identity]
        self._model: Any = None
        self.context: Any = None
        self._path = path
        self._load(gpu_layers, repack, on_load)
        self.vocabulary = self.library.llama_model_get_vocab(self._model)
        self.vocab_size = int(self.library.llama_vocab_n_tokens(self.vocabulary))
        self.hidden_size = int(self.library.llama_model_n_embd(self._model))
        self._lora = self._load_adapter(adapter) if adapter is not None else None
        self._open_context()
        if repack:  # the copies are what is multiplied from now on
            mapping.let_go(path)
        self._tokens = Batch(self.library, batch, 0)
        self._embeddings = Batch(self.library, batch, self.hidden_size)

    def close(self) -> None:
        """Free everything; harmless when repeated."""
        while self._thread and self._thread.alive and not self._decoded.cancel():  # Ctrl-C may have left it
            if wait([self._decoded], POLL_SECONDS).done:
                break
        if self.context is not None:
            self._tokens.free()
            self._embeddings.free()
            self.library.llama_free(self.context)
            self.context = None
        if self._model is not None:
            self.library.llama_model_free(self._model)
            self._model = None
        self._thread = None  # it ends when no other model has it

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of plain text. Nothing in it becomes a control token, and none is added."""
        return self._tokenize(text.encode("utf-8", "replace"), special=False)

    def control_id(self, name: str) -> int:
        """Id of a control token such as `</s>`. Raises `BundleError` if the vocabulary has none of that name."""
        found = self._tokenize(name.encode(), special=True)
        if len(found) == 1 and self.library.llama_vocab_is_control(self.vocabulary, found[0]):
            return found[0]
        raise BundleError(f"{self._path} has no control token {name!r}, which the bundle's prompt template needs.")

    def piece(self, token: int) -> bytes:
        """Bytes of a token; control tokens have none."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            written = self.library.llama_token_to_piece(self.vocabulary, token, buffer, size, 0, False)
            if written >= 0:
                return buffer.raw[:written]
            size = -written

    @cached_property
    def unseen(self) -> Array:
        """Ids of tokens that have no bytes and end no answer: control tokens, and the unknown one."""
        library = self.library
        kinds = library.LLAMA_TOKEN_ATTR_CONTROL | library.LLAMA_TOKEN_ATTR_UNKNOWN
        unseen = [
            token
            for token in range(self.vocab_size)
            if library.llama_vocab_get_attr(self.vocabulary, token) & kinds and not self.ends(token)
        ]
        return np.array(unseen, np.intp)

    def token_texts(self) -> list[str]:
        """Every token as the vocabulary writes it, e.g. `▁US`."""
        get = self.library.llama_vocab_get_text
        return [get(self.vocabulary, i).decode("utf-8", "replace") for i in range(self.vocab_size)]

    def ends(self, token: int) -> bool:
        """Whether the vocabulary marks a token as the end of an answer."""
        return bool(self.library.llama_vocab_is_eog(self.vocabulary, token))

    def common(self, keys: Sequence[Key]) -> int:
        """Length of the common beginning of memory and `keys`, always below `len(keys)`."""
        same = 0
        while same < min(len(self.held), len(keys) - 1) and self.held[same] == keys[same]:
            same += 1
        return same

    def keep(self, keys: Sequence[Key]) -> int:
        """Forget all but that beginning; return its length."""
        same = self.common(keys)
        self.forget(same)
        return same

    def save(self, count: int, most: float = inf) -> memoryview | None:
        """The first `count` positions that memory holds, in llama.cpp's own form; None if these are over `most` bytes.

        Raises `MemoryError`.
        """
        api, apart = self.library, 1 + self.max_branches
        api.llama_memory_seq_cp(self._memory, _SEQUENCE, apart, 0, count)
        try:
            size = api.llama_state_seq_get_size(self.context, apart)
            if size > most:
                return None
            state = np.empty(size, np.uint8)
            written = api.llama_state_seq_get_data(self.context, _bytes(state), size, apart)
            return state[:written].data
        finally:
            api.llama_memory_seq_rm(self._memory, apart, -1, -1)

    def restore(self, state: bytes | memoryview, keys: Sequence[Key]) -> bool:
        """Let memory hold what `save` returned when it held `keys`; whether that worked.

        llama.cpp trusts these bytes: only what this program wrote may come here. After a failure everything is
        forgotten, in a context made anew, because llama.cpp leaves parts behind.
        """
        self.library.llama_memory_clear(self._memory, False)
        self.held.clear()
        source = _bytes(np.frombuffer(state, np.uint8))
        read = self.library.llama_state_seq_set_data(self.context, source, len(state), _SEQUENCE)
        first = self.library.llama_memory_seq_pos_min(self._memory, _SEQUENCE)
        last = self.library.llama_memory_seq_pos_max(self._memory, _SEQUENCE)
        if (read, first, last) == (len(state), 0, len(keys) - 1):
            self.held = list(keys)
            return True
        self.library.llama_free(self.context)
        self._open_context()
        return False

    def evaluate_tokens(self, tokens: Sequence[int], cancel: threading.Event) -> None:
        """Append tokens. The logits of the last one can be sampled from afterwards. Raises `CancelledError`."""
        for start in range(0, len(tokens), self.batch):
            part = list(tokens[start : start + self.batch])
            self._tokens.values[: len(part)] = part
            self._decode(self._tokens, part, cancel)

    def evaluate_embeddings(self, rows: Array, keys: Sequence[Key], cancel: threading.Event) -> None:
        """Append image embeddings (n, hidden size) float32, known by `keys`. Raises `CancelledError`."""
        self._team.pause()  # CLIP, whose threads compute until now, had processors that ours waited for
        for start in range(0, len(rows), self.batch):
            part = list(keys[start : start + self.batch])
            self._embeddings.values[: len(part)] = rows[start : start + self.batch]
            self._decode(self._embeddings, part, cancel)

    def evaluate_all(self, tokens: Sequence[int], cancel: threading.Event) -> Array:
        """Append up to `batch` tokens; return the logits of each (n, vocab_size). Raises `CancelledError`."""
        self._tokens.values[: len(tokens)] = tokens
        self._decode(self._tokens, list(tokens), cancel, wanted=len(tokens))
        return np.stack([self.logits(i) for i in range(len(tokens))])

    def branch(self, count: int) -> None:
        """Let sequences 1 to `count` hold what memory holds, and the others nothing. For `Branches`."""
        for sequence in range(1, 1 + self.max_branches):
            self.library.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            if sequence <= count:
                self.library.llama_memory_seq_cp(self._memory, _SEQUENCE, sequence, -1, -1)

    def evaluate_at(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: int,
        cancel: threading.Event,
    ) -> None:
        """Append tokens to sequences that `branch` made; logits are wanted of the last. Raises `CancelledError`."""
        self._tokens.values[: len(tokens)] = tokens
        self._tokens.place(positions, wanted, sequences)
        self._run(self._tokens, cancel, quick=len(tokens) == wanted)

    def show_states(self, shown: bool) -> None:
        """Let the next evaluations, of single tokens or all of a batch, keep the hidden states for `state`."""
        self.library.llama_set_embeddings(self.context, shown)

    def state(self, row: int = -1) -> Array:
        """(hidden_size,) float32 that the logits of a row come from: a view, valid until the next evaluation."""
        pointer = self.library.llama_get_embeddings_ith(self.context, row)
        values: Array = np.ctypeslib.as_array(pointer, (self.hidden_size,))
        return values

    def forget(self, length: int) -> None:
        """Forget every position from `length` on, whatever llama.cpp holds there after an abort."""
        del self.held[length:]
        if not self.library.llama_memory_seq_rm(self._memory, _SEQUENCE, length, -1):
            self.library.llama_memory_clear(self._memory, True)
            self.held.clear()
            if length:
                raise BundleError(f"llama.cpp cannot drop the end of its memory for {self._path}.")

    def logits(self, row: int = -1) -> Array:
        """(vocab_size,) float32 of the last position, or of one that `evaluate_all` appended: a view, valid until the
        next evaluation. Raises `BundleError` if a value is not finite, and forgets everything.
        """
        pointer = self.library.llama_get_logits_ith(self.context, row)
        values: Array = np.ctypeslib.as_array(pointer, (self.vocab_size,))
        if not np.isfinite(values).all():
            # With its data: a hidden key counts with a weight of zero, which is no help against NaN.
            self.library.llama_memory_clear(self._memory, True)
            self.held.clear()
            raise BundleError(f"{self._path} gave numbers that are not finite. Run 'llava-edge verify' on the bundle.")
        return values

    def best(self) -> int:
        """The most likely token after the last position; the first of equals, as llama.cpp's greedy sampler takes."""
        return int(np.argmax(self.logits()))

    @property
    def identity(self) -> list[object]:
        """What its results depend on besides files and prompt: this build of llama.cpp, processor and settings."""
        folder = Path(self.library.__file__).parent / "lib"
        build = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.iterdir())]
        computes = [devices.processor(), devices.graphics()] if self.on_gpu else devices.processor()
        return [build, computes, self.context_size, self._threads, self._settings, self.batch]

    def _load(self, gpu_layers: int, repack: bool, on_load: Callable[[float], bool]) -> None:
        api = self.library
        stopped: list[BaseException] = []

        def progress(fraction: float, _: Any) -> bool:
            try:
                if not stopped and not on_load(fraction):
                    stopped.append(CancelledError())
            except BaseException as error:  # noqa: BLE001 - C cannot pass it on
                stopped.append(error)
            return not stopped

        settings = api.llama_model_default_params()
        settings.n_gpu_layers = gpu_layers
        none = (ctypes.c_void_p * 1)()  # or llama.cpp lends large products to a GPU whatever is said of layers
        if not gpu_layers:
            settings.devices = ctypes.addressof(none)
        settings.load_mode = api.LLAMA_LOAD_MODE_MMAP
        settings.use_extra_bufts = repack
        callback = api.llama_progress_callback(progress)
        settings.progress_callback = callback
        # In a thread that ends: re-ordering weights starts OpenMP threads for whoever loads (compute.py).
        _errors.clear()
        loader = Worker("llama.cpp loading")
        try:
            self._model = loader.submit(api.llama_model_load_from_file, os.fsencode(self._path), settings).result()
        finally:
            loader.shutdown()
        if stopped:
            self.close()
            raise stopped[0]
        if not self._model:
            if any("allocate" in error for error in _errors):
                raise MemoryLimitError(f"There is too little memory to load {self._path}: {_errors[0]}")
            raise BundleError(f"llama.cpp cannot load {self._path}: {last_error()}")

    def _open_context(self) -> None:
        api = self.library
        settings = api.llama_context_default_params()
        settings.n_ctx = self.context_size
        settings.n_batch = settings.n_ubatch = self.batch
        settings.n_threads = settings.n_threads_batch = self._threads
        settings.n_seq_max = min(2 + self.max_branches, self.context_size)
        settings.kv_unified = True  # sequences share positions they begin with
        if self._kv == "q8_0":
            settings.type_k = settings.type_v = api.GGML_TYPE_Q8_0
        # Nothing else reads values of 8 bits. And by itself llama.cpp leaves it off where another device takes it.
        if self._kv == "q8_0" or (self.native.few_attention and not self.on_gpu):
            settings.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = api.llama_init_from_model(self._model, settings)
        if not self.context:
            self.context = None
            self.close()
            raise MemoryLimitError(
                f"llama.cpp cannot make a context of {self.context_size} positions: {last_error()} "
                "Use a smaller --context."
            )
        self._memory = api.llama_get_memory(self.context)
        self._cancel = threading.Event()
        self._abort = api.ggml_abort_callback(lambda _: self._cancel.is_set())
        self._never = api.ggml_abort_callback()
        if self._lora is not None:
            handles, one = (api.llama_adapter_lora_p_ctypes * 1)(self._lora), (ctypes.c_float * 1)(1.0)
            if api.llama_set_adapters_lora(self.context, handles, 1, one):
                self.close()
                raise BundleError(f"llama.cpp cannot add the adapter of {self._path}: {last_error()}")

    def _load_adapter(self, adapter: Path) -> Any:
        """llama.cpp frees an adapter with its model."""
        loaded = self.library.llama_adapter_lora_init(self._model, os.fsencode(adapter))
        if not loaded:
            self.close()
            raise BundleError(f"llama.cpp cannot add {adapter}: {last_error()}")
        return loaded

    def _tokenize(self, text: bytes, special: bool) -> list[int]:
        if self.library.llama_vocab_type(self.vocabulary) == self.library.LLAMA_VOCAB_TYPE_NONE:
            raise BundleError(f"{self._path} has no tokenizer.")
        if len(text) > MAX_TEXT_BYTES:
            raise ContextOverflowError(f"The prompt has {len(text)} bytes; at most {MAX_TEXT_BYTES} are accepted.")
        room = len(text) + 2  # a token has at least one byte; one more for SentencePiece's dummy prefix
        buffer = (self.library.llama_token * room)()
        count = self.library.llama_tokenize(self.vocabulary, text, len(text), buffer, room, False, special)
        if count < 0:
            raise BundleError(
                f"{self._path} needs {-count} tokens for a text of {len(text)} bytes: a broken vocabulary."
            )
        return list(buffer[:count])

    def _decode(self, batch: Batch, keys: Sequence[Key], cancel: threading.Event, wanted: int = 1) -> None:
        count, start = len(keys), len(self.held)
        batch.place(range(start, start + count), wanted, [_SEQUENCE] * count)
        try:
            self._run(batch, cancel, quick=count == wanted)
        except (CancelledError, BundleError):
            self.forget(start)
            raise
        self.held += keys

    def _run(self, batch: Batch, cancel: threading.Event, *, quick: bool) -> None:
        if cancel.is_set():
            raise CancelledError
        self._cancel = cancel
        # The callback is asked between graph nodes and is Python, so a few tokens, which are quick, go without.
        self.library.llama_set_abort_callback(self.context, self._never if quick else self._abort, None)
        if self._threads_vary:
            small = batch.handle.n_tokens * self.hidden_size**2 < SMALL
            if not small:
                self._team.pause()
            threads = self._team.next() if small else self._threads
            self.library.llama_set_n_threads(self.context, threads, threads)
        assert self._thread is not None, "closed"
        self._decoded = self._thread.submit(self._call, batch)
        status = wait_result(self._decoded, cancel)
        if status == _ABORTED:
            raise CancelledError
        if status:
            raise BundleError(f"llama.cpp failed with status {status} after {len(self.held)} positions: {last_error()}")

    def _call(self, batch: Batch) -> int:
        """In the thread that computes: who holds this is not collected, and so not freed, before it ends."""
        return int(self.library.llama_decode(self.context, batch.handle))


def _bytes(array: Array) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


_errors: deque[str] = deque(maxlen=4)
_keep: list[Any] = []  # callbacks that C holds pointers to
_ERROR = 4  # of ggml_log_level
_verbose = False


def library(verbose: bool = False) -> Any:
    """llama.cpp's C functions, with its log kept quiet unless `verbose`. Untyped, hence Any.

    The one way to them, so that no thread spins whoever loads llama.cpp.
    """
    global _verbose
    _verbose = verbose
    limit_spinning()
    api = bindings.functions()
    if not _keep:
        _keep.append(api.llama_log_callback(_log))
        api.llama_log_set(_keep[0], None)
        api.llama_backend_init()
    return api


def last_error() -> str:
    """What llama.cpp last complained about, as a sentence."""
    return _errors[-1] if _errors else "it gives no reason."


def _log(level: int, text: bytes, _: Any) -> None:
    message = text.decode("utf-8", "replace")
    if level == _ERROR and message.strip():
        _errors.append(message.strip().splitlines()[0][:300].rstrip(".") + ".")
    if _verbose:
        sys.stderr.write(message)
