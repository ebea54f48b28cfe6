"""torch.compile(fullgraph=True): no graph break, the bits of eager, gradients as DTensors, no op dropped, uneven rows refused."""

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import families
import gingham
from gingham import nn
from gingham.commands import gpt
from gingham.mesh import current
from grids import GRIDS, ranks_of, relative

Model = Callable[..., torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def fresh_ranks_afterwards(pools: Any) -> Iterator[None]:
    """Dynamo's guards hold copies of the meshes of compiled graphs, with process groups whose threads never sleep long."""
    yield
    for pool in pools.values():
        pool.stop()


def results(mesh: Any, build: Callable[[], tuple[torch.nn.Module, Model]], inputs: list[torch.Tensor], wrap: Any) -> list[torch.Tensor]:
    """Outputs and every gradient of two steps; parameters' gradients must be DTensors placed as they are."""
    torch.manual_seed(0)
    module, step = build()
    step = wrap(step)
    found = []
    for _ in range(2):
        module.zero_grad()
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        y = step(*leaves)
        (y if y.dim() == 0 else y.float().pow(2).sum()).backward()
        found += [y.detach().clone(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]
        for parameter in module.parameters():
            gradient = parameter.grad
            assert gradient.placements == parameter.placements and gradient.shape == parameter.shape, gradient
            assert gradient.dtype == parameter.dtype
            found.append(gradient.to_local().clone())
    return found


def both(mesh: Any, build: Any, inputs: list[torch.Tensor], backend: str = "aot_eager", rounding: float = 0.0) -> bool:
    """Whether compiled, in one graph, and eager give the same bits, or differ by `rounding` of the Frobenius norm at most."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    eager = results(mesh, build, inputs, lambda step: step)
    compiled = results(mesh, build, inputs, lambda step: torch.compile(step, fullgraph=True, backend=backend))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1, counters
    return all(torch.equal(one, other) or relative(one, other) <= rounding for one, other in zip(eager, compiled, strict=True))


def model(rank: int, options: dict[str, Any]) -> bool:
    mesh = gingham.init(**options)

    def build() -> tuple[torch.nn.Module, Model]:
        made = gpt.GPT(gpt.parallel_kit(mesh), gpt.Shape(layers=1, width=48, heads=12, context=8, dropout=0.1))
        return made, lambda ids, target: made.loss(made(ids), target)

    generator = torch.Generator().manual_seed(1)
    ids, target = (torch.randint(0, 256, (24, 8), generator=generator) for _ in range(2))
    return both(mesh, build, [mesh.scatter(ids), mesh.scatter(target)])


@pytest.mark.parametrize("name", ["2d", *(pytest.param(name, marks=pytest.mark.matrix) for name in GRIDS if name != "2d")])
def test_gpt_has_the_bits_of_eager(ranks, name: str) -> None:
    assert all(ranks(ranks_of(name))(model, GRIDS[name], timeout=300.0))


@pytest.mark.skipif(not shutil.which("g++"), reason="NOT TESTED: inductor needs a C++ compiler, and there is no g++")
def test_through_inductor_close_to_eager(ranks) -> None:
    assert all(ranks(2)(close, GRIDS["1x1x2"], timeout=300.0))


def close(rank: int, options: dict[str, Any]) -> bool:
    """Inductor fuses what stands between our ops in its own way, so bits may differ: within float32's rounding."""
    mesh = gingham.init(**options)

    def build() -> tuple[torch.nn.Module, Model]:
        made = torch.nn.Sequential(nn.LayerNorm(32), nn.MLP(32, 64, dropout=0.1, activation="relu"), nn.Linear(32, 8))
        return made, lambda x, target: nn.cross_entropy(made(x), target)

    generator = torch.Generator().manual_seed(1)
    inputs = [mesh.scatter(torch.randn(8, 32, generator=generator)), mesh.scatter(torch.randint(0, 8, (8,), generator=generator))]
    torch._dynamo.reset()
    eager = results(mesh, build, inputs, lambda step: step)
    fused = results(mesh, build, inputs, lambda step: torch.compile(step, fullgraph=True, backend="inductor"))
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(eager, fused, strict=True))


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(24, 24, padding_idx=3)
        self.head = nn.Classifier(24, 24, tied=self.table)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


class Shared(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList([nn.Linear(24, 24, layout="outer->inner") for _ in range(2)])
        nn.share_input(*self.parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts[0](x) * self.parts[1](x)


class Skipped(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 36, skip_bias_add=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, bias = self.layer(x)
        return y + bias


# constructor, shape of the full input (integers for ids), operand of its scatter and dim of its rows
LAYERS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...], str, int]] = {
    "linear": (lambda: nn.Linear(24, 36, epilogue="gelu"), (24, 24), "x", 0),
    "skip_bias_add": (Skipped, (24, 24), "x", 0),
    "shared": (Shared, (24, 3, 24), "x", 0),
    "layer norm": (lambda: nn.LayerNorm(24), (24, 3, 24), "x", 0),
    "rms norm": (lambda: nn.RMSNorm(24), (24, 24), "x", 0),
    "gated": (lambda: nn.MLP(24, 48, dropout=0.2, activation="silu", gated=True), (24, 3, 24), "x", 0),
    "attention": (lambda: nn.SelfAttention(24, 12, dropout=0.2, kv_heads=12, rotary=1e4), (24, 4, 24), "x", 0),
    "attention by a ring": (
        lambda: nn.SelfAttention(24, 12, dim=1, ring=bool(current().inner.rows), dropout=0.2, rotary=1e4),
        (1, 24, 24),
        "x",
        1,
    ),
    "attention over sequences": (lambda: nn.SelfAttention(24, 12, dim=1), (1, 24, 24), "x", 1),
    "patches": (lambda: nn.PatchEmbedding(8, 4, 3, 24), (24, 3, 8, 8), "rows", 0),
    "tied": (Tied, (24, 4), "ids", 0),
}


# where axes cut rows
OVER_ROWS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...], str, int]] = {
    "attention by heads": (lambda: nn.SelfAttention(24, 12, dim=1, ring="heads", dropout=0.2, rotary=1e4), (1, 24, 24), "x", 1),
    "dropout in zigzag order": (lambda: nn.Dropout(0.3, dims=(1, -1), order="zigzag"), (2, 24, 24), "x", 1),
}


def layer_bits(rank: int, options: dict[str, Any], dtype: torch.dtype | None) -> dict[str, bool]:
    mesh = gingham.init(**options)
    found = {}
    for name, (make, shape, operand, dim) in (LAYERS | (OVER_ROWS if mesh.inner.rows else {})).items():

        def build(make: Callable[[], torch.nn.Module] = make) -> tuple[torch.nn.Module, Model]:
            made = make()

            def step(x: torch.Tensor) -> torch.Tensor:
                if dtype is None:
                    return made(x)
                with torch.autocast("cpu", dtype):
                    return made(x)

            return made, step

        generator = torch.Generator().manual_seed(2)
        full = torch.randint(0, 24, shape, generator=generator) if operand == "ids" else torch.randn(shape, generator=generator)
        # in a graph linears that share x run one by one, so that dX is another sum of the same parts
        rounding = (1e-6 if dtype is None else 1e-2) if name == "shared" else 0.0
        found[name] = both(mesh, build, [mesh.scatter(full, None if operand == "ids" else operand, dim)], rounding=rounding)
    return found


@pytest.mark.parametrize("dtype", [None, pytest.param(torch.bfloat16, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("name", ["1x1x2", *(pytest.param(name, marks=pytest.mark.matrix) for name in GRIDS if name != "1x1x2")])
def test_layers_have_the_bits_of_eager(ranks, name: str, dtype: torch.dtype | None) -> None:
    for found in ranks(ranks_of(name))(layer_bits, GRIDS[name], dtype, timeout=400.0):
        assert all(found.values()), found


def unused_on_one_rank(rank: int) -> tuple[bool, int]:
    """A layer whose result only rank 0 uses: the others must run it all the same, forward."""
    mesh = gingham.init(mode="1d", size=2)
    torch.manual_seed(0)
    one, other = nn.Linear(8, 8, layout="outer->inner"), nn.Linear(8, 8, layout="inner->outer")

    def step(x: torch.Tensor) -> torch.Tensor:
        y, unused = other(one(x)), other(one(x * 2))
        return y + unused if rank == 0 else y

    x = torch.randn(4, 8)
    mesh.traffic(reset=True)
    with torch.no_grad():
        expected = other(one(x)) + (other(one(x * 2)) if rank == 0 else 0 * other(one(x * 2)))
        eager = mesh.traffic(reset=True)["tp"]["bytes_received"]
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    return torch.equal(got, expected), mesh.traffic()["tp"]["bytes_received"] - eager


def test_no_op_is_dropped_where_its_result_is_unused(ranks) -> None:
    assert ranks(2)(unused_on_one_rank) == [(True, 0)] * 2


def uneven(rank: int) -> None:
    mesh = gingham.init(mode="1d", size=2, sequence=True)
    layer = nn.Linear(8, 8, layout="outer->inner")
    torch.compile(layer, fullgraph=True, backend="aot_eager")(mesh.scatter(torch.randn(5, 8)))


def test_uneven_rows_are_refused_not_guessed(ranks) -> None:
    outcomes = ranks(2)(uneven, outcomes=True)
    assert all(isinstance(outcome, Exception) for outcome in outcomes)
    assert any("cut evenly" in str(outcome) for outcome in outcomes), outcomes


def around(rank: int, options: dict[str, Any]) -> bool:
    """scatter and gather in the graph, whose features the ranks cut unevenly."""
    mesh = gingham.init(**options)

    def build() -> tuple[torch.nn.Module, Model]:
        made = nn.Linear(24, 37)
        return made, lambda x: mesh.gather(made(mesh.scatter(x)), features=37)

    return both(mesh, build, [torch.randn(24, 24, generator=torch.Generator().manual_seed(3))])


@pytest.mark.parametrize("name", ["2d", pytest.param("3d", marks=pytest.mark.matrix), pytest.param("3x2x2", marks=pytest.mark.matrix)])
def test_scatter_and_gather_have_the_bits_of_eager(ranks, name: str) -> None:
    assert all(ranks(ranks_of(name))(around, GRIDS[name]))


def products(rank: int, options: dict[str, Any]) -> list[bool]:
    """matmul, also of a width that the ranks cut unevenly, and of 16-bit operands into float32."""
    mesh = gingham.init(**options)
    generator = torch.Generator().manual_seed(3)
    found = []
    for width, dtype, wide in [(24, torch.float32, None), (37, torch.float64, None), (24, torch.bfloat16, torch.float32)]:
        full = [torch.randn(size, generator=generator).to(dtype) for size in ((24, 24), (24, width))]

        def build(width: int = width, wide: torch.dtype | None = wide) -> tuple[torch.nn.Module, Model]:
            shape = None if width == 24 else (24, 24, width)
            return torch.nn.Module(), lambda a, b: gingham.matmul(a, b, shape=shape, out_dtype=wide)

        found.append(both(mesh, build, [mesh.scatter(each, operand) for each, operand in zip(full, "ab", strict=True)]))
    return found


@pytest.mark.parametrize("name", ["2d", *(pytest.param(name, marks=pytest.mark.matrix) for name in GRIDS if name != "2d")])
def test_matmul_has_the_bits_of_eager(ranks, name: str) -> None:
    for found in ranks(ranks_of(name))(products, GRIDS[name]):
        assert found == [True] * 3, found


def before_any_step(rank: int, options: dict[str, Any], check: str) -> dict[str, bool]:
    """Blocks that were handed out for the first step's check, then the first call of torch.compile, on each of our functions."""
    os.environ["GINGHAM_CHECK"] = check
    try:
        mesh = gingham.init(**options)
    finally:
        del os.environ["GINGHAM_CHECK"]
    generator = torch.Generator().manual_seed(4)
    layer, x = nn.Linear(24, 24, layout="outer->inner"), mesh.scatter(torch.randn(24, 2, 24, generator=generator))
    target = mesh.scatter(torch.randint(0, 24, (24, 2), generator=generator))
    a, b = (mesh.scatter(torch.randn(24, 24, generator=generator), operand) for operand in "ab")
    assert all(type(each) is not torch.Tensor for each in (x, a, b))
    inner: dict[str, Any] = dict(layout="inner")
    steps: dict[str, Callable[[], torch.Tensor]] = {
        "torch's": lambda: mesh.gather(x * 2 + 1),
        "matmul": lambda: gingham.matmul(a, b),
        "accuracy": lambda: gingham.accuracy(layer(x), target, top_k=2, **inner),
        "loss": lambda: gingham.cross_entropy(layer(x), target, reduction="none", **inner),
    }
    torch._dynamo.reset()
    compiled = {name: torch.compile(step, fullgraph=True, backend="aot_eager")() for name, step in steps.items()}
    return {name: type(compiled[name]) is torch.Tensor and torch.equal(compiled[name], step()) for name, step in steps.items()}


@pytest.mark.parametrize(
    ("options", "check"),
    [
        (dict(mode="1d", size=2, sequence=True), ""),
        pytest.param(dict(mode="1d", size=2, sequence=True), "1", marks=pytest.mark.matrix),
        pytest.param(GRIDS["2d"], "", marks=pytest.mark.matrix),
        pytest.param(GRIDS["3x2x2"], "", marks=pytest.mark.matrix),
    ],
)
def test_blocks_of_the_first_steps_check_enter_a_graph(ranks, options: dict[str, Any], check: str) -> None:
    for found in ranks(options["size"])(before_any_step, options, check):
        assert all(found.values()) and len(found) == 4, found


def converted(rank: int, options: dict[str, Any], family: str) -> tuple[float, int, int, list[str]]:
    """Of a converted model's step: worst error of loss and gradients against eager, graph breaks, graphs, and what a call says
    in which the last rank has other inputs."""
    from torch._dynamo.utils import counters

    mesh = gingham.init(**options)
    model = gingham.parallelize(families.build(family), mesh)
    batch = families.batch(family, rows=24)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(lambda **batch: model(**batch), fullgraph=True, backend="aot_eager")
    found = []
    for step in (model, compiled):
        model.zero_grad()
        output = step(**batch)
        output.loss.backward()
        gradients = {name: parameter.grad.to_local().clone() for name, parameter in model.named_parameters()}
        found.append({"loss": output.loss.detach(), "logits": output.logits.detach(), **gradients})
    name = next(name for name in batch if name != "labels")
    batch[name] = batch[name].flip(0) if rank == mesh.size - 1 else batch[name]
    said = []
    try:
        compiled(**batch)
    except gingham.MeshError as error:
        said.append(str(error))
    graphs = counters["stats"]["unique_graphs"]
    return max(families.errors(found[1], found[0]).values()), sum(counters["graph_break"].values()), graphs, said


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("2d", "llama"),
        ("2d", "vit"),
        *(
            pytest.param(name, family, marks=pytest.mark.matrix)
            for name in ("2d", "2.5d", "3d", "3x2x2")
            for family in families.FAMILIES
            if (name, family) not in (("2d", "llama"), ("2d", "vit"), ("3x2x2", "gpt2"))
        ),
    ],
)
def test_a_converted_model_is_one_graph(ranks, name: str, family: str) -> None:
    """From full inputs to the loss, with the input check in it: attention's shared gather differs by rounding."""
    for error, breaks, graphs, said in ranks(ranks_of(name))(converted, GRIDS[name], family, timeout=400.0):
        assert error <= 1e-6 and breaks == 0 and graphs == 1, (error, breaks, graphs)
        assert len(said) == 1 and "got other inputs than the others" in said[0] and f"rank {ranks_of(name) - 1} got" in said[0]
