"""Messages, images and options -> requests: first their types, before anything is queued, then whether they fit."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import closing

import numpy as np

from llava_edge import prompt
from llava_edge.bundle import Manifest
from llava_edge.errors import ContextOverflowError, UsageError
from llava_edge.image import ImageInput
from llava_edge.options import Options
from llava_edge.runtimes.constraints import constraint
from llava_edge.runtimes.decoding import Answer
from llava_edge.runtimes.jobs import Job
from llava_edge.runtimes.loading import LoadedModel
from llava_edge.runtimes.parallel import Request
from llava_edge.runtimes.pictures import Picture, RecentPictures, apply_token_budget, check_budget
from llava_edge.runtimes.prefill import split_segments
from llava_edge.runtimes.stats import RequestStats
from llava_edge.runtimes.text import TextStream
from llava_edge.runtimes.tokenization import prompt_encoder
from llava_edge.templates import get_template


def check_request(
    conversations: Sequence[Sequence[prompt.Message]],
    options: Options | None = None,
    cancel: threading.Event | None = None,
) -> None:
    """Raise `UsageError` for arguments of a wrong type, which would otherwise fail later and look like a bug of ours.

    Also for a question without text and picture, for which a model would make something up.
    """
    for value, kind in ((options, Options), (cancel, threading.Event)):
        if value is not None and not isinstance(value, kind):
            raise UsageError(f"Expected an object of {kind.__name__}, not {value!r:.60}.")
    for messages in conversations:
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            raise UsageError(f"Expected a list of Message, not {messages!r:.60}.")
        for message in messages:
            if not isinstance(message, prompt.Message):
                raise UsageError(f"Expected a Message, not {message!r:.60}.")
            if not isinstance(message.text, str):
                raise UsageError(f"Expected a text for a message, not {message.text!r:.60}.")
            if not isinstance(message.images, int) or message.images < 0:
                raise UsageError(f"Expected a number of images for a message, not {message.images!r:.60}.")
        if messages and messages[-1].role == "user" and not (messages[-1].text.strip() or messages[-1].images):
            raise UsageError("The question is empty; expected a text, a picture or both.")


class Preparer:
    """Turns messages and images into requests that a loaded model can compute."""

    def __init__(self, manifest: Manifest, model: LoadedModel, recent: RecentPictures) -> None:
        self._manifest = manifest
        self._model = model
        self._recent = recent
        self._encode = prompt_encoder(model.language.vocabulary, manifest, unclosed=True)
        self._template = get_template(manifest.template)
        self._end_tokens = {model.language.vocabulary.control_id(name) for name in self._template.stop_tokens}

    def prepare(
        self,
        job: Job,
        messages: Sequence[prompt.Message],
        images: Sequence[ImageInput | Picture],
        options: Options,
        stats: RequestStats,
    ) -> Request:
        """Prepare pictures and check everything that can be checked before any model runs.

        Raises `ImageError`, `MissingError`, `UsageError` or `ContextOverflowError`.
        """
        check_slots(messages, images)
        ids = self.encode(messages)
        self.check_options(options)
        if self._manifest.preprocessing.square != "anyres":  # the number of positions is known before a file is opened
            rows = options.image_tokens or self._manifest.vision.image_tokens
            self._check_fits(ids, [rows] * len(images), messages)
        prepared = self._recent.prepare_all(images)
        pictures = [apply_token_budget(picture, options, self._manifest) for picture in prepared]
        rows_of_images = [len(picture.rows) for picture in pictures]
        stats.image_tokens = sum(rows_of_images)
        stats.prompt_tokens = self._check_fits(ids, rows_of_images, messages)
        # A prepared picture that is given twice took its time once; a file that is named twice was read twice.
        distinct = {id(picture): picture for picture in prepared}.values()
        stats.preprocess_ms = sum(picture.preprocess_ms for picture in distinct)
        stats.image_ms = sum(picture.image_ms for picture in distinct)
        continued = messages[-1].role == "assistant" and messages[-1].text[-1:].strip() != ""
        stream = TextStream((*options.stop, *self._template.stop_sequences), continued=continued)
        max_tokens = min(options.max_tokens, self._model.preset.context - stats.prompt_tokens)
        answer = Answer(self._model.language, self._end_tokens, stream, max_tokens, stats, job, options.top_logprobs)
        return Request(split_segments(ids, pictures), answer, options)

    def check_options(self, options: Options) -> None:
        """Raise `UsageError` for options that suit no question to this model."""
        check_budget(options, self._manifest)
        if options.grammar:
            language = self._model.language
            with closing(constraint(language.library, language.vocabulary, options.grammar)) as grammar:
                grammar.allowed(np.arange(1))  # raises where the first token already takes too much work

    def check_context(
        self, conversations: Sequence[Sequence[prompt.Message]], pictures: Sequence[Picture], options: Options
    ) -> None:
        """Raise `ContextOverflowError` for the first conversation that does not fit, numbered if several are given.

        Raises `UsageError` for invalid conversations, or a number of pictures that they do not have.
        """
        rows = [len(apply_token_budget(picture, options, self._manifest).rows) for picture in pictures]
        for number, messages in enumerate(conversations, 1):
            check_slots(messages, pictures)
            try:
                self._check_fits(self.encode(messages), rows, messages)
            except ContextOverflowError as error:
                prefix = f"Question {number}: " if len(conversations) > 1 else ""
                raise ContextOverflowError(f"{prefix}{error}") from error

    def encode(self, messages: Sequence[prompt.Message]) -> list[int]:
        """Return token ids. Raises `UsageError`, or `ContextOverflowError` for what is far too long to be tokenized."""
        size = sum(len(message.text.encode("utf-8", "replace")) for message in messages)
        if size > self._model.preset.context * 64:  # no vocabulary here has tokens of 64 bytes on average
            raise ContextOverflowError(
                f"The messages have {size} bytes of text, far more than a context of {self._model.preset.context} "
                "holds. Use a shorter text."
            )
        return self._encode(messages)

    def _check_fits(self, ids: list[int], rows: list[int], messages: Sequence[prompt.Message]) -> int:
        """Return the positions of a prompt; `rows` is the number for each image. Raises `ContextOverflowError`."""
        context, of_text, of_images = self._model.preset.context, len(ids) - len(rows), sum(rows)
        positions = of_text + of_images
        if positions < context:
            return positions
        text = "a shorter conversation" if any(turn.role == "assistant" for turn in messages) else "a shorter text"
        remedies = ["fewer images"] if of_images > positions // 2 else [text]
        if context < (max_context := self._manifest.language.context_length):
            remedies.append(f"a larger context (--context, EngineOptions.context; at most {max_context})")
        counted = "1 image" if len(rows) == 1 else f"{len(rows)} images"
        raise ContextOverflowError(
            f"The prompt needs {positions} positions ({counted}: {of_images}, text: {of_text}) and the answer at least "
            f"1, but the context has {context}. Use {' or '.join(remedies)}."
        )


def check_slots(messages: Sequence[prompt.Message], images: Sequence[object]) -> None:
    """Raise `UsageError` unless there is an image for each slot of the messages."""
    slots = sum(message.images for message in messages)
    if slots != len(images):
        raise UsageError(f"The messages have slots for {slots} images, but {len(images)} were given.")
