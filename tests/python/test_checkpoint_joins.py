"""Parameters that a module holds in pieces (q, k and v of a fused one) have one plain key; tied ones load under either."""

from pathlib import Path
from typing import Any

import pytest
import torch

import gingham
from grids import whole

WIDTH = 30
GRIDS: list[dict[str, Any]] = [
    dict(mode="2.5d", size=8, depth=2),
    dict(mode="3d", size=8),
    dict(mode="1d", size=4),
    dict(mode="2d", size=4),
]

QUICK = ("2.5d", "3d")


class Fused(torch.nn.Module):
    """As the original model has them: GPT-2's c_attn.weight [in, 3 width], MultiheadAttention's in_proj_weight [3 width, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(torch.randn(WIDTH, 3 * WIDTH)), torch.nn.Parameter(torch.randn(3 * WIDTH))
        self.in_proj_weight = torch.nn.Parameter(torch.randn(3 * WIDTH, WIDTH))


class Pieces(torch.nn.Module):
    def __init__(self, mesh: Any, full: Fused) -> None:
        super().__init__()
        self.joins = {
            "weight": (("q.weight", "k.weight", "v.weight"), 1),
            "bias": (("q.bias", "k.bias", "v.bias"), 0),
            "in_proj_weight": (("q_in.weight", "k_in.weight", "v_in.weight"), 0),
            "in_proj_bias": (("q_in.bias", "k_in.bias", "v_in.bias"), 0),  # they have none
        }
        column = mesh.axes.n or mesh.axes.k
        row = tuple(name for name in mesh.axes.m if name not in mesh.axes.depth)
        for index, name in enumerate("qkv"):
            piece, other = torch.nn.Module(), torch.nn.Module()
            place = slice(index * WIDTH, (index + 1) * WIDTH)
            piece.weight = mesh.parameter(full.weight.detach()[:, place], (row, column))
            piece.bias = mesh.parameter(full.bias.detach()[place], (column,))
            other.weight = mesh.parameter(full.in_proj_weight.detach()[place], (column, row))
            self.add_module(name, piece)
            self.add_module(f"{name}_in", other)


class Model(torch.nn.Module):
    """Two layers, a table tied to a head, in pieces on a mesh or fused without one."""

    def __init__(self, mesh: Any = None) -> None:
        super().__init__()
        fused = [Fused(), Fused()]
        self.layers = torch.nn.ModuleList(fused if mesh is None else [Pieces(mesh, full) for full in fused])
        self.table = torch.nn.Embedding(17, WIDTH) if mesh is None else gingham.nn.Embedding(17, WIDTH, mesh=mesh)
        self.head = torch.nn.Module()
        self.head.weight = self.table.weight

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Every element of every parameter gets a gradient of its own, the same on every grid, in exact arithmetic."""
        for parameter in self.parameters():
            parameter.grad = parameter.detach() * 0.5
        optimizer.step()

    def full(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        """Everything under the original model's keys."""
        found: dict[str, torch.Tensor] = {}
        for index, layer in enumerate(self.layers):
            joins = getattr(layer, "joins", {})
            named = dict(layer.named_parameters())
            for key, dim in (("weight", 1), ("bias", 0), ("in_proj_weight", 0)):
                parts = [named[name] for name in (joins[key][0] if joins else (key,))]
                found[f"{index}.{key}"] = torch.cat([whole(part.detach()) for part in parts], dim)
                for state in ("exp_avg", "exp_avg_sq"):
                    found[f"{index}.{key}.{state}"] = torch.cat([whole(optimizer.state[part][state]) for part in parts], dim)
                found[f"{index}.{key}.step"] = torch.stack([optimizer.state[part]["step"] for part in parts]).unique()
        found["table"] = whole(self.table.weight.detach())
        return found | {f"table.{name}": whole(value) for name, value in optimizer.state[self.table.weight].items()}


def build(mesh: Any, seed: int) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Model(mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def load_and_save(rank: int, grid: dict[str, Any], source: Path, target: Path) -> dict[str, torch.Tensor]:
    model, optimizer = build(gingham.init(**grid), seed=5)
    assert gingham.load(model, optimizer, source) == 2
    assert model.head.weight is model.table.weight
    gingham.save(model, optimizer, target, step=2)
    model.step(optimizer)  # the loaded state is one that the optimizer can use
    return model.full(optimizer) if rank == 0 else model.full(optimizer) and {}


@pytest.mark.parametrize(
    "grid", [pytest.param(grid, marks=[] if grid["mode"] in QUICK else pytest.mark.matrix) for grid in GRIDS], ids=lambda grid: grid["mode"]
)
def test_pieces_are_saved_as_one_tensor_and_loaded_as_pieces(ranks: Any, grid: dict[str, Any], tmp_path: Path) -> None:
    with torch.random.fork_rng():
        model, optimizer = build(None, seed=3)
        for _ in range(2):
            model.step(optimizer)
        gingham.save(model, optimizer, tmp_path / "serial", step=2)
        there = ranks(grid["size"])(load_and_save, grid, tmp_path / "serial", tmp_path / "there")[0]
        back, other = build(None, seed=7)
        assert gingham.load(back, other, tmp_path / "there") == 2
        first, second = model.full(optimizer), back.full(other)
        assert all(torch.equal(first[name], second[name]) for name in first) and first.keys() == second.keys()
        model.step(optimizer)
        expected = model.full(optimizer)
    assert len(expected) == 2 * 12 + 4 and expected.keys() == there.keys()
    # AdamW's vector loop and its tail round differently, and blocks have other tails
    assert [name for name in expected if not torch.allclose(expected[name], there[name], rtol=1e-6, atol=0)] == []


def test_metadata_holds_plain_keys(ranks: Any, tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    def save(rank: int) -> None:
        model, optimizer = build(gingham.init(mode="3d", size=8), seed=3)
        model.step(optimizer)
        gingham.save(model, optimizer, tmp_path)

    ranks(8)(save)
    saved = FileSystemReader(tmp_path / "00000001").read_metadata().state_dict_metadata
    assert {name[6:] for name in saved if name.startswith("model.")} == build(None, seed=3)[0].state_dict().keys()
    assert saved["model.layers.0.weight"].size == (WIDTH, 3 * WIDTH)
    assert saved["optimizer.state.layers.1.in_proj_weight.exp_avg"].size == (3 * WIDTH, WIDTH)
    assert len(saved["model.layers.0.weight"].chunks) == 3 * 4


def test_joins_that_do_not_fit(tmp_path: Path) -> None:
    mesh = gingham.init()
    try:
        model = Model(mesh)
        del model.layers[1].k._parameters["bias"]
        with pytest.raises(gingham.CheckpointError, match=r"layers.1.bias: is joined from .*k.bias.* holds only"):
            gingham.save(model, None, tmp_path)
    finally:
        gingham.destroy()
