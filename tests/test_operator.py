"""Our operators for ONNX Runtime: what standard operators give, and nothing where they cannot be trusted."""

from __future__ import annotations

import ctypes
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from native_kernels import here, relink, worst_error
from processes import in_child
from towers import relative

from llava_edge.bundle import VISION, Bundle, sha256_of
from llava_edge.errors import BundleError
from llava_edge.runtimes import embedder, machine, native, tune
from llava_edge.runtimes.native import check, installed, operator
from llava_edge.runtimes.projector import Projector, gelu
from llava_edge.runtimes.vision import VisionEncoder

pytestmark = here

CPU = "CPUExecutionProvider"
AMX_LIMIT = 127 * 128 + 63  # the largest whole number that an activation is rounded to (src/amx_int16.cpp)


@pytest.fixture(scope="module", params=["amx", "wide", "avx2"])
def library(request: pytest.FixtureRequest, native_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operators as they are built for tests, with the kernels for AMX and AVX-512; without AMX; without both."""
    if request.param == "amx":
        return native_build / installed.OPERATOR
    path = tmp_path_factory.mktemp("operators") / installed.OPERATOR
    known = {"wide": ["AVX512VNNI"], "avx2": []}[request.param]
    return relink(native_build, path, ("backend", "memory", "api"), known=known)


@pytest.fixture(scope="module")
def quantized(micro_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The micro model with its vision tower in int8."""
    from llava_edge.export.exporter import ExportOptions, export

    out = tmp_path_factory.mktemp("quantized") / "bundle"
    export(ExportOptions(checkpoint=micro_checkpoint, out=out, quant="f16", vision="int8", name="micro"))
    return Bundle.open(out)


@pytest.fixture
def native_home(native_build: Path, isolated_home: Path) -> Iterator[Path]:
    """What `native.prepare` leaves behind, but for races; the folder."""
    folder = installed.folder()
    shutil.copytree(native_build, folder)
    races = {"plain": 2.0, "ours": 1.0}
    state = {"problems": {}, "operator": sha256_of(folder / installed.OPERATOR), "projector": races}
    (folder / "state.json").write_text(json.dumps(state), "utf-8")
    yield folder
    shutil.rmtree(folder)


def pixels(bundle: Bundle, seed: int = 0) -> np.ndarray:
    side = bundle.manifest.preprocessing.image_size
    return np.random.default_rng(seed).standard_normal((3, side, side), np.float32)


def quick_gelu(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / (1 + np.exp(np.minimum(-1.702 * x, 700))))


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 16, 1), (7, 48, 35), (50, 768, 64), (13, 272, 137)])
def test_products_of_every_shape(library: Path, rows: int, inner: int, columns: int) -> None:
    numbers = np.random.default_rng(0)
    x = numbers.standard_normal((rows, inner), np.float32)
    weight = numbers.integers(-127, 128, (inner, columns), np.int8)
    scale, bias = numbers.random(columns, np.float32), numbers.standard_normal(columns, np.float32)
    found = operator.linear(library, x, weight, scale, bias, threads=2)
    expected = x.astype(np.float64) @ weight * scale + bias
    assert relative(found, expected) < 3e-4
    found = operator.linear(library, x, weight, scale, bias, quick_gelu=True)
    assert np.linalg.norm(found - quick_gelu(expected)) < 3e-4 * np.linalg.norm(expected)
    x[0, 3] = np.nan
    for activated in (False, True):
        found = operator.linear(library, x, weight, scale, bias, quick_gelu=activated)
        assert np.isnan(found[0]).all()
        assert np.isfinite(found[1:]).all()


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(1, 16, 1), (33, 48, 300), (7, 768, 17), (577, 1040, 70), (33, 3072, 33)]
)
def test_products_of_the_matrix_unit(native_build: Path, rows: int, inner: int, columns: int) -> None:
    """Tails of tiles, panels and blocks, more panels than a thread takes at once, outliers: only rounding is off."""
    numbers = np.random.default_rng(1)
    x = numbers.standard_normal((rows, inner), np.float32)
    x[:, numbers.integers(0, inner, 3)] *= 30
    weight = numbers.integers(-128, 128, (inner, columns), np.int8)
    found = products(native_build, x, weight)
    expected = x.astype(np.float64) @ weight
    assert (np.abs(found - expected) <= worst_error(x, weight.T.astype(np.float64), 512, 0.5 / AMX_LIMIT, 0.0)).all()
    assert (products(native_build, x, weight, threads=3) == found).all()
    for bad in (np.nan, np.inf, -np.inf):
        spoiled = x.copy()
        spoiled[rows // 2, inner - 1] = bad
        result = products(native_build, spoiled, weight)
        assert np.isnan(result[rows // 2]).all()
        assert (np.delete(result, rows // 2, 0) == np.delete(found, rows // 2, 0)).all()


def test_products_of_whole_numbers_by_the_matrix_unit(native_build: Path) -> None:
    """Each that an activation is rounded to, in two terms, comes out as it is; so do the largest sums."""
    x = np.zeros((2 * AMX_LIMIT + 1, 16), np.float32)
    x[:, 0], x[:, 1] = AMX_LIMIT, np.arange(-AMX_LIMIT, AMX_LIMIT + 1)
    weight = np.zeros((16, 2), np.int8)
    weight[1] = 1, -128
    assert (products(native_build, x, weight) == x[:, 1:2] * weight[1]).all()
    x, weight = np.ones((2, 3072), np.float32), np.full((3072, 2), -128, np.int8)
    x[1], weight[:, 1] = -1, 127
    assert np.allclose(products(native_build, x, weight), x @ weight.astype(np.float32), 1e-6, 0)


def products(native_build: Path, x: np.ndarray, weight: np.ndarray, threads: int = 1) -> np.ndarray:
    ones = np.ones(weight.shape[1], np.float32)
    return operator.linear(native_build / installed.OPERATOR, x, weight, ones, 0 * ones, threads)


def test_what_others_told_the_matrix_unit_stays(native_build: Path) -> None:
    """As in test_native.py: ONNX Runtime has kernels of its own for it."""
    others = ctypes.CDLL(str(native_build / installed.OPERATOR))
    for palette in (1, 0):
        others.test_configure_tiles(palette)
        products(native_build, np.ones((40, 64), np.float32), np.ones((64, 70), np.int8))
        assert others.test_tiles_are_configured(palette)
        assert not others.test_tiles_are_configured(1 - palette)


def test_activations_at_both_ends(library: Path) -> None:
    """Products of nothing, so that what is activated is the bias: from beyond what e^x reaches to about zero."""
    bias = np.array([-300, -88, -20, -3, -0.75, -1e-3, 0, 1e-3, 0.75, 3, 20, 88, 300], np.float32)
    x, n = np.zeros((2, 32), np.float32), len(bias)
    found = operator.linear(library, x, np.ones((32, n), np.int8), np.ones(n, np.float32), bias, quick_gelu=True)
    wide = bias.astype(np.float64)
    assert np.allclose(found, quick_gelu(wide), 1e-6, 1e-30)
    found = operator.project(library, x, np.ones((n, 32), np.float32), bias, gelu=True)
    exact = [value / 2 * math.erfc(-value / math.sqrt(2)) for value in wide]
    assert np.allclose(found, exact, 1e-6, 1e-6)


@pytest.mark.parametrize(
    ("positions", "heads", "width"), [(1, 1, 16), (5, 2, 16), (16, 3, 32), (33, 1, 64), (70, 2, 128), (257, 1, 256)]
)
def test_attention_of_every_shape(library: Path, positions: int, heads: int, width: int) -> None:
    """Beside float64; pictures of a batch are apart; what is not finite spoils what looks at it, and nothing else."""
    qkv = np.random.default_rng(positions).standard_normal((2, positions, 3, heads, width), np.float32)
    qkv[:, 0, 1] *= 10  # one key that most look at
    given = qkv.reshape(2, positions, -1)
    found = operator.attention(library, given, heads, threads=2)
    for one, result in zip(qkv.astype(np.float64), found, strict=True):
        q, k, v = one.transpose(1, 2, 0, 3)
        expected = check.exact_attention(q, k, v, np.zeros((positions, positions))).reshape(positions, -1)
        assert relative(result, expected) < (1e-3 if width <= 64 else 2e-3)  # weights of fewer bits
    alone = operator.attention(library, given[1:], heads)
    assert (alone[0] == found[1]).all()
    qkv[0, 0, 2, 0, 3] = np.nan  # a number of a value
    spoiled = operator.attention(library, given, heads)
    assert np.isnan(spoiled[0, :, 3]).all()
    assert np.isfinite(spoiled[1]).all()
    qkv[1, positions // 2, 0, 0, 0] = np.inf  # of a query
    spoiled = operator.attention(library, given, heads)[1]
    assert not np.isfinite(spoiled[positions // 2, :width]).any()
    assert np.isfinite(np.delete(spoiled, positions // 2, 0)).all()


@pytest.mark.parametrize("library", ["avx2"], indirect=True)  # the others may be slow here
def test_threads_of_attention_have_memory_of_their_own(library: Path) -> None:
    """So much to do that all of them are at it at the same time, whatever else the machine does."""
    qkv = np.random.default_rng(0).standard_normal((1, 500, 3 * 16 * 64), np.float32)
    alone = operator.attention(library, qkv, 16)
    for _ in range(3):
        assert (operator.attention(library, qkv, 16, threads=3) == alone).all()


def test_attention_is_refused_where_heads_do_not_fit(library: Path) -> None:
    for width in (8, 24, 272):
        with pytest.raises(OSError, match=r"attend of .* does not support"):
            operator.attention(library, np.zeros((1, 4, 3 * width), np.float32), 1)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 32, 1), (7, 96, 35), (50, 768, 64), (13, 288, 130)])
def test_layers_of_the_projector(library: Path, kind: type, rows: int, inner: int, columns: int) -> None:
    numbers = np.random.default_rng(0)
    x, bias = numbers.standard_normal((rows, inner), np.float32), numbers.standard_normal(columns, np.float32)
    weight: np.ndarray = numbers.standard_normal((columns, inner), np.float32).astype(kind)
    found = operator.project(library, x, weight, bias, threads=2)
    expected = x.astype(np.float64) @ weight.T + bias
    assert relative(found, expected) < 1e-3
    found = operator.project(library, x, weight, bias, gelu=True)
    assert np.linalg.norm(found - gelu(expected.astype(np.float32))) < 1e-3 * np.linalg.norm(expected)
    assert operator.supports_projection(weight)
    assert not operator.supports_projection(weight[:, 1:])
    assert not operator.supports_projection(weight.T)


def test_no_thread_stays(native_build: Path) -> None:
    """OpenMP's would: one team more, and libgomp lets llama.cpp's threads sleep wherever they wait, 5 times as slow."""
    code = f"""
import os
from pathlib import Path
import numpy as np
from llava_edge.runtimes.native import operator
library, x = Path({str(native_build / installed.OPERATOR)!r}), np.ones((64, 64), np.float32)
before = len(os.listdir("/proc/self/task"))
operator.project(library, x, x, x[0], threads=3)
operator.attention(library, np.ones((1, 4, 96), np.float32), 2, threads=3)
operator.linear(library, x, np.ones((64, 64), np.int8), x[0], x[0], threads=3)
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert in_child(code).stdout == "0\n"


def test_threads_that_cannot_be_started_are_done_without(native_build: Path) -> None:
    code = f"""
import resource
from pathlib import Path
import numpy as np
from llava_edge.runtimes.native import operator
library, x = Path({str(native_build / installed.OPERATOR)!r}), np.ones((64, 64), np.float32)
expected = operator.project(library, x, x, x[0])
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + (60 << 20),) * 2)
print((operator.project(library, x, x, x[0], threads=64) == expected).all())
"""
    assert in_child(code).stdout == "True\n"


def test_too_little_memory_is_said(quantized: Bundle, native_build: Path, tmp_path: Path) -> None:
    """Neither called a fault of the kernels, nor of the bundle. The micro tower is too small to lack any."""
    nodes = [onnx.helper.make_node("MatMul", ["pixels", "pixels"], ["features"])]
    sides = [onnx.helper.make_tensor_value_info(name, 1, [1, "n", "n"]) for name in ("pixels", "features")]
    graph = onnx.helper.make_graph(nodes, "large", sides[:1], sides[1:])
    versions = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=versions, ir_version=8), tmp_path / "large.onnx")
    code = f"""
import resource
from pathlib import Path
import numpy as np
import onnxruntime
from llava_edge.bundle import Bundle
from llava_edge.errors import MemoryLimitError
from llava_edge.runtimes.native import operator
from llava_edge.runtimes.projector import Projector
from llava_edge.runtimes.vision import VisionEncoder
bundle, library = Bundle.open(Path({str(quantized.folder)!r})), Path({str(native_build / installed.OPERATOR)!r})
projector, encoder, options = Projector(bundle, library), VisionEncoder(bundle, 1), VisionEncoder.new_run_options()
settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads, settings.log_severity_level = 1, 4
encoder._session = onnxruntime.InferenceSession({str(tmp_path / "large.onnx")!r}, settings, providers=[{CPU!r}])
features, pixels = np.ones((9, bundle.manifest.vision.width), np.float32), np.ones((4096, 4096), np.float32)
operator._open_library(library)
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
for compute in (lambda: projector.project(features), lambda: encoder.encode(pixels, options)):
    try:
        compute()
    except MemoryLimitError as error:
        print(error)
"""
    projector, encoder = in_child(code).stdout.splitlines()
    assert projector == "There is not enough memory to compute the embeddings of a picture."
    assert encoder == f"ONNX Runtime failed in {quantized.part(VISION)}: there is not enough memory."


def test_the_projector_is_the_same_by_our_kernel(quantized: Bundle, native_home: Path) -> None:
    """Where the kernel takes a layer, rounded; and not at all where numpy was faster."""
    features = np.random.default_rng(0).standard_normal((9, quantized.manifest.vision.width), np.float32)
    library = native.projector_library()
    assert library == native_home / installed.OPERATOR
    found, expected = Projector(quantized, library, 2).project(features), Projector(quantized).project(features)
    assert 0 < relative(found, expected) < 2e-3
    state = json.loads((native_home / "state.json").read_text("utf-8"))
    for race in ({"plain": 1.0, "ours": 1.0}, {"plain": 1.0}, None):
        (native_home / "state.json").write_text(json.dumps(state | {"projector": race}), "utf-8")
        assert native.projector_library() is None
        assert native.operator_library() is not None


def test_features_are_those_of_the_standard_operators(quantized: Bundle, native_home: Path) -> None:
    for seed in range(3):
        image = pixels(quantized, seed)
        usual, ours = (VisionEncoder(quantized, 2, CPU, native=choice) for choice in (False, True))
        found, expected = ours.encode_with_attention(image), usual.encode_with_attention(image)
        for one, other in zip(found, expected, strict=True):
            assert 0 < relative(one, other) < 2e-2  # they round differently


def test_every_linear_layer_and_attention_is_one_node(quantized: Bundle) -> None:
    raw = Path(quantized.part(VISION)).read_bytes()
    before = onnx.load_from_string(raw).graph
    changed = operator.fuse_operators(raw, 3)
    assert changed is not None
    after = onnx.load_from_string(changed).graph
    linear = [node for node in after.node if node.op_type == "Linear"]
    products = [node for node in before.node if node.op_type == "MatMulInteger"]
    assert 2 * len(linear) == len(products) > 0
    attention = [node for node in after.node if node.op_type == "Attention"]
    assert len(attention) == len([node for node in before.node if node.name.startswith("Softmax")]) - 1 > 0
    assert all(node.domain == "llava_edge" and node.attribute[0].i == 3 for node in linear + attention)
    assert not [node for node in after.node if "Integer" in node.op_type or "Quantize" in node.op_type]
    activated = [node for node in linear if "quick_gelu" in {item.name for item in node.attribute}]
    assert len(activated) == len([node for node in before.node if node.op_type == "Sigmoid"]) > 0
    assert not [node for node in after.node if node.op_type == "Sigmoid"]
    read = {name for node in after.node for name in node.input}
    assert {item.name for item in after.initializer} <= read
    assert [item.name for item in after.output] == [item.name for item in before.output]


def test_nodes_in_any_order_become_the_same_graph(quantized: Bundle) -> None:
    """ONNX requires topological order, but ONNX Runtime does not."""
    model = onnx.load_from_string(Path(quantized.part(VISION)).read_bytes())
    changed = operator.fuse_operators(model.SerializeToString(), 1)
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    reordered = operator.fuse_operators(model.SerializeToString(), 1)
    assert changed is not None
    assert reordered is not None
    first, second = (onnx.load_from_string(raw).graph for raw in (changed, reordered))
    assert list(second.node) == list(first.node)[::-1]
    assert list(second.initializer) == list(first.initializer)


def other_input(graph: Any) -> None:
    rests = [node for node in graph.node if node.op_type == "Sub"]
    rests[1].input[0] = rests[0].input[0]


def other_weights(graph: Any) -> None:
    products = [node for node in graph.node if node.op_type == "MatMulInteger"]
    graph.initializer.append(onnx.numpy_helper.from_array(np.ones((16, 16), np.int8), "others"))
    products[1].input[1] = "others"


def weights_have_a_zero_point(graph: Any) -> None:
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(5, np.int8), "five"))
    product(graph).input.append("five")


def other_zero_point(graph: Any) -> None:
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(5, np.uint8), "five"))
    product(graph).input[2] = "five"


def one_scale_for_all_columns(graph: Any) -> None:
    replace(graph, ".scale", np.ones(1, np.float32))


def one_bias_for_all_columns(graph: Any) -> None:
    replace(graph, ".bias", np.ones(1, np.float32))


def unsigned_weights(graph: Any) -> None:
    weight = next(item for item in graph.initializer if item.name == product(graph).input[1])
    weight.data_type = onnx.TensorProto.UINT8


def product(graph: Any) -> Any:
    return next(node for node in graph.node if node.op_type == "MatMulInteger")


def replace(graph: Any, ending: str, values: np.ndarray) -> None:
    name = product(graph).input[1].removesuffix(".weight") + ending
    (found,) = [item for item in graph.initializer if item.name == name]
    found.CopyFrom(onnx.numpy_helper.from_array(values, name))


@pytest.mark.parametrize(
    "change",
    [
        other_input,
        other_weights,
        weights_have_a_zero_point,
        other_zero_point,
        one_scale_for_all_columns,
        one_bias_for_all_columns,
        unsigned_weights,
    ],
)
def test_what_is_no_such_layer_stays(quantized: Bundle, change: Callable[[Any], None]) -> None:
    model = onnx.load_from_string(Path(quantized.part(VISION)).read_bytes())
    layers = sum(node.op_type == "MatMulInteger" for node in model.graph.node) // 2
    change(model.graph)
    changed = operator.fuse_operators(model.SerializeToString(), 1)
    assert changed is not None
    kinds = [node.op_type for node in onnx.load_from_string(changed).graph.node]
    assert kinds.count("Linear") == layers - 1
    assert kinds.count("MatMulInteger") == 2


def other_factor(graph: Any) -> None:
    first(graph, "Sigmoid", "Mul").input[1] = "scalar_1.0"
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, np.float32), "scalar_1.0"))


def gate_of_another(graph: Any) -> None:
    gates = [node for node in graph.node if node.op_type == "Sigmoid"]
    activated = next(node for node in graph.node if gates[0].output[0] in node.input)
    activated.input[1] = activated.input[0]


def used_twice(graph: Any) -> None:
    gate = first(graph, "Sigmoid", "Mul")
    graph.node.append(onnx.helper.make_node("Identity", [gate.input[0]], ["again"]))
    graph.output.append(onnx.helper.make_tensor_value_info("again", onnx.TensorProto.FLOAT, None))


@pytest.mark.parametrize("change", [other_factor, gate_of_another, used_twice])
def test_what_is_no_such_activation_stays(quantized: Bundle, change: Callable[[Any], None]) -> None:
    model = onnx.load_from_string(Path(quantized.part(VISION)).read_bytes())
    layers = sum(node.op_type == "MatMulInteger" for node in model.graph.node) // 2
    gates = sum(node.op_type == "Sigmoid" for node in model.graph.node)
    change(model.graph)
    changed = operator.fuse_operators(model.SerializeToString(), 1)
    assert changed is not None
    linear = [node for node in onnx.load_from_string(changed).graph.node if node.op_type == "Linear"]
    assert len(linear) == layers
    assert sum(len(node.attribute) == 2 for node in linear) == gates - 1


def other_scale(graph: Any) -> None:
    scaled = first(graph, "Softmax", "MatMul", "Mul")
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.3, np.float32), "other"))
    scaled.input[1] = "other"


def keys_for_values(graph: Any) -> None:
    weighed = next(node for node in graph.node if node.op_type == "MatMul" and "Softmax" in node.input[0])
    keys = first(graph, "Softmax", "MatMul", "Transpose", at=1)
    weighed.input[1] = keys.input[0]


def heads_inside(graph: Any) -> None:
    order(first(graph, "Softmax", "MatMul", "Mul", "Gather", "Transpose"), [3, 0, 2, 1, 4])


def keys_unturned(graph: Any) -> None:
    order(first(graph, "Softmax", "MatMul", "Transpose", at=1), [0, 1, 2, 3])


def over_queries(graph: Any) -> None:
    first(graph, "Softmax").attribute[0].i = -2


def first(graph: Any, *kinds: str, at: int = 0) -> Any:
    """The node that the first softmax of all heads comes from, through nodes of these kinds; the last by input `at`."""
    made_by = {name: node for node in graph.node for name in node.output}
    node = next(node for node in graph.node if node.op_type == kinds[0])
    for number, kind in enumerate(kinds[1:], 2):
        node = made_by[node.input[at if number == len(kinds) else 0]]
        assert node.op_type == kind
    return node


def order(transpose: Any, values: list[int]) -> None:
    transpose.attribute[0].ints[:] = values


@pytest.mark.parametrize("change", [other_scale, keys_for_values, heads_inside, keys_unturned, over_queries])
def test_what_is_no_such_attention_stays(quantized: Bundle, change: Callable[[Any], None]) -> None:
    model = onnx.load_from_string(Path(quantized.part(VISION)).read_bytes())
    changed = operator.fuse_operators(model.SerializeToString(), 1)
    assert changed is not None
    all_of_them = [node.op_type for node in onnx.load_from_string(changed).graph.node].count("Attention")
    change(model.graph)
    changed = operator.fuse_operators(model.SerializeToString(), 1)
    assert changed is not None
    assert [node.op_type for node in onnx.load_from_string(changed).graph.node].count("Attention") == all_of_them - 1


def test_what_is_no_such_model_stays(quantized: Bundle, micro_bundle: Path) -> None:
    """Another precision, and a graph within the graph, whose nodes may read what seems to be unused."""
    assert operator.fuse_operators((micro_bundle / VISION).read_bytes(), 1) is None
    model = onnx.load_from_string(Path(quantized.part(VISION)).read_bytes())
    model.graph.node.append(onnx.helper.make_node("If", ["condition"], ["value"]))
    assert operator.fuse_operators(model.SerializeToString(), 1) is None


@pytest.mark.parametrize(
    ("x", "inner", "scale", "bias", "problem"),
    [
        ((1, 3, 32), 32, 8, 8, ""),
        ((2, 3, 32), 32, 8, 8, ""),
        ((1, 3, 4096), 32, 8, 8, "do not match"),
        ((1, 3, 32), 32, 1, 8, "do not match"),
        ((1, 3, 32), 32, 8, 1, "do not match"),
        ((1, 3, 40), 40, 8, 8, "do not match"),
        ((3, 32), 32, 8, 8, "wrong rank"),
        ((*[1] * 60, 3, 32), 32, 8, 8, "wrong rank"),
    ],
)
def test_the_operator_refuses_what_does_not_fit(
    native_build: Path, x: tuple[int, ...], inner: int, scale: int, bias: int, problem: str
) -> None:
    """Whoever made the graph: nothing is read that is not there."""
    numbers = np.random.default_rng(0)
    weight = numbers.integers(-127, 128, (inner, 8), np.int8)
    constants = {"w": weight, "s": numbers.random(scale, np.float32), "b": numbers.random(bias, np.float32)}
    values, float32 = numbers.standard_normal(x, np.float32), onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Linear", ["x", "w", "s", "b"], ["y"], domain="llava_edge", threads=1)],
        "one",
        [onnx.helper.make_tensor_value_info("x", float32, x)],
        [onnx.helper.make_tensor_value_info("y", float32, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    session = opened(native_build, graph)
    if problem:
        with pytest.raises(Exception, match=problem):
            session.run(None, {"x": values})
        return
    (found,) = session.run(None, {"x": values})
    assert relative(found, values.astype(np.float64) @ weight * constants["s"] + constants["b"]) < 3e-4


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((2, 5, 96), ""),
        ((1, 5, 90), "number or width of heads"),
        ((5, 96), "wrong rank"),
        ((*[1] * 60, 5, 96), "wrong rank"),
    ],
)
def test_the_operator_refuses_other_heads(native_build: Path, shape: tuple[int, ...], problem: str) -> None:
    qkv = np.random.default_rng(0).standard_normal(shape, np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Attention", ["x"], ["y"], domain="llava_edge", threads=1, heads=2)],
        "one",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
    )
    session = opened(native_build, graph)
    if problem:
        with pytest.raises(Exception, match=problem):
            session.run(None, {"x": qkv})
        return
    (found,) = session.run(None, {"x": qkv})
    assert (found == operator.attention(native_build / installed.OPERATOR, qkv, 2)).all()


def opened(native_build: Path, graph: Any) -> Any:
    """A session of a graph that uses our operators."""
    versions = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("llava_edge", 1)]
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.register_custom_ops_library(str(native_build / installed.OPERATOR))
    raw = onnx.helper.make_model(graph, opset_imports=versions, ir_version=8).SerializeToString()
    return onnxruntime.InferenceSession(raw, settings, providers=[CPU])


def test_a_damaged_file_is_one_sentence(quantized: Bundle, native_home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(quantized.folder, copy)
    raw = (copy / VISION).read_bytes()
    for damaged in (raw[: len(raw) // 2], b"\xff" * (1 << 20), b"\x08" * 40):
        (copy / VISION).write_bytes(damaged)
        with pytest.raises(BundleError, match=r"ONNX Runtime (cannot load|failed)"):
            VisionEncoder(Bundle(copy, quantized.manifest), 1, CPU, native=True).encode(pixels(quantized))


def test_only_what_was_tried_and_right_is_used(native_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.operator_library() == native_home / installed.OPERATOR
    monkeypatch.setenv("LLAVA_EDGE_NATIVE", "off")
    assert native.operator_library() is None
    monkeypatch.delenv("LLAVA_EDGE_NATIVE")
    state = json.loads((native_home / "state.json").read_text("utf-8"))
    for change in ({"problems": {installed.OPERATOR: "It is off."}}, {"operator": "0"}, {"failed": "killed"}):
        (native_home / "state.json").write_text(json.dumps(state | change), "utf-8")
        assert native.operator_library() is None


def test_without_it_the_standard_operators_compute(quantized: Bundle, isolated_home: Path) -> None:
    image = pixels(quantized)
    found = VisionEncoder(quantized, 1, CPU, native=True).encode(image)
    assert (found == VisionEncoder(quantized, 1, CPU).encode(image)).all()


def test_the_self_test_finds_a_wrong_one(native_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = native_build / installed.OPERATOR
    assert check.check_operators(path) == ""
    real = operator.linear
    monkeypatch.setattr(operator, "linear", lambda *inputs: real(*inputs) * 1.1)
    assert check.check_operators(path).startswith("An operator for ONNX Runtime is off by 1.0e-01")


def test_tuning_compares_both(
    quantized: Bundle, micro_bundle: Path, native_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "external_cpu_seconds", lambda: 0.0)
    monkeypatch.setattr(machine, "int8_saturates", lambda: True)
    assert not tune.default_setting(Bundle.open(micro_bundle), 1).native  # fp32
    assert tune.default_setting(quantized, 1).native
    found = tune.measure(quantized)
    assert found[0].native
    assert {(item.native, item.prepack) for item in found} == {(True, False), (False, True), (False, False)}
    assert tune.load(quantized) == found
    assert "our operator" in str(found[0])
    monkeypatch.setattr(machine, "int8_saturates", lambda: False)
    monkeypatch.setattr(native, "operator_library", lambda: native_home / installed.OPERATOR)
    for flags, ours in (["avx_vnni"], False), (["avx512_vnni"], True), (["avx512_vnni", "amx_int8"], False):
        monkeypatch.setattr(machine, "processor", lambda flags=flags: ("a processor", flags))
        assert tune.default_setting(quantized, 1).native == ours
    monkeypatch.setattr(native, "operator_library", lambda: None)
    monkeypatch.setattr(machine, "processor", lambda: ("a processor", ["avx512_vnni"]))
    assert not tune.default_setting(quantized, 1).native


def test_tuning_leaves_out_a_wrong_one(quantized: Bundle, native_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "external_cpu_seconds", lambda: 0.0)
    monkeypatch.setattr(machine, "int8_saturates", lambda: True)
    real = VisionEncoder.encode

    def encode(self: VisionEncoder, image: np.ndarray, run: object = None) -> np.ndarray:
        return real(self, image, run) * (1.1 if self.native else 1)

    monkeypatch.setattr(VisionEncoder, "encode", encode)
    found = tune.measure(quantized)
    assert found
    assert not any(item.native for item in found)


def test_kept_pictures_are_not_those_of_the_other(quantized: Bundle, native_home: Path) -> None:
    ours, usual = (
        embedder._identity(quantized, tune.Setting(1, False, native=choice), CPU, None) for choice in (True, False)
    )
    assert ours != usual
