"""SelfAttention over a sequence that ranks cut: the ring, gathered keys and all-to-all of heads, in order and zigzag, against one process
in float64."""

import os
from itertools import product
from typing import Any

import pytest
import torch

import gingham
import serial
import theory_layers
from gingham import native, nn
from gingham.autograd.ring import CutSequence, Way
from gingham.mesh.layout import chunks, runs
from gingham.nn.sequence import attend_sequence
from gingham.plan.formulas import cheapest_way, sequence_bytes
from grids import relative, whole

RING = dict(ring=True)
ZIGZAG = dict(ring=True, order="zigzag")
HEADS = dict(ring="heads")
HEADS_ZIGZAG = dict(ring="heads", order="zigzag")
WAYS: list[dict[str, Any]] = [dict(), dict(order="zigzag"), RING, ZIGZAG, HEADS, HEADS_ZIGZAG]


def largest(got: torch.Tensor, expected: torch.Tensor, full: torch.Tensor) -> float:
    """The largest difference, relative to the largest element of the full tensor."""
    return float((got.double() - expected.double()).abs().max() / full.abs().max()) if expected.numel() else 0.0


def plain(q: Any, k: Any, v: Any, causal: bool, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of [time, batch, heads, width], rows that see nothing giving 0."""
    q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    blind = scores.detach().amax(-1, keepdim=True) == -torch.inf
    return (scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0) @ v).permute(2, 0, 1, 3)


def with_gradients(function: Any, tensors: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    leaves = [each.detach().clone().requires_grad_() for each in tensors]
    y = function(*leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(each.grad for each in leaves)]


def core(rank: int, ranks: int, sizes: Any, dtype: torch.dtype, source: str) -> dict[str, Any]:
    """The core's operation: errors by causal, order and mask, to be held to torch's own in one process in this dtype; bits; bytes."""
    mesh = gingham.init(grid=(ranks, 1, 1), source=source)
    found: dict[str, Any] = {"errors": {}, "torch": {}, "bits": [], "bytes": {}}
    for causal, zigzag, kind in product((False, True), (False, True), ("none", "bool", "added")):
        run_core(mesh, found, f"causal={causal} zigzag={zigzag} {kind}", sizes, dtype, causal, zigzag, kind)
    return found


def run_core(mesh: Any, found: Any, name: str, sizes: Any, dtype: Any, causal: bool, zigzag: bool, kind: str) -> None:
    time, batch, heads, kv_heads, width = sizes
    lengths = [len(part) for part in torch.empty(time).tensor_split(mesh.size)]
    torch.manual_seed(3)
    q, dy = (torch.randn(time, batch, heads, width).to(dtype) for _ in range(2))
    k, v = (torch.randn(time, batch, kv_heads, width).to(dtype) for _ in range(2))
    mask = {"none": None, "bool": torch.rand(batch, 1, time, time) > 0.4, "added": torch.randn(1, heads, time, time).double()}[kind]
    if kind == "bool":
        mask[:, :, time // 2] = False  # sees nothing
    places = torch.arange(time)
    if zigzag:
        places = torch.tensor([p + i for r in range(mesh.size) for p, n in runs(lengths, r, True) for i in range(n)])
    assert sorted(places.tolist()) == list(range(time))

    def mine(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return x.index_select(dim, places).split(lengths, dim)[mesh.index].contiguous()

    exact = with_gradients(lambda q, k, v: plain(q, k, v, causal, mask), [q.double(), k.double(), v.double()], dy)
    here = None if mask is None else mine(mask.index_select(3, places), 2)
    here = here.to(torch.float64 if dtype == torch.float64 else torch.float32) if kind == "added" else here
    call = native.Attention(mesh.program, mesh.axis(("m",)), lengths, mesh.index, here, causal, width**-0.5, zigzag)
    parts = [mine(x) for x in (q, k, v)]
    mesh.traffic(reset=True)
    out, lse = call.forward(*parts)
    forward = mesh.traffic(reset=True)["m"]["bytes_received"]
    got = [out, *call.backward(*parts, out, lse, mine(dy))]
    found["bytes"][name] = forward, mesh.traffic(reset=True)["m"]["bytes_received"]
    found["errors"][name] = [largest(each, mine(full), full) for each, full in zip(got, exact, strict=True)]
    found["bits"] += got
    if dtype.itemsize == 2 and kind == "none":
        torchs = with_gradients(lambda q, k, v: fused(q, k, v, causal), [q, k, v], dy)
        found["torch"][name] = [largest(each, full, full) for each, full in zip(torchs, exact, strict=True)]


def fused(q: Any, k: Any, v: Any, causal: bool) -> torch.Tensor:
    """torch's own attention of [time, batch, heads, width]."""
    q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).permute(2, 0, 1, 3)


# GPUs have rings only
SOURCES = ("ring",) if os.environ.get("GINGHAM_DEVICE") == "cuda" else ("window", "ring")
SIZES = [(24, 2, 4, 4, 16), (37, 1, 8, 2, 8), (600, 1, 4, 1, 16), (3, 1, 2, 2, 4)]


@pytest.mark.parametrize("sizes", [SIZES[1], *(pytest.param(each, marks=pytest.mark.matrix) for each in (SIZES[0], *SIZES[2:]))])
@pytest.mark.parametrize("size", [4, *(pytest.param(each, marks=pytest.mark.matrix) for each in (2, 3, 6))])
def test_the_ring_against_float64(ranks, size: int, sizes: tuple[int, ...]) -> None:
    """1:1, 4:1 and one head of keys, masks, lengths that do not divide, pieces without a place, rows that see nothing. Over 3 places
    gradients are what cancellation leaves, and say something in float64 only."""
    lengths = [len(part) for part in torch.empty(sizes[0]).tensor_split(size)]
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 2e-14))[sizes[0] < 8 :]:
        found = {source: ranks(size)(core, size, sizes, dtype, source) for source in SOURCES}
        for window, ring in zip(found[SOURCES[0]], found["ring"], strict=True):
            assert max(map(max, window["errors"].values())) <= bound, window["errors"]
            assert all(map(torch.equal, window["bits"], ring["bits"])), "windows and rings have the same bits"
        item = 4 if dtype == torch.float32 else 8
        for source, name in product(found, found["ring"][0]["bytes"]):
            causal, zigzag = "causal=True" in name, "zigzag=True" in name
            expected = theory_layers.ring_words(lengths, 2 * sizes[1] * sizes[3] * sizes[4], source == "window", causal, zigzag)
            got = [tuple(each["bytes"][name]) for each in found[source]]
            assert got == [(item * there, item * back) for there, back in expected], (source, name)


@pytest.mark.parametrize("size", [4, *(pytest.param(each, marks=pytest.mark.matrix) for each in (2, 3, 6))])
def test_sixteen_bits_do_not_drift_with_the_ring(ranks, size: int) -> None:
    """At most 1.5 times the error of torch's own attention in one process, at every number of ranks."""
    for sizes in ((96, 1, 4, 4, 32), (96, 2, 4, 1, 16)):
        for found in ranks(size)(core, size, sizes, torch.bfloat16, "ring"):
            for name, theirs in found["torch"].items():
                assert all(a <= 1.5 * b for a, b in zip(found["errors"][name], theirs, strict=True)), (name, found["errors"][name], theirs)


def layers(rank: int, options: dict[str, Any], way: dict[str, Any]) -> dict[str, float]:
    """A layer's output and all gradients, beside the same attention in one process."""
    mesh, errors = gingham.init(**options), {}
    order = way.get("order")
    features, rows = mesh.parts(mesh.inner.features), mesh.parts(mesh.inner.rows)
    fewest = features * (rows if way.get("ring") == "heads" else 1)
    counts = [count for count in (12, 6, 4) if count % features == 0 and count >= fewest]
    assert counts
    for (batch, time), causal, heads, rotary in product(((1, 21), (2, 5)), (True, False), counts, (None, 100.0)):
        torch.manual_seed(2)
        ours = nn.SelfAttention(24, 12, causal, kv_heads=heads, head_dim=4, dtype=torch.float64, dim=1, rotary=rotary, **way)
        torch.manual_seed(2)
        theirs = serial.Attention(24, 12, heads, 4, causal, rotary, torch.float64)
        for mask in (None, torch.rand(batch, 1, 1, time) > 0.2, torch.randn(1, 12, time, time, dtype=torch.float64)):
            here = mask if mask is None or mask.shape[2] == 1 else mesh.scatter(mask, "rows", 2, order=order)
            a = torch.randn(batch, time, 24, dtype=torch.float64).requires_grad_()
            b = a.detach().clone().requires_grad_()
            got = mesh.gather(ours(mesh.scatter(a, "x", 1, order=order), here), "x", 1, order=order)
            expected = theirs(b, mask)
            ours.zero_grad(), theirs.zero_grad()
            got.pow(2).sum().backward(), expected.pow(2).sum().backward()
            named = dict(theirs.named_parameters())
            pairs = [(got, expected), (a.grad, b.grad)]
            pairs += [(whole(p.grad), named[name].grad) for name, p in ours.named_parameters() if name != "k.bias"]
            shape = "none" if mask is None else tuple(mask.shape)
            errors[f"{batch}x{time} causal={causal} {heads} {rotary} {shape}"] = max(relative(*pair) for pair in pairs)
    return errors


MESHES: dict[str, dict[str, Any]] = {
    "2.5d": dict(mode="2.5d", size=8, depth=2),
    "2d": dict(mode="2d", size=4),
    "3d": dict(mode="3d", size=8),
    "3x1x1": dict(grid=(3, 1, 1), size=3),
    "3x2x1": dict(grid=(3, 2, 1), size=6),
    "2d ring": dict(mode="2d", size=4, source="ring"),
}


@pytest.mark.parametrize("way", [*WAYS[:4], pytest.param(HEADS, marks=pytest.mark.matrix), HEADS_ZIGZAG], ids=str)
@pytest.mark.parametrize("name", ["2d", *(pytest.param(name, marks=pytest.mark.matrix) for name in MESHES if name != "2d")])
def test_layers_in_every_mode_with_row_axes(ranks, name: str, way: dict[str, Any]) -> None:
    for errors in ranks(MESHES[name]["size"])(layers, MESHES[name], way):
        assert max(errors.values()) <= 1e-11, errors


def dropped(rank: int, options: dict[str, Any], way: dict[str, Any]) -> list[torch.Tensor]:
    mesh, order = gingham.init(**options), way.get("order")
    torch.manual_seed(5)
    layer = nn.SelfAttention(24, 24, dropout=0.4, kv_heads=12, head_dim=2, dtype=torch.float64, dim=1, **way if mesh.size > 1 else {})
    x = torch.randn(2, 21, 24, dtype=torch.float64).requires_grad_()
    y = mesh.gather(layer(mesh.scatter(x, "x", 1, order=order)), "x", 1, order=order)
    y.pow(2).sum().backward()
    (second,) = torch.autograd.grad(grad_norm(layer, mesh, x, order), x)
    return [y.detach(), x.grad, second]


def grad_norm(layer: Any, mesh: Any, x: torch.Tensor, order: str | None) -> torch.Tensor:
    """Of the gradient for x, with a gradient."""
    layer.eval()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the one process', whose fused one has no second gradient
        y = mesh.gather(layer(mesh.scatter(x, "x", 1, order=order)), "x", 1, order=order)
    return torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)[0].pow(2).sum()


@pytest.mark.parametrize("way", [ZIGZAG, *(pytest.param(way, marks=pytest.mark.matrix) for way in WAYS if way != ZIGZAG)], ids=str)
def test_dropout_by_global_index_and_second_gradients(ranks, way: dict[str, Any]) -> None:
    """As in one process, whose layer makes them of torch's operations."""
    serially = ranks(1)(dropped, {}, way)[0]
    for found in ranks(4)(dropped, dict(mode="2d", size=4), way):
        for got, expected in zip(found, serially, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def kept(rank: int, way: dict[str, Any]) -> int:
    """Bytes that autograd keeps of a layer without projections' own."""
    mesh = gingham.init(grid=(4, 1, 1))
    layer, seen = nn.SelfAttention(64, 8, dim=1, **way), {}
    x = mesh.scatter(torch.randn(1, 1024, 64), "x", 1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.__setitem__(t.untyped_storage().data_ptr(), t), t)[1], lambda t: t):
        layer(x)
    return sum(t.untyped_storage().nbytes() for t in seen.values())


def test_a_ring_keeps_pieces_and_no_mask(ranks) -> None:
    """x, q, k, v, out of 256 places, lse; gathered also k and v of all 1024; nothing of 256 x 1024."""
    piece = 4 * 256 * 64
    for got in ranks(4)(kept, RING):
        assert got <= 7 * piece, got / piece
    for got in ranks(4)(kept, HEADS):
        assert got <= 7 * piece, got / piece
    for got in ranks(4)(kept, {}):
        assert got <= 14 * piece, got / piece


def moved(rank: int, mode: dict[str, Any], sizes: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes of attention alone by way, forward and backward, and what the layer says of them."""
    time, batch, heads, kv_heads, width = sizes
    found: dict[str, Any] = {}
    for attention, causal in product(("gathered", "ring", "heads"), (True, False)):
        mesh = gingham.init("sequence", size=mode["size"], source=mode["source"], attention=attention)
        layer = nn.SelfAttention(heads * width, heads, causal, kv_heads=kv_heads, dtype=dtype)
        assert layer.way == attention
        said = layer.received(batch, time) - layer.projected(batch, time) - layer.o.received(batch, time)
        lengths = chunks(time, [mesh.size])
        at = CutSequence(mesh, ("m",), tuple(lengths), mesh.index)
        q = torch.randn(lengths[rank], batch, heads, width, dtype=dtype).requires_grad_()
        k, v = (torch.randn(lengths[rank], batch, kv_heads, width, dtype=dtype).requires_grad_() for _ in range(2))
        mesh.traffic(reset=True)
        y = attend_sequence(attention, q, k, v, None, Way(at, causal, 1.0))
        forward = mesh.traffic(reset=True)["m"]["bytes_received"]
        y.sum().backward()
        backward = mesh.traffic(reset=True)["m"]["bytes_received"]
        found[f"{attention} {causal}"] = (forward, backward, said)
        gingham.destroy()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("source", ["window", pytest.param("ring", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("size", [2, *(pytest.param(each, marks=pytest.mark.matrix) for each in (3, 4))])
def test_every_way_moves_what_its_formula_says(ranks, size: int, source: str, dtype: torch.dtype) -> None:
    """Lengths and heads that do not divide; sums of 16-bit gradients travel as float32, by heads nothing is summed."""
    sizes = time, batch, heads, kv_heads, width = 21, 2, 10, 5, 8
    lengths, item = chunks(time, [size]), dtype.itemsize
    found = ranks(size)(moved, dict(size=size, source=source), sizes, dtype)
    for name in found[0]:
        got = [each[name] for each in found]
        assert sum(there + back for there, back, _ in got) == got[0][2] > 0, name
    by_heads = theory_layers.heads_bytes(lengths, heads, kv_heads, batch * width, item)
    for causal in (True, False):
        assert [each[f"heads {causal}"][:2] for each in found] == by_heads


def test_auto_takes_the_fewest_bytes_that_memory_allows() -> None:
    """Many heads of keys: heads; one, whose memory is little: gathered; fewer than ranks: a ring."""
    assert cheapest_way(8, 32, 32, 4, True, True, True) == "heads"
    assert cheapest_way(8, 32, 8, 4, True, False) == "heads"
    assert cheapest_way(2, 32, 1, 4, True, False) == "gathered"
    assert cheapest_way(8, 8, 4, 4, True, False) == "ring"
    for size, (heads, kv_heads), causal in product((2, 4, 8), ((16, 16), (16, 4), (16, 1)), (True, False)):
        way = cheapest_way(size, heads, kv_heads, 4, True, causal, causal)
        costs = {each: sequence_bytes(each, [2] * size, heads, kv_heads, 1, 4, True, causal, causal) for each in ("ring", "heads")}
        allowed = ["ring"] + ["heads"] * (kv_heads >= size)
        assert way == "gathered" or costs[way] == min(costs[each] for each in allowed)


def balanced(rank: int, causal: bool, zigzag: bool) -> int:
    """Multiply-adds that the kernel made, forward and backward."""
    mesh = gingham.init(grid=(4, 1, 1))
    lengths = [1024] * 4
    call = native.Attention(mesh.program, mesh.axis(("m",)), lengths, mesh.index, None, causal, 0.25, zigzag)
    q, k, v, dy = (torch.randn(1024, 1, 2, 16) for _ in range(4))
    out, lse = call.forward(q, k, v)
    call.backward(q, k, v, out, lse, dy)
    return call.multiplied


def test_zigzag_gives_all_ranks_the_same_work(ranks) -> None:
    """Counted in the kernel: causal about half of the square, 7 products of 16 x 2 numbers each."""
    square = 7 * 4096**2 * 16 * 2
    zigzag, ordered, whole = (ranks(4)(balanced, *each) for each in ((True, True), (True, False), (False, False)))
    assert max(zigzag) <= 1.05 * sum(zigzag) / 4 and 0.5 * square <= sum(zigzag) <= 0.6 * square
    assert max(ordered) >= 1.6 * sum(ordered) / 4, "what zigzag is for"
    assert sum(whole) == square and len(set(whole)) == 1


def refused(rank: int) -> list[str]:
    gingham.init(mode="1d", size=2)
    found = []
    for arguments in (dict(ring=True, dim=1), dict(ring=True), dict(ring="maybe", dim=1), dict(order="back", dim=1)):
        with pytest.raises(gingham.ShapeError) as caught:
            nn.SelfAttention(24, 12, **arguments)
        found.append(str(caught.value))
    gingham.destroy()
    mesh = gingham.init(grid=(2, 1, 1))
    layer = nn.SelfAttention(24, 12, dim=1, **ZIGZAG)
    x = mesh.scatter(torch.randn(1, 8, 24), "x", 1, order="zigzag")
    for arguments in (dict(mask=torch.zeros(1, 1, 1, 8).requires_grad_()), dict(cache=nn.KVCache())):
        with pytest.raises(NotImplementedError) as refusal:
            layer(x, **arguments)
        found.append(str(refusal.value))
    other = nn.SelfAttention(24, 12, dim=1, ring=True, scale=0.5 + rank)
    with pytest.raises(gingham.MeshError) as mismatch:
        other(x)
    with pytest.raises(gingham.ShapeError) as few:
        nn.SelfAttention(24, 12, dim=1, ring="heads", kv_heads=1)
    return [*found, str(mismatch.value), str(few.value)]


def test_what_a_ring_refuses(ranks) -> None:
    rows, dim, word, order, mask, cache, scale, few = ranks(2)(refused)[0]
    assert "cuts no rows" in rows and "dim=1" in dim and "True, False, 'heads' or 'auto'" in word and "'zigzag'" in order
    assert "mask needs a gradient" in mask and "cache" in cache and "scale" in scale
    assert "1 heads of keys and values" in few and "at least 2" in few
