"""The GPT against torch.nn in float64: every gradient of the first step, in every mode; and no torch.distributed below."""

from typing import Any

import pytest
import torch

from grids import MODES, words_of

SHAPE = dict(layers=2, width=64, heads=8, context=16, dropout=0.1)


def sample(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(256, (batch, SHAPE["context"] + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def parallel_gradients(rank: int, grid: dict[str, Any], batch: int) -> tuple[float, dict[str, torch.Tensor], int]:
    from torch.distributed.tensor.debug import CommDebugMode

    import gingham
    from gingham.commands.gpt import GPT, Shape, parallel_kit

    mesh = gingham.init(**grid)
    torch.manual_seed(3)
    model = GPT(parallel_kit(mesh), Shape(**SHAPE))
    ids, target = sample(batch)
    ids, target = mesh.scatter(ids), mesh.scatter(target) if mesh.inner.rows else target
    with CommDebugMode() as seen:
        loss = model.loss(model(ids), target)
        loss.backward()
    gradients = {name: weight.grad.full_tensor() for name, weight in model.named_parameters()}
    return loss.item(), gradients if rank == 0 else {}, seen.get_total_counts()


def serial_gradients(rank: int, batch: int, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    """On a mesh of one rank, which dropout on a GPU needs."""
    import gingham
    from gingham.commands.gpt import GPT, Shape, serial_kit

    gingham.init()
    torch.manual_seed(3)
    model = GPT(serial_kit(), Shape(**SHAPE)).to(dtype)
    ids, target = sample(batch)
    loss = model.loss(model(ids), target)
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("batch", [pytest.param(12, marks=pytest.mark.matrix), 7])
@pytest.mark.parametrize("grid", MODES[:-1], ids=words_of)
def test_first_gradients(ranks, grid: dict[str, Any], batch: int) -> None:
    answers = ranks(grid["size"])(parallel_gradients, grid, batch)
    loss, gradients, _ = answers[0]
    (exact_loss, exact), (_, single) = (ranks(1)(serial_gradients, batch, dtype)[0] for dtype in (torch.float64, torch.float32))
    assert loss == pytest.approx(exact_loss, rel=2e-6)
    assert gradients.keys() == exact.keys()
    for name, truth in exact.items():
        # the key bias has no effect, so that its true gradient is 0: measured against the query bias's
        scale = exact[name.replace(".k.bias", ".q.bias")].norm()
        error, serial_error = ((gradient[name] - truth).norm() / scale for gradient in (gradients, single))
        assert error <= max(2e-6, 3 * serial_error), f"{name}: {error:.2e}, serial {serial_error:.2e}"
    assert [count for *_, count in answers] == [0] * grid["size"]
