"""The planner against a brute force that shares nothing with it but theory.py's axioms, and against bytes counted in runs."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

import gingham
import theory
from gingham.commands.cli import main
from gingham.launch.describe import describe
from gingham.mesh.modes import GridShape, axes_of
from gingham.plan import choose, formulas, workload
from grids import GRIDS
from theory import nested_cuts

GRID = tuple[int, int, int]
# layers, width, heads, batch, context, vocabulary
MODELS = {
    "small": (2, 256, 8, 8, 128, 256),
    "one sample": (2, 512, 16, 1, 64, 1000),
    "many tokens": (2, 512, 16, 64, 512, 1000),
    "wide": (3, 2048, 16, 16, 256, 4096),
    "uneven": (2, 360, 12, 7, 33, 311),
}
MACHINES = {
    "cluster": (5e-6, 45e9, 100e12),
    "host": (2e-5, 5e9, 5e10),
}
CASES = [
    (model, ranks, machine, limited)
    for (model, ranks), (machine, limited) in product(
        [("small", 8), ("one sample", 8), ("many tokens", 16), ("wide", 8), ("wide", 64), ("uneven", 12), ("small", 4), ("many tokens", 8)],
        [("cluster", False), ("cluster", True), ("host", False), ("host", True)],
    )
]


def arguments_of_all(ranks: int) -> Iterator[dict[str, Any]]:
    for depth in (1, *range(2, ranks + 1)):
        q = round((ranks / depth) ** 0.5)
        if q * q * depth == ranks:
            if depth == 1:
                yield dict(mode="2d", size=ranks)
            else:
                yield from (dict(mode="2.5d", size=ranks, depth=depth), dict(mode="2.5d", size=ranks, depth=depth, shard_depth=True))
    yield from (dict(mode="1d", size=ranks), dict(mode="1d", size=ranks, sequence=True))
    if round(ranks ** (1 / 3)) ** 3 == ranks:
        yield dict(mode="3d", size=ranks)
    triples = product(range(1, ranks + 1), repeat=3)
    yield from (dict(size=ranks, grid=grid) for grid in triples if grid[0] * grid[1] * grid[2] == ranks)


class BruteForce:
    """One grid: every rank's blocks written down one by one."""

    def __init__(self, arguments: dict[str, Any], model: tuple[int, ...], machine: tuple[float, float, float]) -> None:
        self.model, self.grid = model, theory.Grid.of(**arguments)
        mode, size, depth = arguments.get("mode"), arguments["size"], arguments.get("depth", 1)
        q = round((size / depth) ** 0.5)
        if mode == "1d":
            self.axes = {"t": size}
            rows = "t" if arguments.get("sequence") else ""
            self.m, self.n, self.k, self.again, self.outer, self.inner = "", "t", "", "", (rows, ""), ("", "t")
        elif mode in ("2d", "2.5d"):
            self.axes = {"d": depth, "r": q, "c": q}
            self.m, self.n, self.k, self.outer, self.inner = "dr", "c", "", ("dr", "c"), ("dr", "c")
            self.again = "dr" if arguments.get("shard_depth") else "r"
        else:
            p = round(size ** (1 / 3))
            pm, pn, pk = arguments.get("grid", (p, p, p))
            self.axes = {"k": pk, "n": pn, "m": pm}
            self.m, self.n, self.k, self.again, self.outer, self.inner = "m", "n", "k", "m", ("m", "kn"), ("m", "nk")
        layers, width, heads, batch, context, vocabulary = model
        feature_ranks = 1
        for axis in self.inner[1]:
            feature_ranks *= self.axes[axis]
        self.possible = heads % feature_ranks == 0
        cost = theory.GPT(layers, width, vocabulary, context).step(self.grid, batch)
        self.received, self.messages = sum(cost.words.values()), sum(cost.messages.values())
        held = [self.rank(index) for index in range(size)]
        self.memory = max(4 * (4 * parameters + kept) for parameters, kept, _ in held)
        latency, bandwidth, speed = machine
        self.seconds = max(flops for *_, flops in held) / speed + self.messages * latency + self.received / size / bandwidth

    def piece(self, length: int, axes: str, place: dict[str, int]) -> int:
        index = 0
        for axis in axes:
            index = index * self.axes[axis] + place[axis]
        begin, end = nested_cuts(length, [self.axes[axis] for axis in axes])[index]
        return end - begin

    def swapped(self, k: int, n: int, layout: str) -> bool:
        pn, pk = self.grid.pn, self.grid.pk
        if "t" in self.axes or (pn > 1 and pk > 1):
            return layout == "inner->outer"
        return 3 * k * (pk - 1) + 2 * n * (pn - 1) < 3 * k * (pn - 1) + 2 * n * (pk - 1)

    def rank(self, index: int) -> tuple[int, int, int]:
        """(words of parameters, words kept for backward, flops) of one rank."""
        place = {}
        for axis in reversed(self.axes):
            index, place[axis] = divmod(index, self.axes[axis])
        layers, width, heads, batch, context, vocabulary = self.model

        def block(features: int, layout: tuple[str, str]) -> int:
            return self.piece(batch, layout[0], place) * context * self.piece(features, layout[1], place)

        norm_axes = self.outer[1]
        parameters = 2 * (2 * layers + 1) * self.piece(width, norm_axes, place)
        table = "".join(axis for axis in self.outer[0] if axis in self.again) or ("t" if not self.outer[0] and "t" in self.axes else "")
        if self.outer[0] == "t":
            table = "t"
        for count in (vocabulary, context):
            parameters += self.piece(count, table, place) * self.piece(width, self.outer[1], place)
        kept = (2 * layers + 1) * block(width, self.outer) + layers * 3 * block(width, self.inner) + block(vocabulary, self.inner)
        flops = layers * 12 * context * block(width, self.inner)
        lines = [(layers, width, [width] * 3, "outer->inner", 0), (layers, width, [width], "inner->outer", 0)]
        lines += [(layers, width, [4 * width], "outer->inner", 1), (layers, 4 * width, [width], "inner->outer", 0)]
        for times, k, ns, layout, gelu in [*lines, (1, width, [vocabulary], "outer->inner", 0)]:
            swapped = self.swapped(k, sum(ns), layout)
            first, second = (self.n, self.k) if swapped else (self.k, self.n)
            x, y = (self.inner, self.outer) if swapped else (self.outer, self.inner)
            out, into = (second + self.again, first) if swapped else (second, first + self.again)
            for n in ns:
                parameters += times * (self.piece(n, out, place) * self.piece(k, into, place) + self.piece(n, second, place))
                kept += times * gelu * block(n, y)
                rows = self.piece(batch, self.m, place) * context
                flops += times * 6 * rows * self.piece(k, first, place) * self.piece(n, second, place)
            kept += times * block(k, x)
        return parameters, kept, flops


@pytest.fixture(scope="module")
def forced() -> Any:
    kept: dict[Any, list[tuple[dict[str, Any], BruteForce]]] = {}

    def get(model: str, ranks: int, machine: str) -> list[tuple[dict[str, Any], BruteForce]]:
        key = model, ranks, machine
        if key not in kept:
            kept[key] = [(a, BruteForce(a, MODELS[model], MACHINES[machine])) for a in arguments_of_all(ranks)]
        return kept[key]

    return get


def same(arguments: dict[str, Any], other: dict[str, Any]) -> bool:
    return {k: v for k, v in arguments.items() if v} == {k: v for k, v in other.items() if v}


@pytest.mark.parametrize(("model", "ranks", "machine", "limited"), CASES, ids=str)
def test_the_choice_is_within_5_percent_of_brute_force(forced: Any, model: str, ranks: int, machine: str, limited: bool) -> None:
    """32 cases, half of them with a memory limit that rules out half of the grids."""
    every = [(arguments, brute) for arguments, brute in forced(model, ranks, machine) if brute.possible]
    limit = sorted(brute.memory for _, brute in every)[len(every) // 2] if limited else float("inf")
    fitting = [(arguments, brute) for arguments, brute in every if brute.memory <= limit]
    described = workload.gpt(*MODELS[model])
    choice = choose.choose(described, ranks, choose.Machine(*MACHINES[machine], memory=limit))
    chosen = next(brute for arguments, brute in fitting if same(arguments, choice.arguments))
    assert chosen.seconds <= 1.05 * min(brute.seconds for _, brute in fitting)
    assert (choice.received, choice.messages, choice.memory) == (chosen.received, chosen.messages, chosen.memory)


def test_every_grid_is_planned_with_the_brute_forces_numbers(forced: Any) -> None:
    for model, ranks in (("small", 8), ("uneven", 12)):
        described = workload.gpt(*MODELS[model])
        planned = choose.plans(described, ranks, choose.Machine(*MACHINES["host"]))
        planned = [each for each in planned if each.name != "sequence"]  # beside one process in test_planner_hybrids.py
        every = forced(model, ranks, "host")
        assert len(planned) == len(every)
        for arguments, brute in every:
            choice = next(choice for choice in planned if same(arguments, choice.arguments))
            assert (choice.received, choice.memory) == (brute.received, brute.memory), (model, arguments)
            assert choice.seconds == pytest.approx(brute.seconds, rel=0.02), (model, arguments)
            assert bool(choice.reason) == (not brute.possible), (arguments, choice.reason)


def test_answers_1d_when_1d_is_best_and_a_grid_when_not() -> None:
    assert choose.choose(workload.gpt(2, 256, 8, 1, 16), 8).name == "1d"
    assert choose.choose(workload.gpt(4, 256, 8, 8, 128), 8).name == "1d"
    assert choose.choose(workload.gpt(4, 256, 8, 32, 128), 8).name == "2.5d depth=2"
    big = choose.choose(workload.gpt(2, 1024, 16, 64, 512), 64)
    assert (
        big.grid[0] > 1 and big.received < next(c for c in choose.plans(workload.gpt(2, 1024, 16, 64, 512), 64) if c.name == "1d").received
    )


def test_what_is_not_possible_says_why() -> None:
    described = workload.gpt(2, 96, 6, 8, 16)
    reasons = {choice.name: choice.reason for choice in choose.plans(described, 4)}
    assert reasons["1d"] == "6 heads do not divide by 4 feature ranks" and not reasons["2d"]
    with pytest.raises(gingham.MeshError, match="no grid of 4 ranks fits.*needs .* GB a rank"):
        choose.choose(described, 4, choose.Machine(memory=1e3))


COUNTED: dict[int, list[dict[str, Any]]] = {
    8: [
        dict(mode="1d", size=8),
        dict(mode="2.5d", size=8, depth=2),
        dict(mode="2.5d", size=8, depth=2, shard_depth=True),
        dict(mode="3d", size=8),
        dict(mode=None, size=8, grid=(1, 2, 4)),
        dict(mode=None, size=8, grid=(4, 1, 2)),
    ],
    4: [dict(mode="2d", size=4), dict(mode="1d", size=4, sequence=True)],
    6: [dict(mode=None, size=6, grid=(3, 2, 1))],
}


def one_step(rank: int, grids: list[dict[str, Any]], size: dict[str, int]) -> list[tuple[int, int, int]]:
    """(bytes received, messages, bytes of weights, gradients and AdamW's moments) of this rank, by grid."""
    from gingham.commands.gpt import GPT, VOCABULARY, Shape, parallel_kit

    found = []
    for grid in grids:
        mesh = gingham.init(**grid)
        torch.manual_seed(1)
        model = GPT(parallel_kit(mesh), Shape(size["layers"], size["width"], size["heads"], size["context"], 0.0))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.zeros(size["batch"], size["context"], dtype=torch.int64)
        mesh.traffic(reset=True)
        model.loss(model(mesh.scatter(ids)), mesh.scatter(ids) if mesh.inner.rows else ids).backward()
        optimizer.step()
        counts = mesh.traffic().values()
        held = sum(4 * 4 * parameter.to_local().numel() for parameter in model.parameters())
        found.append((sum(count["bytes_received"] for count in counts), sum(count["messages"] for count in counts), held))
        assert VOCABULARY == 256
        gingham.destroy()
    return found


@pytest.mark.parametrize("ranks_used", COUNTED)
def test_predicted_bytes_are_the_bytes_counted_in_a_run(ranks: Any, ranks_used: int) -> None:
    """To the byte on 9 grids, with sizes that do not divide; every rank's messages and weights too."""
    size = dict(layers=1, width=72, heads=24, batch=7, context=5)
    described = workload.gpt(**size)
    answers = ranks(ranks_used)(one_step, COUNTED[ranks_used], size)
    planned = choose.plans(described, ranks_used)
    for index, arguments in enumerate(COUNTED[ranks_used]):
        choice = next(choice for choice in planned if same(arguments, choice.arguments))
        received, messages, held = zip(*(answer[index] for answer in answers), strict=True)
        assert choice.received == sum(received), (arguments, choice, sum(received))
        assert set(messages) == {choice.messages}, (arguments, choice, messages)
        brute = BruteForce(arguments, (*size.values(), 256), (*MACHINES["host"],))
        assert list(held) == [16 * brute.rank(rank)[0] for rank in range(ranks_used)], arguments


def choose_alike(rank: int) -> tuple[Any, ...]:
    from gingham.commands.gpt import GPT, Shape, serial_kit

    with torch.device("meta"):
        model = GPT(serial_kit(), Shape(2, 256, 8, 16, 0.0))
    mesh = gingham.init(mode="auto", size=8, model=model, tokens=(1, 16))
    first = mesh.grid
    gingham.destroy()
    mesh = gingham.init(mode="auto", model=workload.gpt(2, 1024, 16, 64, 512), machine=dict(latency=0.0))
    return first, mesh.grid, mesh.gather(mesh.scatter(torch.ones(8, 8))).sum().item()


def test_init_auto(ranks: Any) -> None:
    answers = ranks(8)(choose_alike)
    expected = choose.choose(workload.gpt(2, 1024, 16, 64, 512), 8, choose.Machine(latency=0.0)).grid
    assert answers == [((1, 8, 1), expected, 64.0)] * 8 and expected != (1, 8, 1)
    for wrong, message in (
        (dict(), "expected a torch.nn.Module and tokens="),
        (dict(model=torch.nn.Linear(2, 2)), "tokens=None"),
        (dict(model=workload.gpt(1, 8, 2, 1, 1), depth=2), "chooses depth itself"),
        (dict(model=workload.gpt(1, 8, 2, 1, 1), size=4), "start 4 processes"),
    ):
        with pytest.raises(gingham.MeshError, match=message):
            gingham.init(mode="auto", **wrong)


def merged(described: workload.Workload) -> dict[Any, int]:
    found: dict[Any, int] = {}
    for times, part in described.parts:
        found[part] = found.get(part, 0) + times
    return found


def test_describe_reads_what_gpt_says() -> None:
    from gingham.commands.gpt import GPT, Shape, parallel_kit, serial_kit

    expected = merged(workload.gpt(3, 64, 4, 5, 16))
    row = [set(parts) for parts in workload.gpt(3, 64, 4, 5, 16).row]
    with torch.device("meta"):
        model = GPT(serial_kit(), Shape(3, 64, 4, 16, 0.1))
    assert merged(describe(model, 5, 16)) == expected
    assert [set(parts) for parts in describe(model, 5, 16).row] == row
    gingham.init()
    try:
        assert merged(describe(GPT(parallel_kit(gingham.mesh.current()), Shape(3, 64, 4, 16, 0.1)), 5, 16)) == expected
    finally:
        gingham.destroy()
    stack = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(32, 4, 64), 2, enable_nested_tensor=False)
    parts = merged(describe(stack, 2, 4))
    for part in (
        workload.Linears(32, (32, 32, 32), "outer->inner"),
        workload.Linears(32, (64,), "outer->inner", kept=1),
        workload.Linears(64, (32,), "inner->outer"),
        workload.Attention(32, 4, 4),
    ):
        assert parts[part] == 2
    assert describe(stack, 2, 4).parameters() == sum(p.numel() for p in stack.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "vit"])
def test_describe_counts_the_parameters_of_hugging_face_models(family: str) -> None:
    pytest.importorskip("transformers")
    from families import build

    with torch.random.fork_rng():
        model = build(family)
    described = describe(model, 4, 8)
    whole = sum(parameter.numel() for parameter in model.parameters())
    # tied heads count twice, class tokens, positions and convolutions not at all
    assert 0.75 * whole <= described.parameters() <= 1.3 * whole, (described.parameters(), whole)
    assert sum(times for times, part in described.parts if isinstance(part, workload.Attention)) == 2
    layouts = [part.layout for _, part in described.parts if isinstance(part, workload.Linears)]
    assert layouts.count("inner->outer") == 2 and layouts.count("outer->inner") >= 2
    assert len(described.row) == (4 if family == "bert" else 5)  # tables, two blocks, a norm (BERT's is its head's) and the head
    assert described.sequences and described.samples
    assert not described.row or sum(times for row in described.row for times, _ in row) == sum(times for times, _ in described.parts)


def test_the_plan_command_shows_every_grid(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    size = ["--ranks", "8", "--width", "96", "--heads", "6", "--layers", "2", "--batch", "4", "--context", "16", "--vocabulary", "100"]
    assert main(["plan", *size]) == 0
    out = capsys.readouterr().out
    for part in (
        "2.5d depth=2",
        "shard_depth",
        "3d",
        "1d sequence",
        "1 x 2 x 4",
        "6 heads do not divide by 8 feature ranks",
        "mode='auto' takes the first line",
    ):
        assert part in out, out
    assert out.index("mode='auto'") < out.index("do not divide")
    assert main(["plan", *size, "--memory", "0.0001"]) == 1
    assert "needs" in capsys.readouterr().out
    assert main(["plan", *size, "--heads", "5"]) == 2
    assert "must divide" in capsys.readouterr().err


def large_linear(rank: int, name: str, layout: str) -> Any:
    """Messages that a Linear which goes in slices receives, forward and backward, and its plan."""
    mesh = gingham.init(**GRIDS[name])
    layer = gingham.nn.Linear(2048, 4096, bias=False, layout=layout)
    x = mesh.scatter(torch.ones(mesh.size, 2048), operand=layout.split("->")[0]).requires_grad_()
    layer(x).sum().backward()
    return sum(count["messages"] for count in mesh.traffic().values()), layer.plan.swapped


@pytest.mark.parametrize("layout", ["outer->inner", "inner->outer"])
@pytest.mark.parametrize("name", ["2d", "3d", "1d sequence"])
def test_messages_of_a_layer_that_goes_in_slices(ranks, name: str, layout: str) -> None:
    grid = GridShape(axes_of(**GRIDS[name]))
    counted, swapped = ranks(grid.size)(large_linear, name, layout)[0]
    slices = formulas.usual_slices(grid, 2048, (4096,))
    assert slices == 4 and formulas.usual_slices(GridShape(axes_of("2d", 4)), 4096, (4096,)) == 2
    assert counted == formulas.linear_messages(grid, 1, swapped, False, slices)
