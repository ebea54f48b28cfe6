"""Checkpoints: from any grid to any grid and to one process without a mesh, to the bit; runs that resume."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from grids import whole, words_of

SHAPE = dict(layers=1, width=36, heads=12, context=8, dropout=0.1)
HOME = dict(mode="2.5d", size=8, depth=2)
OTHERS: list[Any] = [
    dict(grid=(1, 4, 1), size=4),
    dict(mode="2d", size=4),
    dict(mode="3d", size=8),
    dict(),
    pytest.param(dict(mode="1d", size=4), marks=pytest.mark.matrix),
    pytest.param(dict(mode="1d", size=4, sequence=True), marks=pytest.mark.matrix),
    pytest.param(dict(mode="2.5d", size=8, depth=2, shard_depth=True), marks=pytest.mark.matrix),
    pytest.param(dict(grid=(3, 2, 2), size=12), marks=pytest.mark.matrix),
    pytest.param(dict(grid=(1, 3, 2), size=6), marks=pytest.mark.matrix),
]
Bits = dict[str, torch.Tensor]


class Run:
    """A GPT in training on a grid, or ({}: serial) a torch.nn model in a process without a mesh; its own data by step."""

    def __init__(self, grid: dict[str, Any], seed: int = 3) -> None:
        import gingham
        from gingham.commands.gpt import GPT, Shape, parallel_kit, serial_kit

        self.mesh = gingham.init(**grid) if grid else None
        torch.manual_seed(seed)
        self.model = GPT(parallel_kit(self.mesh) if self.mesh else serial_kit(), Shape(**SHAPE))
        # the position table, a norm and a bias in a group of their own
        few = {"position.weight", "norm.weight", "head.bias"}
        named = dict(self.model.named_parameters())
        groups = [
            dict(params=[weight for name, weight in named.items() if name not in few]),
            dict(params=[named[name] for name in sorted(few)], lr=1e-3, weight_decay=0.0),
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-3, fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        kind = gingham.GradScaler if self.mesh else partial(torch.amp.GradScaler, "cpu")
        self.scaler = kind(init_scale=2.0, growth_interval=3)  # powers of two: a scaled run has the bits of a plain one
        self.step = 0

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.step)
            tokens = torch.randint(256, (12, SHAPE["context"] + 1), generator=generator)
            ids, target = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            if self.mesh:
                ids, target = self.mesh.scatter(ids), self.mesh.scatter(target) if self.mesh.inner.rows else target
            self.optimizer.zero_grad()
            loss = self.model.loss(self.model(ids), target)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            losses.append(loss.item())
            self.step += 1
        return losses

    def save(self, path: Path) -> None:
        import gingham

        gingham.save(self.model, self.optimizer, path, self.scheduler, self.step, scaler=self.scaler)

    def load(self, path: Path) -> None:
        import gingham

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.step = gingham.load(self.model, self.optimizer, path, self.scheduler, scaler=self.scaler)

    def bits(self) -> Bits:
        """Every number of the run, in full, by name."""
        found = {name: whole(weight.detach()) for name, weight in self.model.named_parameters()}
        for name, weight in self.model.named_parameters():
            found |= {f"{name}/{key}": whole(value) for key, value in self.optimizer.state[weight].items()}
        for index, group in enumerate(self.optimizer.param_groups):
            found[f"group{index}"] = torch.tensor([group["lr"], group["initial_lr"], *group["betas"], group["weight_decay"]])
        found["scaler"] = torch.tensor([self.scaler.get_scale(), float(self.scaler._get_growth_tracker())])
        found["scheduler"] = torch.tensor(self.scheduler.last_epoch)
        found["calls"] = torch.tensor([module.calls for module in self.model.modules() if hasattr(module, "calls")])
        return found | {"generator": torch.get_rng_state(), "seed": torch.tensor(torch.initial_seed())}


def differing(one: Bits, other: Bits) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]


def train_and_save(rank: int, grid: dict[str, Any], path: Path, steps: int) -> Bits:
    run = Run(grid)
    run.train(steps)
    run.save(path)
    return run.bits() if rank == 0 else run.bits() and {}


def load_and_save(rank: int, grid: dict[str, Any], source: Path, target: Path) -> tuple[Bits, dict[str, int]]:
    run = Run(grid, seed=11)
    run.load(source)
    run.save(target)
    bits = run.bits()
    traffic = run.mesh.traffic() if run.mesh else {}
    return (bits if rank == 0 else {}), {axis: count["bytes_received"] for axis, count in traffic.items()}


def call(ranks: Any, grid: dict[str, Any], fn: Any, *args: Any) -> list[Any]:
    """fn on the ranks of the grid; serial ones run in this process, which has no mesh, and leave its random state alone."""
    if grid:
        return ranks(grid["size"])(fn, grid, *args)
    with torch.random.fork_rng():
        return [fn(0, grid, *args)]


@pytest.fixture(scope="module")
def home(pools: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bits]:
    """A run saved at 2.5d on 2 x 2 x 2 ranks, and its bits."""
    from pool import Pool

    path = tmp_path_factory.mktemp("home")
    pool = pools.setdefault(8, Pool(8))
    return path, pool(train_and_save, HOME, path, 2)[0]


@pytest.mark.parametrize("grid", OTHERS, ids=lambda grid: words_of(grid) or "serial")
def test_saved_at_25d_loads_bitwise_and_goes_back(ranks: Any, home: tuple[Path, Bits], grid: dict[str, Any], tmp_path: Path) -> None:
    """Model, AdamW (fused) with two groups, scheduler, scaler, generator and dropout calls; nothing of it counts as traffic."""
    path, bits = home
    there, traffic = call(ranks, grid, load_and_save, path, tmp_path / "there")[0]
    assert len(bits) > 60 and not differing(bits, there)
    assert not any(traffic.values())
    back, _ = call(ranks, HOME, load_and_save, tmp_path / "there", tmp_path / "back")[0]
    assert not differing(bits, back)


def test_colossal_checkpoints_do_what_they_could_not(ranks: Any, home: tuple[Path, Bits], tmp_path: Path) -> None:
    """The peer's 2.5D at depth 2 could not load, its 3D LayerNorm hung, its 2D classifier came back transposed: here a run
    saved at 3d opens at 2.5d depth 2 and at 2d, norms and the (non-square) head included."""
    path, bits = home
    call(ranks, dict(mode="3d", size=8), load_and_save, path, tmp_path / "3d")
    for grid in (HOME, dict(mode="2d", size=4)):
        there, _ = call(ranks, grid, load_and_save, tmp_path / "3d", tmp_path / "again")[0]
        assert {"norm.weight", "blocks.0.norm1.bias", "head.weight"} <= there.keys() and there["head.weight"].shape == (256, 36)
        assert not differing(bits, there)


def resume(rank: int, grid: dict[str, Any], path: Path, steps: int) -> tuple[list[float], Bits]:
    run = Run(grid, seed=12)
    run.load(path)
    losses = run.train(steps)
    return losses, run.bits() if rank == 0 else run.bits() and {}


def unbroken(rank: int, grid: dict[str, Any], path: Path, before: int, after: int) -> tuple[list[float], Bits]:
    run = Run(grid)
    run.train(before)
    run.save(path)
    losses = run.train(after)
    return losses, run.bits() if rank == 0 else run.bits() and {}


def test_a_resumed_run_equals_the_unbroken_one(ranks: Any, tmp_path: Path) -> None:
    """Same grid: losses, weights and AdamW to the bit, dropout on. Other grids: losses within 1e-5."""
    losses, bits = call(ranks, HOME, unbroken, tmp_path, 3, 4)[0]
    again, same = call(ranks, HOME, resume, tmp_path, 4)[0]
    assert again == losses and not differing(bits, same)
    for grid in (dict(mode="2d", size=4), dict(mode="3d", size=8), {}):
        other, _ = call(ranks, grid, resume, tmp_path, 4)[0]
        assert other == pytest.approx(losses, rel=1e-5), grid


@pytest.mark.matrix
def test_a_serial_run_moves_to_a_grid(ranks: Any, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        losses, bits = unbroken(0, {}, tmp_path, 2, 3)
    resumed, _ = call(ranks, HOME, resume, tmp_path, 3)[0]
    assert resumed == pytest.approx(losses, rel=1e-5)
    moved, _ = call(ranks, dict(mode="3d", size=8), load_and_save, tmp_path, tmp_path / "3d")[0]
    back, _ = call(ranks, {}, load_and_save, tmp_path / "3d", tmp_path / "back")[0]
    assert moved.keys() == bits.keys() and not differing(moved, back)


def footprint(rank: int) -> tuple[int, dict[str, tuple[int, int]]]:
    """Bytes of parameters, gradients and AdamW state here, and (bytes here, whole) of each parameter."""
    import gingham
    from gingham.commands.gpt import GPT, Shape, parallel_kit

    mesh = gingham.init(mode="2.5d", size=8, depth=2, shard_depth=True)
    model = GPT(parallel_kit(mesh), Shape(layers=2, width=512, heads=8, context=64, dropout=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = mesh.scatter(torch.zeros(8, 64, dtype=torch.int64))
    model.loss(model(ids), ids).backward()
    optimizer.step()
    total, each = 0, {}
    for name, weight in model.named_parameters():
        held = [weight, weight.grad, *optimizer.state[weight].values()]
        local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in held]
        total += sum(tensor.numel() * tensor.element_size() for tensor in local)
        each[name] = local[0].numel() * local[0].element_size(), weight.numel() * weight.element_size()
    return total, each


def test_memory_per_rank_is_an_eighth_of_serial(ranks: Any) -> None:
    """2.5d with the weights cut over depth too: <= 1.1 x serial / 8, and only biases and norms are held more than once."""
    from gingham.commands.gpt import GPT, Shape, serial_kit

    model = GPT(serial_kit(), Shape(layers=2, width=512, heads=8, context=64, dropout=0.0))
    serial = sum(4 * weight.numel() * weight.element_size() + 4 for weight in model.parameters())
    answers = ranks(8)(footprint)
    for total, each in answers:
        assert total <= 1.1 * serial / 8, (total, serial / 8)
        replicated = {name for name, (held, full) in each.items() if held * 8 > full}
        assert all(name.endswith(".bias") or "norm" in name for name in replicated), replicated
