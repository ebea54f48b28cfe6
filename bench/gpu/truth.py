"""One rank on a GPU beside torch in float64: order of streams, products, layers. Fresh random numbers in every run.

python bench/gpu/truth.py [streams | products | layers | dropout | attention | loss] ...
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from rows import PLACE, RATES, aside, error_of, main, row, whole

import gingham
from gingham import native, nn

# of a result rounded once to the dtype from sums in fp32 (float64: of sums in another order)
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6, torch.float64: 1e-14}
SHAPES = [(37, 41, 53), (1, 72, 8), (136, 90, 128), (515, 387, 261), (4096, 512, 1000), (2048, 4096, 1024), (8192, 1024, 4096)]


def mesh_of_one() -> Any:
    mesh = gingham.init(device=PLACE, mode="1d", size=1)
    torch.manual_seed(int(time.time()))
    return mesh


def slow() -> None:
    torch.cuda._sleep(200_000_000)  # about a tenth of a second: what is queued behind it is not done when the host goes on


def streams() -> None:
    """What torch queued before a call is read, what it queues after sees the results; on the default stream, on others, in backward."""
    mesh_of_one()
    layer = nn.Linear(512, 768)
    weight, bias = whole(layer.weight).double(), whole(layer.bias).double()
    source = torch.randn(1024, 512, device=PLACE)
    truth = torch.nn.functional.linear(source.double(), weight, bias)

    def once(name: str) -> None:
        x = torch.full_like(source, float("nan"))
        torch.cuda.current_stream().synchronize()
        slow()
        x.copy_(source)
        y = layer(x)
        kept = y.detach().clone()
        row(f"order, {name}", error_of(kept, truth), 2e-6)

    def backward(name: str) -> None:
        layer.zero_grad()
        x = source.clone().requires_grad_()
        gradient = torch.full_like(truth, float("nan"), dtype=torch.float32)
        real = torch.randn(gradient.shape, device=PLACE)
        torch.cuda.synchronize()
        y = layer(x)
        slow()
        gradient.copy_(real)
        y.backward(gradient)
        kept = [x.grad.clone(), whole(layer.weight.grad).clone(), whole(layer.bias.grad).clone()]
        truths = [real.double() @ weight, real.double().T @ source.double(), real.double().sum(0)]
        for what, got, expected in zip(("dx", "dw", "db"), kept, truths, strict=True):
            row(f"order in backward, {name}, {what}", error_of(got, expected), 2e-6)

    once("default stream")
    backward("default stream")
    with aside() as side:
        once("side stream")
        backward("side stream")
    once("default stream again")
    y = layer(source)
    y.record_stream(side)
    row("untyped storage is torch's own", float(not y.untyped_storage().resizable()), 0.0)


def products() -> None:
    """Linear forward and backward: X W + b, dY W', X' dY, sums of dY, in every dtype and size; NaN before in every result."""
    mesh_of_one()
    if os.environ.get("GINGHAM_SM90", "1") != "0" and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        status = native.hopper_status()
        row("Hopper kernel is on", float(status != "on"), 0.0, status=status)
    else:
        row("Hopper kernel", native.hopper_status())
    for dtype, bound in BOUNDS.items():
        for rows, into, out in SHAPES:
            if dtype == torch.float64 and rows * into * out > 1 << 31:
                continue
            poison()
            layer = nn.Linear(into, out).to(dtype)
            x = torch.randn(rows, into, device=PLACE).to(dtype).requires_grad_()
            gradient = torch.randn(rows, out, device=PLACE).to(dtype)
            y = layer(x)
            y.backward(gradient)
            weight, bias, g = whole(layer.weight).double(), whole(layer.bias).double(), gradient.double()
            found = {"y": y, "dx": x.grad, "dw": whole(layer.weight.grad), "db": whole(layer.bias.grad)}
            exact = x.detach().double()
            truths = {"y": torch.nn.functional.linear(exact, weight, bias), "dx": g @ weight, "dw": g.T @ exact, "db": g.sum(0)}
            worst = {name: error_of(found[name], truth) for name, truth in truths.items()}
            at = max(worst, key=lambda name: float("inf") if worst[name] != worst[name] else worst[name])
            row(f"linear {rows}x{into}x{out} {RATES[dtype]}", worst[at], bound, worst=at, all=worst)


def poison() -> None:
    """The caching allocator's free blocks hold NaN, so that what no kernel writes shows."""
    blocks = [torch.full((n,), float("nan"), device=PLACE) for n in (1 << 8, 1 << 14, 1 << 18, 1 << 22, 1 << 24, 1 << 25)]
    del blocks


def twins(name: str, ours: torch.nn.Module, theirs: torch.nn.Module, x: torch.Tensor, bound: float, gradient_bound: float) -> None:
    """Output, input gradient and parameters' gradients of one module beside its twin in float64 with the same weights."""
    theirs = theirs.to(PLACE, torch.float64)
    with torch.no_grad():
        for mine, their in zip(ours.parameters(), theirs.parameters(), strict=True):
            their.copy_(whole(mine).double())
    poison()
    a = x.clone().requires_grad_()
    b = x.detach().double().clone().requires_grad_()
    y, truth = ours(a), theirs(b)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    truth.backward(gradient.double())
    row(f"{name}, y", error_of(y, truth.detach()), bound)
    row(f"{name}, dx", error_of(a.grad, b.grad), gradient_bound)
    for (label, mine), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        row(f"{name}, d {label}", error_of(whole(mine.grad), their.grad), gradient_bound)


class TorchMLP(torch.nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.nn.functional.gelu(self.fc1(x)))


def layers() -> None:
    mesh_of_one()
    for dtype, bound in BOUNDS.items():
        kind = RATES[dtype]
        for rows, width in ((129, 200), (4096, 1024)):
            x = torch.randn(rows, width, device=PLACE).to(dtype)
            twins(f"MLP {rows}x{width} {kind}", nn.MLP(width, 4 * width).to(dtype), TorchMLP(width, 4 * width), x, 2 * bound, 3 * bound)
            norm, rms = torch.nn.LayerNorm(width), torch.nn.RMSNorm(width, eps=1e-6)
            twins(f"LayerNorm {rows}x{width} {kind}", nn.LayerNorm(width).to(dtype), norm, x + 3, bound, 2 * bound)
            twins(f"RMSNorm {rows}x{width} {kind}", nn.RMSNorm(width, eps=1e-6).to(dtype), rms, x, bound, 2 * bound)


def loss() -> None:
    mesh_of_one()
    for dtype, bound in BOUNDS.items():
        for rows, classes in ((64, 97), (2048, 50257)):
            poison()
            logits = (3 * torch.randn(rows, classes, device=PLACE)).to(dtype).requires_grad_()
            target = torch.randint(classes, (rows,), device=PLACE)
            target[::7] = -100
            exact = logits.detach().double().clone().requires_grad_()
            for smoothing in (0.0, 0.1):
                logits.grad = exact.grad = None
                got = gingham.cross_entropy(logits, target, label_smoothing=smoothing)
                truth = torch.nn.functional.cross_entropy(exact, target, label_smoothing=smoothing)
                got.backward()
                truth.backward()
                name = f"cross_entropy {rows}x{classes} {RATES[dtype]} smoothing {smoothing}"
                row(name, error_of(got, truth.detach()), bound)
                row(
                    name + ", gradient", error_of(logits.grad, exact.grad), 4e-3 if dtype == torch.float16 else 2 * bound
                )  # subnormal in f16


def attention() -> None:
    mesh_of_one()
    for dtype, bound in BOUNDS.items():
        for width, heads, time_ in ((64, 4, 37), (512, 8, 300)):
            torch.manual_seed(width)
            ours = nn.SelfAttention(width, heads, causal=True).to(dtype)
            x = torch.randn(2, time_, width, device=PLACE).to(dtype)
            weights = {name: whole(w).detach().double() for name, w in ours.named_parameters()}
            a, b = x.clone().requires_grad_(), x.double().clone().requires_grad_()

            def linear(name: str, t: torch.Tensor, weights: dict[str, torch.Tensor] = weights) -> torch.Tensor:
                return torch.nn.functional.linear(t, weights[f"{name}.weight"], weights[f"{name}.bias"])

            def split(t: torch.Tensor, heads: int = heads) -> torch.Tensor:
                return t.unflatten(-1, (heads, -1)).transpose(1, 2)

            q, k, v = (split(linear(name, b)) for name in "qkv")
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            truth = linear("o", mixed)
            y = ours(a)
            gradient = torch.randn_like(y)
            y.backward(gradient)
            truth.backward(gradient.double())
            name = f"SelfAttention {width}/{heads} of {time_} {RATES[dtype]}"
            row(name, error_of(y, truth.detach()), 3 * bound)
            row(name + ", dx", error_of(a.grad, b.grad), 5 * bound)


def dropout() -> None:
    """The mask is that of the CPU's kernel, bit by bit: the same function of seed, name, call and place."""
    mesh = mesh_of_one()
    for shape in ((33, 130), (2, 64, 96)):
        x = torch.randn(shape)
        kept = []
        for place in (PLACE, "cpu"):
            program = None if place == "cpu" else mesh.program
            y = native.dropout(x.to(place), 0.3, 11, 12, 13, list(shape), [0] * len(shape), program)
            kept.append(y.cpu())
        row(f"dropout {shape}, places that differ", float((kept[0] != kept[1]).sum()), 0.0)


PARTS: dict[str, Callable[[], None]] = {
    "streams": streams,
    "products": products,
    "layers": layers,
    "loss": loss,
    "dropout": dropout,
    "attention": attention,
}
if __name__ == "__main__":
    main(PARTS)
