"""torch.nn models, converted: transformer stacks, chains of linears, and models that no rule knows, on every mesh."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from families import errors, plain
from grids import GRIDS, grids, ranks_of, relative


class Custom(nn.Module):
    """Mixes what has a layer of ours, what has none, and code between that needs whole features."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(20, 12), nn.LayerNorm(12)
        self.fc1, self.fc2, self.head = nn.Linear(12, 30), nn.Linear(30, 12), nn.Linear(12, 5)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, heads, 24, 0.0, batch_first=True), 1)
        self.gru, self.scale = nn.GRU(12, 12, batch_first=True), nn.Parameter(torch.randn(12))
        self.chain = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12), nn.LayerNorm(12))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        x = x + self.fc2(self.fc1(self.norm(x)).softmax(-1))
        x = self.encoder(x) * self.scale
        x = x + self.gru(x)[0]
        return self.head(x + self.chain(x)).mean(1)


def causal(time: int) -> torch.Tensor:
    return nn.Transformer.generate_square_subsequent_mask(time)


def cases(heads: int) -> Iterator[tuple[str, nn.Module, list[torch.Tensor], dict[str, Any]]]:
    torch.manual_seed(0)
    width = 4 * heads
    padding = torch.arange(42).view(6, 7) % 7 > 5
    encoder_layer = nn.TransformerEncoderLayer(width, heads, 24, 0.0, batch_first=True, norm_first=True)
    by_head = torch.randn(6 * heads, 7, 7)
    yield "no rule", Custom(heads), [torch.randint(20, (6, 7))], {}
    yield (
        "encoder",
        nn.TransformerEncoder(nn.TransformerEncoderLayer(width, heads, 24, 0.0), 2),
        [torch.randn(7, 6, width)],
        dict(src_key_padding_mask=padding),
    )
    yield "encoder layer", encoder_layer, [torch.randn(6, 7, width)], dict(src_mask=causal(7), is_causal=True)
    yield (
        "a mask a head",
        nn.TransformerEncoderLayer(width, heads, 24, 0.0, batch_first=True),
        [torch.randn(6, 7, width)],
        dict(src_mask=by_head),
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(width, heads, 24, 0.0), 2, nn.LayerNorm(width))
    yield "decoder", decoder, [torch.randn(7, 6, width), torch.randn(5, 6, width)], dict(tgt_mask=causal(7))
    yield (
        "transformer",
        nn.Transformer(width, heads, 1, 1, 24, 0.0, batch_first=True),
        [torch.randn(6, 7, width), torch.randn(6, 5, width)],
        {},
    )
    chain = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Dropout(0.0), nn.Linear(40, width), nn.LayerNorm(width), nn.Linear(width, 7))
    yield "chain", chain, [torch.randn(6, width)], {}
    yield "linear", nn.Linear(width, 7), [torch.randn(6, width)], {}


def beside(rank: int, grid: dict[str, Any]) -> dict[str, dict[str, float]]:
    import gingham

    mesh = gingham.init(**grid)
    found = {}
    for name, original, inputs, named in cases(6 if mesh.parts(mesh.inner.features) == 6 else 4):
        model = gingham.parallelize(copy.deepcopy(original), mesh)
        mine, theirs = ([x.clone().requires_grad_(x.is_floating_point()) for x in inputs] for _ in range(2))
        got, expected = model(*mine, **named), original(*theirs, **named)
        cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        for y in (got, expected):
            (y * cotangent).sum().backward()
        result = errors(plain(model), plain(original)) | {"y": relative(got, expected)}
        result |= {f"dx{i}": relative(x.grad, z.grad) for i, (x, z) in enumerate(zip(mine, theirs, strict=True)) if x.grad is not None}
        model.eval(), original.eval()
        with torch.no_grad():
            result["evaluated"] = relative(model(*mine, **named), original(*theirs, **named))
        found[name] = result
    return found


@grids("1d sequence", "2d", "2.5d")
def test_outputs_and_gradients(ranks, name: str) -> None:
    for kind, result in ranks(ranks_of(name))(beside, GRIDS[name])[0].items():
        worst = max(result, key=result.get)
        assert result[worst] <= 2e-6, (kind, worst, result[worst])


def plans(rank: int) -> dict[str, Any]:
    import io
    import os
    from contextlib import redirect_stdout

    import gingham

    mesh = gingham.init(mode="2d", size=4)
    printed = io.StringIO()
    os.environ["COLUMNS"] = "200"
    with redirect_stdout(printed):
        model = gingham.parallelize(Custom(), mesh, verbose=True, plan={"fc1": "colwise", "fc2": "rowwise"})
    found: dict[str, Any] = {
        "printed": printed.getvalue(),
        "serial": {line.path: line.reason for line in model.gingham_plan if line.reason},
        "layouts": (model.fc1.layout, model.fc2.layout),
    }
    for name, wrong in {
        "batch norm": nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)),
        "attention alone": nn.ModuleList([nn.MultiheadAttention(8, 4)]),
        "max_norm": nn.ModuleList([nn.Embedding(4, 4, max_norm=1.0)]),
    }.items():
        try:
            found[name] = gingham.parallelize(wrong, mesh)
        except NotImplementedError as error:
            found[name] = str(error)
    try:
        gingham.parallelize(nn.TransformerEncoderLayer(9, 3), mesh)
    except gingham.ShapeError as error:
        found["heads"] = str(error)
    return found


def test_the_plan_names_every_layer_and_every_refusal_the_reason(ranks) -> None:
    """PEERS: layers that do not divide stayed serial in silence; here every line is named."""
    found = ranks(4)(plans)[0]
    for words in (
        "fc1",
        "rows->inner",
        "encoder.layers.0.linear2",
        "serial: gru: no layer of ours for GRU",
        "stationary",
        "received",
        "2 x 2 x 1",
    ):
        assert words in found["printed"], words
    assert set(found["serial"]) == {"gru", ""}
    assert found["layouts"] == ("rows->inner", "inner->rows")
    for name, words in {
        "batch norm": "1: BatchNorm1d would see a part of the batch",
        "attention alone": "MultiheadAttention outside",
        "max_norm": "max_norm",
        "heads": "3 heads on 2 ranks",
    }.items():
        assert words in found[name], (name, found[name])


def from_meta(rank: int, grid: dict[str, Any], family: str) -> tuple[dict[str, Any], float]:
    import families
    import gingham

    mesh = gingham.init(**grid)
    with torch.device("meta"):
        model = families.build(family)
    torch.manual_seed(9)
    model = gingham.parallelize(model, mesh)
    return families.plain(model, gradients=False), float(model(**families.batch(family)).loss.detach())


@pytest.mark.parametrize(
    "family", ["gpt2", "vit", pytest.param("llama", marks=pytest.mark.matrix), pytest.param("bert", marks=pytest.mark.matrix)]
)
def test_a_model_on_meta_gets_the_same_bits_on_every_mesh(ranks, family: str) -> None:
    import families

    alone, loss = ranks(1)(from_meta, {}, family)[0]
    serial = families.build(family)
    for name, weight in serial.named_parameters():
        drawn = alone[name]
        assert drawn.shape == weight.shape
        assert float(drawn.std()) == pytest.approx(float(weight.detach().std()), rel=0.4, abs=1e-9), name
    for grid in (GRIDS["2d"], GRIDS["3d"]):
        got, other = ranks(grid["size"])(from_meta, grid, family)[0]
        assert got.keys() == alone.keys() and all(torch.equal(got[name], alone[name]) for name in alone)
        assert other == pytest.approx(loss, rel=1e-5)


def held(rank: int) -> tuple[int, int, int]:
    """Bytes of weights of the whole model, of this rank's blocks, and by how much building it from meta raised the peak."""
    import resource

    import transformers as hf

    import gingham

    mesh = gingham.init(mode="2.5d", size=8, depth=2, shard_depth=True)
    config = hf.GPT2Config(vocab_size=4096, n_embd=512, n_layer=16, n_head=8, n_positions=128)
    with torch.device("meta"):
        model = hf.GPT2LMHeadModel(config)
    whole = sum(parameter.numel() * 4 for parameter in model.parameters())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = gingham.parallelize(model, mesh)
    blocks = sum(parameter.to_local().numel() * 4 for parameter in model.parameters())
    return whole, blocks, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


@pytest.mark.matrix
def test_from_meta_no_rank_ever_held_the_model(ranks) -> None:
    for whole, blocks, raised in ranks(8)(held, timeout=280):
        assert blocks <= 1.1 * whole / 8
        assert raised <= blocks + whole / 8, (whole, blocks, raised)
