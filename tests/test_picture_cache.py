"""No picture twice: what is found again gives the very bits of what is computed, and nothing stale is ever found."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processes import in_child

from llava_edge import Llava, image
from llava_edge.bundle import LANGUAGE, PROJECTOR, VISION_DATA, Bundle, read_manifest, write_manifest
from llava_edge.cache import Cache, user_cache
from llava_edge.errors import BundleError, MissingError
from llava_edge.export.exporter import ExportOptions, export
from llava_edge.models import micro
from llava_edge.options import EngineOptions, Options, result_of
from llava_edge.prompt import Message
from llava_edge.runtimes import embedder, jobs, machine, picture_cache, pictures, prefill, tune
from llava_edge.runtimes.batch import Batch
from llava_edge.runtimes.branches import Branches
from llava_edge.runtimes.kv_cache import Key
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.picture_cache import Payload, PictureCache
from llava_edge.runtimes.pictures import Picture, prepare
from llava_edge.runtimes.pipeline import Engine

CPU = EngineOptions(device="cpu", threads=1)
SHORT = Options(max_tokens=8, speculate="off")  # so that the last logits are those of the last token
NEVER = threading.Event()
Array = np.ndarray[Any, Any]


def picture(colour: str, size: tuple[int, int] = (48, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


def language_of(llava: Llava) -> LanguageModel:
    return llava._engine.model.language


def opened(bundle: Path, options: EngineOptions = CPU, shown: Sequence[Callable[[], Picture]] = ()) -> Llava:
    return Llava.load(bundle, options, pictures=shown)


@pytest.fixture(scope="module")
def plain(micro_bundle: Path) -> Iterator[Llava]:
    with Llava.load(micro_bundle, replace(CPU, cache=False)) as llava:
        yield llava


def computed(llava: Llava, messages: list[Message], images: list[Any], options: Options = SHORT) -> tuple[str, Array]:
    """Answer and last logits if nothing is known."""
    language_of(llava).truncate(0)
    result = result_of(llava.answer(messages, images, options))
    assert result.cache == "miss"
    return result.text, language_of(llava).logits().copy()


def found(llava: Llava, messages: list[Message], images: list[Any], options: Options = SHORT) -> tuple[str, Array, str]:
    result = result_of(llava.answer(messages, images, options))
    return result.text, language_of(llava).logits().copy(), result.cache


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return one[0] == other[0] and np.array_equal(one[1], other[1])


def entries(kind: str) -> list[Path]:
    return [entry.path for entry in user_cache().entries() if entry.about.get("kind") == kind]


ASK = [Message("user", "What colour is it?", 1)]


# The same bits.


def test_another_process_finds_what_one_computed(micro_bundle: Path, plain: Llava) -> None:
    """Bit for bit, with a question that was not asked before."""
    questions = [[Message("user", text, 1)] for text in ("What?", "And what colour is it?", "é€😀")]
    with opened(micro_bundle) as llava:
        assert found(llava, ASK, [picture("red")])[2] == "miss"
    assert len(entries("state")) == len(entries("embeddings")) == 1
    for messages in questions:
        with opened(micro_bundle) as llava:
            again = found(llava, messages, [picture("red")])
            assert again[2] == "kv"
            assert same(again, computed(plain, messages, [picture("red")]))


def test_the_picture_that_was_asked_about_last_needs_no_disk(micro_bundle: Path, plain: Llava) -> None:
    with opened(micro_bundle, replace(CPU, cache=False)) as llava:
        assert found(llava, ASK, [picture("red")])[2] == "miss"
        again = found(llava, [Message("user", "And?", 1)], [picture("red")])
        assert again[2] == "kv"
        assert same(again, computed(plain, [Message("user", "And?", 1)], [picture("red")]))
    assert user_cache().entries() == []


def test_the_number_of_known_positions_is_told(micro_bundle: Path) -> None:
    with opened(micro_bundle) as llava:
        new, kept = (llava.ask(text, [picture("red")], SHORT) for text in ("What?", "And why is it so?"))
    with opened(micro_bundle) as llava:
        restored = llava.ask("And why is it so?", [picture("red")], SHORT)
    assert new.cached_tokens == 0
    assert new.image_tokens < kept.cached_tokens == restored.cached_tokens < new.prompt_tokens < kept.prompt_tokens


def test_embeddings_are_found_behind_another_beginning(micro_bundle: Path, plain: Llava) -> None:
    other = [Message("system", "Be brief."), *ASK]
    with opened(micro_bundle) as llava:
        found(llava, ASK, [picture("red")])
    with opened(micro_bundle) as llava:
        again = found(llava, other, [picture("red")])
    assert again[2] == "embedding"
    assert same(again, computed(plain, other, [picture("red")]))


def test_the_longest_known_beginning_is_taken(
    micro_bundle: Path, plain: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = [*ASK, Message("assistant", "red"), Message("user", "And this?", 1)]
    images = [picture("red"), picture("blue")]
    with opened(micro_bundle) as llava:
        found(llava, ASK, images[:1])
    with opened(micro_bundle) as llava:
        before, restored = language_of(llava).restore_state, []

        def watched(state: Payload, keys: Sequence[Key]) -> bool:
            restored.append(len(keys))
            return before(state, keys)

        monkeypatch.setattr(language_of(llava), "restore_state", watched)
        first = found(llava, talk, images)
        assert first[2] == "miss"  # the second picture
        assert len(restored) == 1
    with opened(micro_bundle) as llava:
        again = found(llava, talk, images)
    assert again[2] == "kv"
    assert same(first, again)
    assert same(again, computed(plain, talk, images))


def test_a_conversations_rounding_does_not_leak(micro_bundle: Path, plain: Llava) -> None:
    """Turns are evaluated behind their answers, so that what they leave in the KV cache is no exact prefix."""
    with opened(micro_bundle) as llava:
        chat = llava.chat(options=SHORT)
        for text, images in (("What?", [picture("red")]), ("And this?", [picture("blue")]), ("Why?", [])):
            for _ in chat.say(text, images):
                pass
        talk = [*chat.messages, Message("user", "Which?")]
        after = found(llava, talk, [picture("red"), picture("blue")])
    assert same(after, computed(plain, talk, [picture("red"), picture("blue")]))


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed depends on how many positions are computed at a time: rounding does, but not on each machine."""
    right = LanguageModel._append

    def append(self: LanguageModel, batch: Batch, keys: Sequence[Key], *rest: Any, **named: Any) -> None:
        values = batch.values[: len(keys)]
        values[:] = (values + len(keys) - 1) % self.vocabulary.size if batch is self._tokens else values + len(keys)
        right(self, batch, keys, *rest, **named)

    monkeypatch.setattr(LanguageModel, "_append", append)


def test_a_turn_is_no_exact_prefix_where_the_last_prompt_had_one(
    coarse: None, micro_bundle: Path, plain: Llava
) -> None:
    """Two conversations with pictures in the same positions behind different answers."""
    images = [picture("red"), picture("blue")]
    one, other = ([*ASK, Message("assistant", text), Message("user", "And this?", 1)] for text in "ab")
    with opened(micro_bundle, replace(CPU, cache=False)) as llava:
        assert len(llava._engine.encode_prompt(one)) == len(llava._engine.encode_prompt(other))
        found(llava, one, images)
        result_of(llava._engine.generate(other, images, SHORT, reuse=True))
        again = found(llava, other, images)
    assert same(again, computed(plain, other, images))


def test_a_restored_prefix_has_no_ends_of_the_prompt_before(coarse: None, micro_bundle: Path, plain: Llava) -> None:
    """What all conversations begin with is evaluated alone only if a picture comes next."""
    talk = [Message("user", "Hello."), Message("assistant", "Hello."), *ASK]
    with opened(micro_bundle, replace(CPU, cache="memory")) as llava:
        found(llava, talk, [picture("red")])
        found(llava, ASK, [picture("blue")])
        assert found(llava, talk, [picture("red")])[2] == "kv"
        again = found(llava, ASK, [picture("green")])
    assert same(again, computed(plain, ASK, [picture("green")]))


def test_what_the_kv_cache_holds_is_not_restored(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, restored = LanguageModel.restore_state, list[int]()

    def restore(self: LanguageModel, state: Payload, keys: Sequence[Key]) -> bool:
        restored.append(len(keys))
        return right(self, state, keys)

    monkeypatch.setattr(LanguageModel, "restore_state", restore)
    with opened(micro_bundle) as llava:
        found(llava, ASK, [picture("red")])
    with opened(micro_bundle) as llava:
        assert [found(llava, question, [picture("red")])[2] for question in QUESTIONS[:2]] == ["kv", "kv"]
    assert len(restored) == 1


def test_a_prompt_that_is_a_picture_is_never_restored_whole(micro_bundle: Path) -> None:
    """Nothing would be left to compute the first token from."""
    bundle = Bundle.open(micro_bundle)
    captions = replace(bundle, manifest=replace(bundle.manifest, template="plain_chatml"))
    answers = []
    for _ in range(2):
        with Engine.open(captions, CPU) as engine:
            for reuse in (False, True):  # all but the last row
                stream = engine.generate([Message("user", "", 1)], [picture("red")], SHORT, reuse=reuse)
                answers.append(result_of(stream).text)
    assert len(set(answers)) == 1
    assert answers[0]


def watched(patch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all texts that are evaluated from now on."""
    evaluated: list[int] = []
    right = LanguageModel.evaluate_tokens

    def evaluate(self: LanguageModel, tokens: list[int], *arguments: Any) -> None:
        evaluated.append(len(tokens))
        right(self, tokens, *arguments)

    patch.setattr(LanguageModel, "evaluate_tokens", evaluate)
    return evaluated


def test_a_saved_state_takes_no_room(micro_bundle: Path) -> None:
    with LanguageModel(micro_bundle / LANGUAGE, context=256, threads=1) as language:
        language.evaluate_tokens([5] * 250, NEVER)
        assert language.save_state(250)
        language.truncate(0)
        language.evaluate_tokens([6] * 256, NEVER)


@pytest.mark.parametrize("restarted", [False, True])
def test_the_text_before_a_picture_is_kept_for_the_next_picture(
    restarted: bool, micro_bundle: Path, plain: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages, short = [Message("system", "A long text. " * 5), *ASK], replace(SHORT, max_tokens=1)
    llava = opened(micro_bundle)
    found(llava, messages, [picture("red")])
    if restarted:
        llava.close()
        assert len(entries("state")) == 2
        llava = opened(micro_bundle)
    with llava, monkeypatch.context() as patch:
        evaluated = watched(patch)
        again = found(llava, messages, [picture("blue")], short)
    assert again[2] == "miss"
    assert len(evaluated) == 1  # the text behind the picture
    assert same(again, computed(plain, messages, [picture("blue")], short))


@pytest.mark.parametrize("questions", [1, 2])
def test_an_answer_does_not_wait_for_what_is_kept(
    questions: int, micro_bundle: Path, plain: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, told = LanguageModel.save_state, threading.Event()

    def late(self: LanguageModel, count: int, max_bytes: float) -> memoryview | None:
        assert told.wait(60)
        return right(self, count, max_bytes)

    monkeypatch.setattr(LanguageModel, "save_state", late)
    with opened(micro_bundle) as llava:
        prompts, answers = ["What?", "And?"][:questions], [""] * questions
        for number, stream in enumerate(llava.ask_many(prompts, [picture("red")], SHORT)):
            for chunk in stream:
                answers[number] += chunk.text
                if number == questions - 1 and answers[number]:
                    told.set()
    conversations = [[Message("user", prompt, 1)] for prompt in prompts]
    with opened(micro_bundle) as llava:
        assert [found(llava, messages, [picture("red")])[2] for messages in conversations] == ["kv"] * questions
    assert answers == [computed(plain, messages, [picture("red")])[0] for messages in conversations]


def test_a_budget_is_part_of_the_key(micro_bundle: Path, plain: Llava) -> None:
    for tokens in (0, 8, 4):
        options = replace(SHORT, image_tokens=tokens)
        with opened(micro_bundle) as llava:
            first = found(llava, ASK, [picture("red")], options)
            assert first[2] == "miss"
        with opened(micro_bundle) as llava:
            again = found(llava, ASK, [picture("red")], options)
            assert again[2] == "kv"
        assert same(first, again)
        assert same(again, computed(plain, ASK, [picture("red")], options))


def test_pictures_embedded_while_loading(micro_bundle: Path, plain: Llava) -> None:
    shown = prepare(picture("red"), plain.bundle.manifest)
    with opened(micro_bundle, shown=[lambda: shown]) as llava:
        first = found(llava, ASK, [shown])
        assert first[2] == "miss"
        assert same(first, computed(plain, ASK, [shown]))
    with opened(micro_bundle, shown=[lambda: shown]) as llava:
        assert found(llava, ASK, [shown])[2] == "kv"


def test_a_picture_shown_twice_is_encoded_and_counted_once(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, computing = prepare(picture("red"), Bundle.open(micro_bundle).manifest), embedder.Embedder._compute
    keys: list[str] = []

    def counted(self: embedder.Embedder, picture: Picture, *rest: Any) -> embedder.Embedding:
        keys.append(picture.key)
        return replace(computing(self, picture, *rest), encode_ms=7.0, project_ms=50_000.0)

    monkeypatch.setattr(embedder.Embedder, "_compute", counted)
    with opened(micro_bundle, shown=[lambda: shown] * 3) as llava:
        result = result_of(llava.answer([Message("user", "What is it?", 3)], [shown] * 3))
    assert keys == [shown.key]
    assert result.timings.preprocess_ms == shown.preprocess_ms
    assert result.timings.encode_ms >= 50_007
    assert result.timings.project_ms == 50_000


def test_what_equal_files_took_is_counted_for_each(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one of them it may be next to nothing: whose pixels were kept."""
    first, second = (
        replace(prepare(picture("red"), Bundle.open(micro_bundle).manifest), preprocess_ms=ms, image_ms=ms / 2)
        for ms in (90, 2)
    )
    monkeypatch.setattr(pictures.RecentPictures, "prepare_all", lambda *_: [first, second])
    with opened(micro_bundle) as llava:
        result = result_of(llava.answer([Message("user", "What is it?", 2)], [picture("red")] * 2))
    assert (result.timings.preprocess_ms, result.timings.image_ms) == (92, 46)


def test_embedding_goes_on_when_the_model_is_loaded(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, loaded = prepare(picture("red"), Bundle.open(micro_bundle).manifest), threading.Event()

    def late(*arguments: Any) -> Any:
        assert loaded.wait(30)
        return tune.open_encoder(*arguments)

    monkeypatch.setattr(embedder, "open_encoder", late)
    with opened(micro_bundle, shown=[lambda: shown]) as llava:
        loaded.set()
        part = llava._engine.model.embedder
        assert part is not None
        part._thread.submit(bool).result(30)  # after what was begun while it was loaded
        assert list(part._precomputed) == [shown.key]


def test_clip_is_not_even_loaded_for_a_known_picture(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = prepare(picture("red"), Bundle.open(micro_bundle).manifest)
    with opened(micro_bundle) as llava:
        found(llava, ASK, [shown])
    monkeypatch.setattr(embedder, "VisionEncoder", lambda *_, **__: pytest.fail("CLIP was loaded"))
    with opened(micro_bundle, shown=[lambda: shown]) as llava:
        assert found(llava, ASK, [shown])[2] == "kv"


def test_a_file_is_decoded_once(micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[object] = []

    def load_image(source: object, name: str = "") -> Image.Image:
        decoded.append(source)
        return image.load_image(source, name)  # type: ignore[arg-type]

    monkeypatch.setattr(pictures, "load_image", load_image)
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    picture("red").save(one)
    picture("blue").save(other)
    with opened(micro_bundle) as llava:
        first = found(llava, ASK, [one])
        assert same(first, found(llava, ASK, [str(one)]))
        assert same(first, found(llava, ASK, [one.read_bytes()]))
        assert len(decoded) == 1
        blue = found(llava, ASK, [other])
        assert len(decoded) == 2
        other.replace(one)
        assert same(blue, found(llava, ASK, [one]))
        assert len(decoded) == 2
    with opened(micro_bundle, replace(CPU, cache=False)) as llava:
        assert same(blue, found(llava, ASK, [one]))
        assert same(blue, found(llava, ASK, [one]))
        assert len(decoded) == 4


def test_decoded_pictures_are_those_asked_for_last(micro_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(micro_bundle).manifest
    names = [tmp_path / f"{colour}.png" for colour in ("red", "green", "blue")]
    for name in names:
        picture(name.stem).save(name)
    size = prepare(names[0], manifest).crops.nbytes
    recent = pictures.RecentPictures(manifest, 2 * size)
    red, green = recent.prepare(names[0]), recent.prepare(names[1])
    assert recent.prepare(names[0]).crops is red.crops
    recent.prepare(names[2])
    assert recent.prepare(names[0]).crops is red.crops
    assert recent.prepare(names[1]).crops is not green.crops
    assert pictures.RecentPictures(manifest, size - 1).prepare(names[0]).key == red.key  # larger than all that is kept


class _Full:
    """What a system without another thread does."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> _Full:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, *_: Any) -> Any:
        raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("full", [False, True])
def test_pictures_side_by_side_are_what_each_is_alone(
    full: bool, micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "allowed_cpus", lambda: {0, 1, 2})
    if full:
        monkeypatch.setattr(pictures, "ThreadPoolExecutor", _Full)
    manifest = Bundle.open(micro_bundle).manifest
    picture("red").save(tmp_path / "red.png")
    ready = replace(prepare(picture("green"), manifest), preprocess_ms=77.0)
    sources: list[Any] = [
        tmp_path / "red.png",
        picture("blue"),
        ready,
        np.array(picture("black")),
        tmp_path / "red.png",
    ]
    recent = pictures.RecentPictures(manifest, 1 << 20)
    start = time.perf_counter()
    made = recent.prepare_all(sources)
    taken = (time.perf_counter() - start) * 1000
    assert [each.key for each in made] == [prepare(each, manifest).key for each in sources]
    assert made[2] is ready
    assert 0 < sum(each.preprocess_ms for each in made) - 77 <= taken
    assert all(each.image_ms <= each.preprocess_ms for each in made)
    with pytest.raises(MissingError, match="first"):
        recent.prepare_all([picture("red"), tmp_path / "first.png", b"second", picture("blue")])


# What may differ has another key.


def test_settings_that_may_change_bits_are_part_of_the_key(micro_bundle: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"threads": 2}, {"context": 256}, {"kv": "q8_0"}]
    for change in changes:
        with opened(micro_bundle, replace(CPU, **change)) as llava:
            assert found(llava, ASK, [picture("red")])[2] == (
                "embedding" if change.keys() & {"context", "kv"} else "miss"
            )
    assert len(entries("state")) == 4


def test_another_version_of_numpy_computes_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    key = picture_cache.digest("state")
    monkeypatch.setattr(np, "__version__", "0.0.0")
    assert picture_cache.digest("state") != key


OTHER_CODE = """
def reduce_features(features, attention, count, method="cls", seed=0):
    return features[:count]
"""

ASKED = """
import sys
from PIL import Image
from llava_edge import EngineOptions, Llava, Options

with Llava.load(sys.argv[1], EngineOptions(device="cpu", threads=1)) as llava:
    print(llava.ask("What colour is it?", Image.new("RGB", (48, 32), "red"), Options(image_tokens=4)).cache)
"""


def test_other_code_of_the_same_version_computes_anew(micro_bundle: Path, root: Path, tmp_path: Path) -> None:
    """As after `git pull` in a clone. Two clones that take turns keep both results."""
    shutil.copytree(root / "llava_edge", tmp_path / "llava_edge", ignore=shutil.ignore_patterns("zoo", "__pycache__"))
    with (tmp_path / "llava_edge/token_budget.py").open("a") as file:
        file.write(OTHER_CODE)
    caches = [in_child(ASKED, micro_bundle, clone=clone).stdout.strip() for clone in (root, tmp_path) * 2]
    assert caches == ["miss", "miss", "kv", "kv"]


@pytest.mark.parametrize(("part", "cache"), [(LANGUAGE, "embedding"), (VISION_DATA, "miss"), (PROJECTOR, "miss")])
def test_a_part_replaced_in_place_is_another_one(part: str, cache: str, bundle_copy: Path) -> None:
    """Of the same size. Only `verify` compares hashes, so the key has the file's time too."""
    with opened(bundle_copy) as llava:
        found(llava, ASK, [picture("red")])
    path = bundle_copy / part
    path.write_bytes(path.read_bytes())
    with opened(bundle_copy) as llava:
        assert found(llava, ASK, [picture("red")])[2] == cache
        assert found(llava, ASK, [picture("red")])[2] == "kv"
    manifest = read_manifest(bundle_copy)  # or of the same time, too, as where a packer sets all to one
    other = replace(manifest.files[part], sha256="0" * 64)
    write_manifest(bundle_copy, replace(manifest, files=manifest.files | {part: other}))
    with opened(bundle_copy) as llava:
        assert found(llava, ASK, [picture("red")])[2] == cache


def test_two_models_do_not_share(micro_bundle: Path, tmp_path: Path) -> None:
    micro.write_checkpoint(tmp_path / "checkpoint", seed=5)
    export(ExportOptions(tmp_path / "checkpoint", tmp_path / "bundle", quant="q8_0", vision="fp32"))
    for folder in (micro_bundle, tmp_path / "bundle"):
        with opened(folder) as llava:
            assert found(llava, ASK, [picture("red")])[2] == "miss"


# Failures.


def test_bytes_that_llama_cpp_refuses_leave_a_context_as_new(
    micro_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes no memory, which there may not be: a model without a context would crash."""
    model = LanguageModel(micro_bundle / LANGUAGE, context=256, threads=1)
    monkeypatch.setattr(model.library, "llama_init_from_model", lambda *_: None)
    rows = np.random.default_rng(0).standard_normal((20, model.hidden_size)).astype(np.float32)
    keys: list[Key] = [*model.vocabulary.tokenize("look:"), *(("x", row) for row in range(20))]

    def fill() -> None:
        """Into an empty KV cache."""
        model.evaluate_tokens(model.vocabulary.tokenize("look:"), NEVER)
        model.evaluate_embeddings(rows, keys[-20:], NEVER)

    def logits() -> Array:
        model.evaluate_tokens(model.vocabulary.tokenize("what?"), NEVER)
        return model.logits().copy()

    fill()
    state = bytes(model.save_state(len(keys)) or b"")
    wanted = logits()
    assert bytes(model.save_state(len(keys)) or b"") == state  # what came behind is not in it
    assert len(model.save_state(len(keys) + 1) or b"") > len(state)
    assert model.restore_state(state, keys)
    assert np.array_equal(logits(), wanted)
    for wrong in (b"", state[:40], state[:-1], state[: len(state) // 2], bytes(len(state)), state + b"\0"):
        assert not model.restore_state(wrong, keys)
        assert model.cached_keys == []
        fill()
        assert np.array_equal(logits(), wanted)
    assert not model.restore_state(state, keys[:-1])
    fill()
    branches = Branches(model)
    branches.start(0)
    with pytest.raises(BundleError, match="cache clear"):  # the branch is lost, too
        model.restore_state(b"", keys)
    branches.close()
    assert not model.restore_state(b"", keys)
    model.close()


def test_a_state_that_cannot_be_restored_is_computed(
    micro_bundle: Path, plain: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(micro_bundle) as llava:
        found(llava, ASK, [picture("red")])
    right = PictureCache.get
    monkeypatch.setattr(PictureCache, "get", lambda self, key: (right(self, key) or b"")[:-1] or None)
    with opened(micro_bundle) as llava:
        found(llava, ASK, [picture("blue")])  # begins alike, and what it left is lost with the attempt
        again = found(llava, ASK, [picture("red")])
    assert again[2] == "miss"
    assert same(again, computed(plain, ASK, [picture("red")]))


@pytest.mark.parametrize("between", [0, 1])
def test_a_prompt_that_fails_beside_others_saves_nothing_of_what_is_lost(
    between: int, micro_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text was evaluated, and another prompt begins with it."""
    red, put, saved = prepare(picture("red"), Bundle.open(micro_bundle).manifest), PictureCache.put, list[str]()
    broken: Any = replace(red, crops=np.full_like(red.crops, np.nan), key="broken")

    def noticed(self: PictureCache, key: str, about: dict[str, str], payload: Payload) -> None:
        saved.append(key)
        put(self, key, about, payload)

    monkeypatch.setattr(PictureCache, "put", noticed)
    one, other = ([Message("system", text * 2), *ASK] for text in ("A long text. ", "Another one. "))
    conversations = [[Message("user", "What?")], one, *[other] * between, one]
    images: list[list[Any]] = [[], [broken], *[[red]] * between, [red]]
    with opened(micro_bundle, replace(CPU, cache="memory")) as llava:
        streams = llava._engine.generate_many(conversations, images, SHORT)
        assert result_of(streams[0]).text
        with pytest.raises(BundleError, match="finite"):
            result_of(streams[1])
        assert all(result_of(stream).text for stream in streams[2:])
    assert len(saved) == len(set(saved)) == 3 + 2 * between  # embeddings; text and picture of each prompt


def test_a_stopped_prefill_keeps_nothing(micro_bundle: Path, plain: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    cancel = threading.Event()
    right = LanguageModel.evaluate_embeddings

    def stopped(*arguments: Any) -> None:
        cancel.set()
        right(*arguments)

    with opened(micro_bundle) as llava:
        monkeypatch.setattr(LanguageModel, "evaluate_embeddings", stopped)
        result = result_of(llava.answer(ASK, [picture("red")], SHORT, cancel=cancel))
        assert result.finish_reason == "cancelled"
        monkeypatch.undo()
        again = found(llava, [Message("user", "What?", 1)], [picture("red")])
        assert again[2] == "embedding"
        assert same(again, computed(plain, [Message("user", "What?", 1)], [picture("red")]))


def test_a_home_that_cannot_be_written(micro_bundle: Path, isolated_home: Path) -> None:
    (isolated_home / "cache").touch()
    with opened(micro_bundle) as llava:
        assert [found(llava, ASK, [picture(name)])[2] for name in ("red", "blue", "red")] == ["miss", "miss", "kv"]


def test_memory_is_bounded(tmp_path: Path) -> None:
    kept = PictureCache(None, memory_bytes=1000)
    for number in range(5):
        kept.put(str(number), {}, bytes(400))
    assert [kept.get(str(number)) is not None for number in range(5)] == [False, False, False, True, True]
    kept.put("large", {}, bytes(2000))
    assert kept.get("large") is None
    assert kept.get("3") is not None
    kept.put("5", {}, bytes(400))
    assert [kept.get(str(number)) is not None for number in (3, 4, 5)] == [True, False, True]  # 3 was asked for last


def test_what_was_read_from_disk_stays_in_memory(tmp_path: Path) -> None:
    disk = Cache(tmp_path, min_free=0)
    with closing(PictureCache(disk)) as writer:
        writer.put("key", {}, b"payload")
    kept = PictureCache(disk)
    assert kept.get("key") == b"payload"
    (tmp_path / "key").unlink()
    assert kept.get("key") == b"payload"
    assert PictureCache(disk).get("key") is None


def test_what_is_still_being_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = threading.Event()
    monkeypatch.setattr(Cache, "put", lambda *_: written.wait(20))
    kept = PictureCache(Cache(tmp_path, min_free=0), memory_bytes=0)
    kept.put("key", {}, b"payload")
    assert kept.get("key") == b"payload"
    written.set()
    kept.close()
    assert kept.get("key") is None


def test_it_is_kept_when_nobody_asks_any_more_or_memory_is_needed(
    micro_bundle: Path, isolated_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, save = list[int](), LanguageModel.save_state
    asked = threading.Event()

    def noticed(language: LanguageModel, count: int, max_bytes: float) -> memoryview | None:
        saved.append(count)
        asked.set()
        return save(language, count, max_bytes)

    monkeypatch.setattr(LanguageModel, "save_state", noticed)
    monkeypatch.setattr(jobs, "IDLE_SECONDS", 60)
    with opened(micro_bundle) as llava:
        for question in QUESTIONS[:2]:
            found(llava, question, [picture("red")])
        assert not saved  # no copy while the same picture is asked about
        found(llava, ASK, [picture("blue")])
        assert len(saved) == 1
        monkeypatch.setattr(jobs, "IDLE_SECONDS", 0)
        asked.clear()
        found(llava, ASK, [picture("green")])
        assert asked.wait(20)
        found(llava, ASK, [picture("white")])
    kinds = [entry.about["kind"] for entry in user_cache().entries()]
    assert kinds.count("state") == 4
    saved.clear()
    with opened(micro_bundle, replace(CPU, cache=False)) as llava:
        assert [found(llava, ASK, [picture(name)])[2] for name in ("red", "blue")] == ["miss", "miss"]
    assert not saved


def test_what_would_not_be_kept_is_not_saved(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be hundreds of megabytes, and the next picture would wait for them."""
    room = 1 << 14
    sizes, save = list[int](), LanguageModel.save_state

    def noticed(language: LanguageModel, count: int, max_bytes: float) -> memoryview | None:
        state = save(language, count, max_bytes)
        sizes.append(len(state or b""))
        return state

    monkeypatch.setattr(LanguageModel, "save_state", noticed)
    with opened(micro_bundle, replace(CPU, cache="memory")) as llava:
        found(llava, ASK, [picture("red")])
        found(llava, ASK, [picture("blue")])
        assert max(sizes) > room
        sizes.clear()
        llava._engine._cache._memory_bytes = room
        found(llava, ASK, [picture("green")])
    assert sizes
    assert not any(sizes)


def test_an_answer_comes_where_there_is_no_memory_to_keep_its_picture(
    micro_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: LanguageModel, count: int, max_bytes: float) -> memoryview | None:
        raise MemoryError

    monkeypatch.setattr(LanguageModel, "save_state", full)
    with opened(micro_bundle) as llava:
        assert [found(llava, ASK, [picture(name)])[2] for name in ("red", "blue", "red")] == [
            "miss",
            "miss",
            "embedding",
        ]


def test_room_for_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [PictureCache(None, memory_bytes=size).max_payload for size in (0, 10)] == [0, 10]
    monkeypatch.setattr(picture_cache, "MAX_QUEUED_BYTES", 12)
    written = threading.Event()
    monkeypatch.setattr(Cache, "put", lambda *_: written.wait(20))
    kept = PictureCache(Cache(tmp_path), memory_bytes=10)
    assert kept.max_payload == 12
    kept.put("key", {}, b"12345")
    assert kept.max_payload == 10
    kept.put("large", {}, bytes(11))
    assert kept.get("large") is None  # not kept until there is room on a slow disk
    written.set()
    kept.close()
    assert kept.max_payload == 12


LEFT = """
import sys
from PIL import Image
from llava_edge import EngineOptions, Llava, Options

llava = Llava.load(sys.argv[1], EngineOptions(device="cpu", threads=1))
llava.ask("What?", Image.new("RGB", (48, 32), "red"), Options(max_tokens=8))
"""


def test_a_program_that_closes_nothing_leaves_it_on_disk(micro_bundle: Path, isolated_home: Path) -> None:
    done = in_child(LEFT, micro_bundle)
    assert (done.stdout, done.stderr) == ("", "")
    with opened(micro_bundle) as llava:
        assert found(llava, ASK, [picture("red")])[2] == "kv"


# Anything in any order.


def damage(path: Path, choose: random.Random) -> None:
    """One bit."""
    whole = bytearray(path.read_bytes())
    if whole:
        whole[choose.randrange(len(whole))] ^= 1 << choose.randrange(8)
        path.write_bytes(whole)


def sequence(seed: int, bundle: Path, folder: Path, wanted: dict[tuple[str, int], tuple[str, Array]]) -> list[str]:
    """A random life of one user's cache; what each question found. What is kept is written at once, in half of them."""
    choose = random.Random(seed)
    jobs.IDLE_SECONDS = seed % 2
    folder.mkdir()
    colours = ["red", "blue", "green"]
    shown = {name: choose.choice(colours) for name in ("a.png", "b.png")}
    for name, colour in shown.items():
        picture(colour).save(folder / name)
    seen, llava = [], Llava.load(bundle, CPU)
    try:
        for _ in range(choose.randint(4, 10)):
            act = choose.choice(["ask", "ask", "ask", "change", "restart", "corrupt", "delete", "clear"])
            kept = [entry.path for entry in user_cache().entries()]
            if act == "ask":
                name, question = choose.choice(list(shown)), choose.randrange(len(QUESTIONS))
                answer = found(llava, QUESTIONS[question], [folder / name])
                assert same(answer, wanted[shown[name], question]), (seed, answer[2])
                seen.append(answer[2])
            elif act == "change":
                name = choose.choice(list(shown))
                shown[name] = choose.choice(colours)
                picture(shown[name]).save(folder / name)
            elif act == "restart":
                llava.close()
                llava = Llava.load(bundle, CPU)
            elif act == "corrupt" and kept:
                with suppress(FileNotFoundError):  # one that was still being written, under another name
                    damage(choose.choice(kept), choose)
            elif act == "delete" and kept:
                choose.choice(kept).unlink(missing_ok=True)
            elif act == "clear":
                user_cache().clear()
    finally:
        llava.close()
    return seen


QUESTIONS = [
    [Message("user", "What?", 1)],
    [Message("user", "Which colour is it?", 1)],
    [Message("system", "Answer in one word."), Message("user", "What?", 1)],
]


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_sequence_gives_another_answer(
    count: int, micro_bundle: Path, plain: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "IDLE_SECONDS", 0)  # each sequence sets it, and this puts it back
    wanted = {
        (colour, number): computed(plain, messages, [picture(colour)])
        for colour in ("red", "blue", "green")
        for number, messages in enumerate(QUESTIONS)
    }
    seen = [what for seed in range(count) for what in sequence(seed, micro_bundle, tmp_path / str(seed), wanted)]
    assert {"miss", "kv", "embedding"} <= set(seen) if count > 100 else {"miss", "kv"} <= set(seen)


def test_the_sequences_notice_a_key_without_the_picture(
    micro_bundle: Path, plain: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "digest", lambda *parts: "0" * 64)
    with pytest.raises(AssertionError):
        test_no_sequence_gives_another_answer(25, micro_bundle, plain, tmp_path, monkeypatch)
