"""clip_grad_norm_ counts replicas once and scales as torch's does; torch's own, of plain gradients beside those on a mesh."""

from typing import Any

import pytest
import torch

import gingham
from gingham import nn
from grids import GRIDS, ranks_of, relative, whole


def clipped(rank: int, options: dict[str, Any]) -> tuple[list[float], float]:
    mesh = gingham.init(**options)
    found, worst = [], 0.0
    for norm_type in (2.0, 3.0, torch.inf):
        torch.manual_seed(2)
        ours = torch.nn.Sequential(nn.Linear(19, 53), nn.LayerNorm(53))
        torch.manual_seed(2)
        theirs = torch.nn.Sequential(torch.nn.Linear(19, 53), torch.nn.LayerNorm(53)).double()
        x = torch.randn(7, 19)
        mesh.gather(ours(mesh.scatter(x))).pow(3).sum().backward()
        theirs(x.double()).pow(3).sum().backward()
        got = gingham.clip_grad_norm_(ours.parameters(), 0.7, norm_type)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.7, norm_type)
        found += [float(got)]
        worst = max(
            worst,
            relative(got, expected),
            *(relative(whole(a.grad), b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)),
        )
    return found, worst


@pytest.mark.parametrize("name", ["one", "1d", "2.5d", "2.5d sharded", "3x2x2"])
def test_equals_serial_and_is_the_same_number_everywhere(ranks, name: str) -> None:
    answers = ranks(ranks_of(name))(clipped, GRIDS[name])
    assert all(found == answers[0][0] and worst <= 2e-6 for found, worst in answers), answers


def torchs_arguments(rank: int, options: dict[str, Any]) -> dict[str, str]:
    """What torch's arguments give where a gradient is not finite, on one rank's block only."""
    mesh, said = gingham.init(**options), {}
    for value in (float("nan"), float("inf")):
        torch.manual_seed(2)
        layer = nn.Linear(8, 8, bias=False)
        layer(mesh.scatter(torch.ones(8, 8))).sum().backward()
        if rank == 1:
            layer.weight.grad.to_local()[0, 0] = value
        before = layer.weight.grad.to_local().clone()
        try:
            gingham.clip_grad_norm_(layer.parameters(), 1.0, 2.0, error_if_nonfinite=True, foreach=True)
        except RuntimeError as error:
            said[f"{value}"] = str(error)
        assert torch.equal(before, layer.weight.grad.to_local()) or rank == 1, "a refused clip changed a gradient"
        norm = gingham.clip_grad_norm_(layer.parameters(), 1.0, error_if_nonfinite=False, foreach=False)
        said[f"{value} norm"] = str(float(norm))
    with pytest.raises(ValueError, match="norm_type=0.0"):
        gingham.clip_grad_norm_(layer.parameters(), 1.0, 0.0)
    return said


def test_c8_error_if_nonfinite_and_foreach_are_torchs(ranks) -> None:
    for rank, said in enumerate(ranks(4)(torchs_arguments, GRIDS["2d"])):
        assert all("non-finite" in said[value] and f"rank {rank}" in said[value] for value in ("nan", "inf")), said
        assert said["nan norm"] == "nan" and said["inf norm"] == "inf", said


class Headed(torch.nn.Module):
    """A converted model below a layer that is not, whose parameters are plain tensors."""

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        body = torch.nn.Sequential(torch.nn.Linear(7, 11), torch.nn.GELU(), torch.nn.Linear(11, 5)).double()
        self.head = torch.nn.Linear(5, 3).double()
        self.body = body if mesh is None else gingham.parallelize(body, mesh)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def beside_plain(rank: int, mode: str, size: int) -> float:
    """The largest error of norms, and of parameters after steps with them clipped, of DTensors and plain tensors in one list."""
    mesh, worst = gingham.init(mode, size=size), 0.0
    x = torch.randn(8, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kinds: list[Any] = [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad]
    for foreach, kind, norm_type in zip((None, True, False), kinds, (2.0, 1.0, torch.inf), strict=True):
        for form in ("foreach", "fused"):
            answers = []
            for model in (Headed(None), Headed(mesh)):
                optimizer = kind(model.parameters(), lr=0.1, **{form: True})
                versions = [p._version for p in model.parameters()]
                for _ in range(2):
                    optimizer.zero_grad()
                    model(x).square().sum().backward()
                    grads = [p.grad for p in model.parameters()]
                    total = torch.nn.utils.get_total_norm(grads, norm_type, foreach=foreach)
                    torch.nn.utils.clip_grad_value_(model.parameters(), 3.0, foreach=foreach)
                    clipped = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5, norm_type, foreach=foreach)
                    cut = torch.nn.utils.get_total_norm([p.grad for p in model.body.parameters()])
                    torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.1, cut, foreach=foreach)
                    optimizer.step()
                assert form == "fused" or all(p._version > seen for p, seen in zip(model.parameters(), versions, strict=True))
                answers.append([total, clipped, *(whole(p.detach()) for p in model.parameters())])
            worst = max(worst, *(relative(mine, theirs) for theirs, mine in zip(*answers, strict=True)))
    return worst


@pytest.mark.parametrize(("mode", "size"), [("1d", 2), ("2d", 4)])
def test_torchs_clipping_and_steps_of_plain_parameters_beside_ours(ranks, mode: str, size: int) -> None:
    assert max(ranks(size)(beside_plain, mode, size)) < 1e-12


def test_a_norm_of_plain_gradients_beside_ours_is_refused_where_the_batch_is_cut(ranks) -> None:
    def said(rank: int) -> str:
        model = Headed(gingham.init(parallel=dict(data=2, tensor=dict(size=1, mode="1d"))))
        model(torch.ones(4, 7, dtype=torch.float64)).sum().backward()
        with pytest.raises(gingham.MeshError) as caught:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return str(caught.value)

    for rank, words in enumerate(ranks(2)(said)):
        assert f"rank {rank} got a plain tensor (3, 5) beside DTensors on a mesh with data=2" in words and "expected all layers" in words
