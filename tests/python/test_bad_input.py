"""Bad input gets a typed error that says what, where, got, expected and the fix; odd but legal input gets the right result."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gingham
from gingham import nn
from gingham.launch.parallel_config import parse_parallel
from gingham.mesh import axes_of, axes_of_device_mesh
from grids import GRIDS, ranks_of, relative


@pytest.fixture
def one() -> Any:
    """A mesh of one rank, in this process."""
    mesh = gingham.init()
    yield mesh
    gingham.destroy()


BAD_MESHES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (dict(mode="2d", size=6), ("2d", "q*q", "size=6", "4, 9")),
    (dict(mode="2.5d", size=10, depth=2), ("2.5d", "q*q*depth", "size=10", "2, 8, 18")),
    (dict(mode="2.5d", size=8, depth=3), ("size=8", "3, 12")),
    (dict(mode="3d", size=16), ("p*p*p", "size=16", "8, 27")),
    (dict(mode="2.5d", size=8, depth=0), ("depth",)),
    (dict(mode="2.5d", size=8, depth=-2), ("depth=-2", "at least 1")),
    (dict(mode="2d", size=0), ("size=", "got 0")),
    (dict(mode="2d", size=-4), ("size=", "got -4")),
    (dict(mode="2d", size=4.0), ("size=", "got 4.0")),
    (dict(mode=None, grid=(2, 0, 2)), ("grid=(2, 0, 2)", "at least 1")),
    (dict(mode=None, grid=(2, 2, 1.5)), ("three numbers",)),
    (dict(mode="3d", size=8, depth=2), ("depth=2", "2.5d", "got mode '3d'")),
    (dict(mode="1d", size=8, shard_depth=True), ("shard_depth", "2.5d")),
    (dict(mode=None, size=4), ("size=4 without a mode", "1d", "grid=(pm, pn, pk)")),
    (dict(mode="25d", size=8), ("unknown mode '25d'", "2.5d")),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_MESHES, ids=[str(arguments) for arguments, _ in BAD_MESHES])
def test_meshes_that_do_not_exist(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(gingham.MeshError) as caught:
        axes_of(**arguments)
    assert isinstance(caught.value, ValueError) and all(word in str(caught.value) for word in words), caught.value


BAD_CONFIGURATIONS: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    (dict(tensor=4), gingham.MeshError, ("tensor=4 without a mode", "size=4", "'1d'", "'2.5d'")),
    (dict(tensor=dict(size=4)), gingham.MeshError, ("tensor=4 without a mode",)),
    (dict(tensor=dict(size=8, mode="2.5d", deep=2)), gingham.MeshError, ("unknown ['deep']",)),
    (dict(pipelines=2), gingham.MeshError, ("unknown ['pipelines']", "tensor, pipeline, data")),
    (dict(pipeline=0), gingham.MeshError, ("pipeline=0", "at least 1")),
    (dict(data="two"), gingham.MeshError, ("data='two'", "at least 1")),
    (dict(pipeline=dict(size=2, schedule="fast")), gingham.MeshError, ("schedule='fast'", "'1f1b'")),
]


@pytest.mark.parametrize(("given", "kind", "words"), BAD_CONFIGURATIONS, ids=[str(given) for given, *_ in BAD_CONFIGURATIONS])
def test_configurations(given: dict[str, Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(kind) as caught:
        parse_parallel(given)
    assert all(word in str(caught.value) for word in words), caught.value
    with pytest.raises(kind):
        gingham.init(parallel=given)
    assert not torch.distributed.is_initialized()


def test_init_names_the_worlds_size_and_starts_nothing() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        (dict(mode="2.5d", size=8, depth=2), "has 8 ranks but the job has 1: start 8 processes"),
        (dict(grid=(3, 2, 2)), "has 12 ranks but the job has 1"),
        (dict(mode="2d", parallel=dict(tensor=dict(size=4, mode="2d"))), "parallel= excludes mode"),
        (dict(mode="1d", size=1, source="pipe"), "source='pipe'"),
        (dict(mode="1d", size=1, slices=0), "slices=0"),
    ]
    for arguments, message in wrong:
        with pytest.raises(gingham.MeshError, match=re.escape(message)):
            gingham.init(**arguments)
        assert not torch.distributed.is_initialized()


def test_device_meshes_that_mean_nothing() -> None:
    class Described:
        def __init__(self, names: tuple[str, ...] | None, shape: tuple[int, ...]) -> None:
            self.mesh_dim_names, self.shape = names, shape

    for names, shape, word in ((("dp", "tp"), (2, 2), "('dp', 'tp')"), (None, (4,), "dims ()"), (("row", "col"), (2, 4), "(2, 4)")):
        with pytest.raises(gingham.MeshError, match=re.escape(word)):
            axes_of_device_mesh(Described(names, shape))  # type: ignore[arg-type]


def fake(*shape: int) -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(*shape)


FOREIGN: dict[str, Callable[[], Any]] = {
    "DTensor": lambda: nn.Linear(4, 4).weight,
    "FakeTensor": lambda: fake(2, 4),
    "meta": lambda: torch.empty(2, 4, device="meta"),
    "complex64": lambda: torch.ones(2, 4, dtype=torch.complex64),
    "sparse": lambda: torch.ones(2, 4).to_sparse(),
    "list": lambda: [[1.0, 2.0, 3.0, 4.0]],
    "ndarray": lambda: torch.ones(2, 4).numpy(),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_a_local_tensor(one: gingham.Mesh, kind: str) -> None:
    bad, good = FOREIGN[kind](), torch.ones(4, 4)
    ids = torch.zeros(2, dtype=torch.int64)
    calls: dict[str, Callable[[], Any]] = {
        "scatter's x": lambda: one.scatter(bad),
        "gather's x": lambda: one.gather(bad),
        "matmul's a": lambda: gingham.matmul(bad, good),
        "matmul's b": lambda: gingham.matmul(good, bad),
        "linear's x": lambda: nn.Linear(4, 4)(bad),
        "LayerNorm's x": lambda: nn.LayerNorm(4)(bad),
        "Embedding's ids": lambda: nn.Embedding(4, 4)(bad),
        "dropout's x": lambda: nn.Dropout(0.5)(bad),
        "cross_entropy's logits": lambda: gingham.cross_entropy(bad, ids),
        "cross_entropy's target": lambda: gingham.cross_entropy(torch.ones(2, 4), bad),
    }
    for what, call in calls.items():
        with pytest.raises(TypeError) as caught:
            call()
        message = str(caught.value)
        assert what in message and kind in message and "expected" in message, message
    if kind == "DTensor":
        assert "to_local()" in message


def test_lazily_conjugated_or_negated_tensors(one: gingham.Mesh) -> None:
    """torch's neg bit is dropped by DLPack: x.imag of a conjugate is such a view."""
    z = torch.complex(torch.randn(4, 4), torch.randn(4, 4))
    x = z.conj().imag
    assert x.is_neg()
    assert torch.equal(gingham.matmul(x, torch.eye(4)), x.resolve_neg())
    assert torch.equal(one.gather(one.scatter(x)), x.resolve_neg())
    assert torch.equal(nn.LayerNorm(4)(x), nn.LayerNorm(4)(x.resolve_neg()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.uint8])
def test_dtypes_that_cannot_be_multiplied(one: gingham.Mesh, dtype: torch.dtype) -> None:
    x = torch.ones(4, 4).to(dtype)
    for call in (lambda: gingham.matmul(x, x), lambda: nn.Linear(4, 4)(x)):
        with pytest.raises((gingham.ShapeError, TypeError)) as caught:
            call()
        assert "dtype" in str(caught.value) and "expected float32" in str(caught.value), caught.value


def test_dtypes_that_differ(one: gingham.Mesh) -> None:
    for call in (
        lambda: gingham.matmul(torch.ones(4, 4), torch.ones(4, 4, dtype=torch.float64)),
        lambda: nn.Linear(4, 4)(torch.ones(2, 4, dtype=torch.float64)),
        lambda: nn.Linear(4, 4, dtype=torch.float64)(torch.ones(2, 4)),
    ):
        with pytest.raises(gingham.ShapeError) as caught:
            call()
        assert "float32" in str(caught.value) and "float64" in str(caught.value), caught.value


def test_shapes_that_do_not_fit(one: gingham.Mesh) -> None:
    layer, ids = nn.Linear(4, 6), torch.zeros(2, dtype=torch.int64)
    wrong: list[tuple[Callable[[], Any], tuple[str, ...]]] = [
        (lambda: layer(torch.ones(2, 5)), ("5", "4")),
        (lambda: layer(torch.ones(())), ("without dims", "[..., 4]")),
        (lambda: gingham.matmul(torch.ones(4, 5), torch.ones(4, 5)), ("5", "4")),
        (lambda: gingham.matmul(torch.ones(4), torch.ones(4, 5)), ("matmul: a has shape (4,)", "matrix")),
        (lambda: nn.LayerNorm(4)(torch.ones(2, 5)), ("(2, 5)", "[..., 4]")),
        (lambda: gingham.cross_entropy(torch.ones(3, 4), ids), ("(3, 4)", "(2,)", "[..., V]")),
        (lambda: gingham.cross_entropy(torch.ones(2, 4), ids + 4), ("0..3",)),
        (lambda: nn.Embedding(4, 4)(ids - 1), ("-1", "0..3")),
        (lambda: nn.SelfAttention(8, 2)(torch.ones(2, 8)), ("(2, 8)", "[batch, time, width]")),
        (lambda: nn.SelfAttention(8, 3), ("3 heads", "width of 8", "[1, 2, 4, 8]")),
        (lambda: one.scatter(torch.ones(4), "a"), ("matrix", "1 dims")),
        (lambda: one.scatter(torch.ones(4, 4), "q"), ("operand='q'", "expected")),
        (lambda: one.scatter(torch.ones(4, 4), dim=2), ("dim=2",)),
    ]
    for call, words in wrong:
        with pytest.raises(gingham.ShapeError) as caught:
            call()
        assert isinstance(caught.value, ValueError) and all(word in str(caught.value) for word in words), caught.value


def test_options_that_do_not_exist(one: gingham.Mesh) -> None:
    wrong: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: nn.Linear(4, 4, layout="inner->inner"), gingham.MeshError, "expected 'outer->outer'"),
        (lambda: nn.Linear(4, 4, swapped="maybe"), gingham.MeshError, "swapped='maybe'"),
        (lambda: nn.LayerNorm(4, layout="middle")(torch.ones(2, 4)), gingham.MeshError, "layout='middle'"),
        (lambda: nn.Dropout(1.5), ValueError, "between 0 and 1"),
        (lambda: nn.SelfAttention(8, 2, dim=2), gingham.ShapeError, "dim=2"),
        (lambda: gingham.cross_entropy(torch.ones(2, 4), torch.ones(2)), TypeError, "integer dtype"),
        (lambda: gingham.cross_entropy(torch.ones(2, 4), torch.zeros(2).long(), reduction="max"), ValueError, "reduction='max'"),
    ]
    for call, kind, message in wrong:
        with pytest.raises(kind, match=re.escape(message)):
            call()


def test_use_after_destroy() -> None:
    mesh = gingham.init()
    layer, norm, table = nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(4, 4)
    x = torch.ones(2, 4, requires_grad=True)
    y = layer(x)
    gingham.destroy()
    gingham.destroy()
    for call in (lambda: layer(x), lambda: y.sum().backward(), lambda: mesh.scatter(x), lambda: mesh.empty([2], torch.float32)):
        with pytest.raises(gingham.MeshError, match="destroy"):
            call()
    for call in (lambda: nn.Linear(4, 4), lambda: gingham.matmul(x, x), lambda: nn.Embedding(4, 4)):
        with pytest.raises(gingham.MeshError, match=r"call gingham\.init"):
            call()
    assert y.shape == (2, 4) and bool(torch.isfinite(y).all()) and norm is not None and table is not None  # results outlive the mesh


ON = ["2d", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("1d", "2.5d", "3x2x2", "1d sequence"))]
VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every other column": lambda x: torch.stack([x, x + 1], -1).flatten(1)[:, ::2],
    "flipped twice": lambda x: x.flip(0).flip(0),
    "an offset": lambda x: torch.cat([x[:1], x])[1:],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "parts of a wider one": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
}


def through_views(rank: int, options: dict[str, Any]) -> dict[str, float]:
    mesh, errors = gingham.init(**options), {}
    torch.manual_seed(0)
    A, B = torch.randn(9, 7, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    torch.manual_seed(1)
    layer = nn.Linear(7, 5, dtype=torch.float64)
    torch.manual_seed(1)
    twin = torch.nn.Linear(7, 5, dtype=torch.float64)
    for name, view in VIEWS.items():
        a, b = view(mesh.scatter(A, "a")).requires_grad_(), view(mesh.scatter(B, "b"))
        c = mesh.gather(view(gingham.matmul(a, b, shape=(9, 7, 5))), "c")
        errors[f"C {name}"] = relative(c, A @ B)
        # an expanded cotangent: strides 0
        c.sum().backward()
        errors[f"dA {name}"] = relative(mesh.gather(a.grad, "a"), torch.ones(9, 5, dtype=torch.float64) @ B.T)
        x = view(mesh.scatter(A)).requires_grad_()
        errors[f"y {name}"] = relative(mesh.gather(view(layer(x))), twin(A))
        layer(x).sum().backward()
        exact = torch.ones(9, 5, dtype=torch.float64) @ twin.weight
        errors[f"dx {name}"] = relative(mesh.gather(x.grad), exact)
    return errors


@pytest.mark.parametrize("name", ON)
def test_views_of_every_stride(ranks, name: str) -> None:
    errors = ranks(ranks_of(name))(through_views, GRIDS[name])[0]
    assert max(errors.values()) <= 1e-12, {key: error for key, error in errors.items() if error > 1e-12}


SIZES = [(0, 4, 4), (4, 0, 4), (4, 4, 0), (0, 0, 0), (1, 1, 1), (1, 7, 1), (3, 1, 13), (2, 2, 2), (11, 13, 17)]


def of_sizes(rank: int, options: dict[str, Any]) -> dict[str, float]:
    mesh, errors = gingham.init(**options), {}
    for m, k, n in SIZES:
        torch.manual_seed(0)
        A, B = torch.randn(m, k, dtype=torch.float64), torch.randn(k, n, dtype=torch.float64)
        a, b = mesh.scatter(A, "a").requires_grad_(), mesh.scatter(B, "b").requires_grad_()
        c = gingham.matmul(a, b, shape=(m, k, n))
        (mesh.gather(c, "c") * 3).sum().backward()
        G = torch.full((m, n), 3.0, dtype=torch.float64)
        pairs = {"C": (mesh.gather(c, "c"), A @ B), "dA": (mesh.gather(a.grad, "a"), G @ B.T), "dB": (mesh.gather(b.grad, "b"), A.T @ G)}
        errors |= {f"{name} {(m, k, n)}": relative(got, expected) for name, (got, expected) in pairs.items()}
    return errors


@pytest.mark.parametrize("name", ON)
def test_empty_tiny_and_prime_sizes(ranks, name: str) -> None:
    errors = ranks(ranks_of(name))(of_sizes, GRIDS[name])[0]
    assert max(errors.values()) <= 1e-12, {key: error for key, error in errors.items() if error > 1e-12}


def test_sizes_that_do_not_divide_want_their_shape(ranks) -> None:
    def refuse(rank: int) -> str:
        mesh = gingham.init(**GRIDS["2d"])
        with pytest.raises(gingham.ShapeError) as caught:
            gingham.matmul(mesh.scatter(torch.ones(4, 5), "a"), mesh.scatter(torch.ones(5, 4), "b"))
        return str(caught.value)

    for message in ranks(4)(refuse):
        assert "global shape" in message, message


def said_by_layers(rank: int) -> dict[str, str]:
    """The likely mistake is in the words, by torch's names (D)."""
    mesh = gingham.init(mode="2d", size=4)
    full = torch.randn(8, 16)
    x, target = mesh.scatter(full), torch.arange(8)
    linear, norm = gingham.nn.Linear(16, 8), gingham.nn.LayerNorm(16)
    calls = {
        "int": lambda: linear(x.long()),
        "norm of int": lambda: norm(x.long()),
        "norm of full": lambda: norm(full),
        "full labels": lambda: gingham.cross_entropy(linear(x), target),
        "smoothing": lambda: gingham.cross_entropy(linear(x), mesh.scatter(target), label_smoothing=2.0),
        "layout": lambda: gingham.nn.Linear(4, 4, True, None, torch.float64),
        "list": lambda: gingham.nn.SelfAttention(16, 4)([1.0]),
    }
    said = {}
    for name, call in calls.items():
        with pytest.raises((gingham.ShapeError, gingham.MeshError, TypeError, ValueError)) as error:
            call()
        said[name] = str(error.value)
    return said


def test_d_layers_name_the_likely_mistake(ranks) -> None:
    said = ranks(4)(said_by_layers)[1]
    for name, words in {
        "int": "torch.int64",
        "norm of int": "torch.int64",
        "norm of full": "mesh.scatter(x)",
        "full labels": "mesh.scatter(target)",
        "smoothing": "from 0 to 1",
        "layout": "'outer->outer'",
        "list": "SelfAttention's x: got a list",
    }.items():
        assert words in said[name], said[name]


def rows_of_others(rank: int) -> list[tuple[str, bool]]:
    """Rows that lie on other ranks than torch.chunk's, which results would."""
    gingham.init(mode="1d", size=4, sequence=True)
    layer, found = gingham.nn.Linear(6, 8), []
    for counts in ([3, 2, 0, 3], [3, 3, 2, 2], [0, 0, 0, 1], [3, 3, 3, 1]):
        for inner in ((), (2,)):
            x = torch.ones(counts[rank], *inner, 6)
            try:
                found.append(("", layer(x).shape[:-1] == x.shape[:-1]))
            except gingham.ShapeError as error:
                found.append((str(error), False))
    return found


def test_d_rows_that_results_would_not_have(ranks) -> None:
    for found in ranks(4)(rows_of_others):
        assert (
            "3, 2, 0, 3 rows, expected 2, 2, 2, 2" in found[0][0] and "3, 3, 2, 2" in found[2][0] and "expected 1, 0, 0, 0" in found[4][0]
        )
        assert len(found) == 8 and all("the ranks have" in said for said, _ in found[:6]) and all(same for _, same in found[6:]), found
