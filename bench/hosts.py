"""Two hosts of two ranks, made of network, PID and UTS namespaces with links of 1 Gbit/s: gingham beside Gloo and torch. Needs root.

    python bench/hosts.py [--rate 1gbit] [--engine ucx|gloo] [--case matmul|collectives|models] [--rounds 15]

Both hosts run torchrun --nnodes 2. All candidates of a case run in the same processes, one after the other in every round, between
barriers; the time of a run is that of the slowest rank. Shown are medians in ms, and ratios of medians.
    matmul       C = A B by SUMMA on 2 x 2, beside broadcasts of Gloo, the same prefetched, products alone, messages alone
    collectives  an all-gather of 4 MB a rank and an all-reduce of 16 MB over all four ranks, beside Gloo's own and a ring in mesh order
                 made of gingham's messages, on the same engine
    models       a pair of Linears and the demo's GPT, forward and backward, beside torch's tensor parallelism over Gloo
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

Run = Callable[[], object]
NAMES, ADDRESSES, BRIDGE = ("gbench1", "gbench2"), ("10.78.0.1", "10.78.0.2"), "gbenchbr"
Q = 2  # the grid is Q x Q


@contextlib.contextmanager
def network(rate: str) -> Iterator[None]:
    """Two network namespaces on one bridge, each link shaped both ways."""
    shape = f"root tbf rate {rate} burst 256k limit 4m".split()
    try:
        subprocess.run(["ip", "link", "add", BRIDGE, "type", "bridge"], check=True)
        subprocess.run(["ip", "link", "set", BRIDGE, "up"], check=True)
        for at, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            inside = ["ip", "netns", "exec", name]
            outer = f"gbenchv{at}"
            for command in (
                ["ip", "netns", "add", name],
                ["ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name],
                ["ip", "link", "set", outer, "master", BRIDGE, "up"],
                [*inside, "ip", "link", "set", "lo", "up"],
                [*inside, "ip", "addr", "add", f"{address}/24", "dev", "eth0"],
                [*inside, "ip", "link", "set", "eth0", "up"],
                ["tc", "qdisc", "add", "dev", outer, *shape],
                [*inside, "tc", "qdisc", "add", "dev", "eth0", *shape],
            ):
                subprocess.run(command, check=True)
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", BRIDGE], stderr=subprocess.DEVNULL)


def start(options: argparse.Namespace) -> int:
    """Runs this script on both hosts; the status of the first that fails."""
    port, hosts = "29711", []
    for at, name in enumerate(NAMES):
        command = [
            *("ip", "netns", "exec", name, "unshare", "--uts", "--pid", "--fork", "--mount-proc"),
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", "--node-rank", str(at)),
            *("--master-addr", ADDRESSES[0], "--master-port", port, os.path.abspath(__file__), "--serve"),
            *("--case", options.case, "--rounds", str(options.rounds), "--sizes", options.sizes),
        ]
        environment = {**os.environ, "GINGHAM_ENGINE": options.engine, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        hosts.append(subprocess.Popen(command, env=environment))
    return max(host.wait() for host in hosts)


def cpu_seconds() -> float:
    """That this machine's cores have worked so far, for processes and for the network."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, interrupts, softirq = map(int, file.readline().split()[1:8])
    return (user + nice + system + interrupts + softirq) / os.sysconf("SC_CLK_TCK")


busy: dict[str, float] = {}  # of the last compare, by candidate: CPU seconds of all cores in a run, on average


def compare(title: str, runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """The median of each candidate in seconds, the slowest rank's; rank 0 shows them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    busy.clear()
    for at in range(-2, rounds):
        for name, run in runs.items():
            dist.barrier()
            begin, worked = time.perf_counter(), cpu_seconds()
            run()
            spent = torch.tensor([time.perf_counter() - begin])
            dist.all_reduce(spent, dist.ReduceOp.MAX)
            if at >= 0:
                times[name].append(spent.item())
                busy[name] = busy.get(name, 0.0) + (cpu_seconds() - worked) / rounds
    medians = {name: statistics.median(each) for name, each in times.items()}
    if dist.get_rank() == 0:
        print(f"{title}: " + "   ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in medians.items()), flush=True)
    return medians


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"    {text}", flush=True)


class Summa:
    """C = A B of n x n on Q x Q ranks, by gingham and by broadcasts of Gloo; checked once."""

    def __init__(self, n: int, rows: dist.ProcessGroup, columns: dist.ProcessGroup, mesh: Any) -> None:
        import gingham

        torch.manual_seed(0)
        full = torch.randn(n, n), torch.randn(n, n)
        self.row, self.column, self.rows, self.columns, self.mesh = dist.get_rank() // Q, dist.get_rank() % Q, rows, columns, mesh
        block = n // Q
        place = slice(self.row * block, (self.row + 1) * block), slice(self.column * block, (self.column + 1) * block)
        self.a, self.b = (each[place].contiguous() for each in full)
        self.out = torch.empty(block, block)
        self.x, self.w = mesh.scatter(full[0], operand="a"), mesh.scatter(full[1], operand="b")
        self.product = lambda: gingham.matmul(self.x, self.w, mesh=mesh)
        expected = full[0] @ full[1]
        for got, wanted in (
            (mesh.gather(self.product(), operand="c"), expected),
            (self.naive(), expected[place]),
            (self.prefetched(), expected[place]),
        ):
            assert (got - wanted).norm() / wanted.norm() < 1e-5

    def panels(self, step: int) -> list[tuple[torch.Tensor, int, dist.ProcessGroup]]:
        left = self.a if step == self.column else torch.empty_like(self.a)
        right = self.b if step == self.row else torch.empty_like(self.b)
        return [(left, self.row * Q + step, self.rows), (right, step * Q + self.column, self.columns)]

    def naive(self) -> torch.Tensor:
        self.out.zero_()
        for step in range(Q):
            moved = self.panels(step)
            for panel, root, group in moved:
                dist.broadcast(panel, root, group=group)
            self.out.addmm_(moved[0][0], moved[1][0])
        return self.out

    def prefetched(self) -> torch.Tensor:
        """The panels of the next step on their way while this one is multiplied."""
        self.out.zero_()
        moved = self.panels(0)
        works = [dist.broadcast(panel, root, group=group, async_op=True) for panel, root, group in moved]
        for step in range(Q):
            here, waits = moved, works
            if step + 1 < Q:
                moved = self.panels(step + 1)
                works = [dist.broadcast(panel, root, group=group, async_op=True) for panel, root, group in moved]
            for work in waits:
                work.wait()
            self.out.addmm_(here[0][0], here[1][0])
        return self.out

    def products(self) -> None:
        self.out.zero_()
        for _ in range(Q):
            self.out.addmm_(self.a, self.b)

    def messages(self) -> None:
        self.mesh.axis(("col",)).all_gather(self.a, counted=False)
        self.mesh.axis(("row",)).all_gather(self.b, counted=False)


def matmul(options: argparse.Namespace) -> None:
    import gingham

    mesh = gingham.init(mode="2d", size=Q * Q)
    rows = [dist.new_group([i * Q + k for k in range(Q)]) for i in range(Q)][dist.get_rank() // Q]
    columns = [dist.new_group([k * Q + j for k in range(Q)]) for j in range(Q)][dist.get_rank() % Q]
    for n in map(int, options.sizes.split(",")):
        summa = Summa(n, rows, columns, mesh)
        runs = {
            "gingham": summa.product,
            "naive Gloo": summa.naive,
            "Gloo prefetched": summa.prefetched,
            "products alone": summa.products,
            "messages alone": summa.messages,
        }
        found = compare(f"matmul n={n}", runs, options.rounds)
        bound = max(found["products alone"], found["messages alone"])
        ratios = ", ".join(f"{found[name] / found['gingham']:.2f} x as fast as {name}" for name in ("naive Gloo", "Gloo prefetched"))
        say(f"{ratios}, {found['gingham'] / bound:.2f} x max(products, messages)")
        # the cores that multiply also carry the network: no overlap hides that
        least = (busy["products alone"] + busy["messages alone"]) / (os.cpu_count() or 1)
        words = ", ".join(f"{name} {seconds:.3f}" for name, seconds in busy.items())
        say(f"CPU seconds: {words}; {found['gingham'] / max(bound, least):.2f} x max(that, the cores' work for both)")
    gingham.destroy()


class FlatRing:
    """All-gather and all-reduce round a ring in mesh order, a block to the next rank and one from the last in every step."""

    def __init__(self, mesh: Any) -> None:
        self.axis, self.rank, self.size = mesh.world, dist.get_rank(), dist.get_world_size()

    def passed(self, block: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        to, source = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        arrived: torch.Tensor = self.axis.exchange([(to, block)], [(source, list(like.shape))], "float32", counted=False)[0]
        return arrived

    def all_gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        found = [mine]
        for _ in range(self.size - 1):
            found.append(self.passed(found[-1], mine))
        return found

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.chunk(self.size)
        total = parts[(self.rank - 1) % self.size]
        for hop in range(2, self.size + 1):
            total = self.passed(total, total) + parts[(self.rank - hop) % self.size]
        return torch.cat(self.all_gather(total))


def collectives(options: argparse.Namespace) -> None:
    import gingham

    mesh = gingham.init(mode="1d", size=4)
    ring, out = FlatRing(mesh), torch.empty(4 << 20)
    gathered, summed, once = torch.full((1 << 20,), 1.0 + dist.get_rank()), torch.ones(1 << 22), torch.ones(1 << 10)
    assert sum(each[0].item() for each in ring.all_gather(gathered)) == 10 and ring.all_reduce(once).eq(4).all()
    gathers: dict[str, Run] = {
        "gingham": lambda: mesh.world.all_gather(gathered, counted=False),
        "flat ring": lambda: ring.all_gather(gathered),
        "Gloo": lambda: dist.all_gather_into_tensor(out, gathered),
    }
    sums: dict[str, Run] = {
        "gingham": lambda: mesh.world.all_reduce_(summed, counted=False),
        "flat ring": lambda: ring.all_reduce(summed),
        "Gloo": lambda: dist.all_reduce(summed),
    }
    for title, runs in (("all-gather of 4 MB a rank", gathers), ("all-reduce of 16 MB", sums)):
        found = compare(title, runs, options.rounds)
        say(", ".join(f"{found['gingham'] / found[name]:.2f} of {name}" for name in ("flat ring", "Gloo")))
    gingham.destroy()


def models(options: argparse.Namespace) -> None:
    pair_of_linears(options)
    gpt_step(options)


def gpt_step(options: argparse.Namespace) -> None:
    """The demo's GPT of 4 layers, 256 wide, 8 x 128 tokens: forward, backward and AdamW."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    import gingham
    from gingham.commands import gpt, train

    shape = argparse.Namespace(layers=4, width=256, heads=8, context=128, dropout=0.1, batch=8, lr=3e-4, seed=1, text=None)
    ids, targets = gpt.batches(gpt.read_text(None), shape.batch, shape.context, shape.seed)(0)
    kit = dataclasses.replace(gpt.serial_kit(), dropout=torch.nn.Dropout)
    whole, _ = train.build(kit, train.shape_of(shape), shape)
    ways = {"attention.o": RowwiseParallel(), "mlp.fc2": RowwiseParallel()}
    ways |= {f"attention.{name}": ColwiseParallel() for name in "qkv"} | {"mlp.fc1": ColwiseParallel()}
    device_mesh = init_device_mesh("cpu", (4,))
    for block in whole.blocks:
        parallelize_module(block, device_mesh, ways)
        block.attention.heads //= 4
    runs: dict[str, Run] = {"torch TP over Gloo": training_step(whole, torch.optim.AdamW(whole.parameters(), lr=shape.lr), ids, targets)}
    for grid in ({"mode": "1d", "size": 4}, {"mode": "2d", "size": 4}):
        mesh = gingham.init(**grid, default=False)
        model, optimizer = train.build(gpt.parallel_kit(mesh), train.shape_of(shape), shape)
        own = mesh.scatter(ids), mesh.scatter(targets) if mesh.inner.rows else targets
        runs[f"gingham {grid['mode']}"] = training_step(model, optimizer, *own)
    found = compare("a step of the demo's GPT, 4 layers, 256 wide, 8 x 128 tokens", runs, options.rounds)
    say(", ".join(f"{name}: {found['torch TP over Gloo'] / found[name]:.2f} x as fast as torch" for name in runs if name[0] == "g"))
    gingham.destroy()


def training_step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, targets: torch.Tensor) -> Run:
    def step() -> None:
        loss = model.loss(model(ids), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def pair_of_linears(options: argparse.Namespace) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    import gingham

    plain = torch.nn.Sequential(torch.nn.Linear(1024, 4096, bias=False), torch.nn.Linear(4096, 1024, bias=False))
    mesh = gingham.init(mode="auto", model=plain, tokens=(1, 1024))
    say(f"mode='auto' chose {mesh} of ranks {mesh.ranks}")
    torch.manual_seed(0)
    first = gingham.nn.Linear(1024, 4096, bias=False, layout="outer->inner", swapped="auto")
    second = gingham.nn.Linear(4096, 1024, bias=False, layout="inner->outer", swapped="auto")
    full, gradient = torch.randn(1024, 1024), torch.randn(1024, 1024)
    x, g = mesh.scatter(full).requires_grad_(), mesh.scatter(gradient)
    model = plain
    parallelize_module(model, init_device_mesh("cpu", (4,)), {"0": ColwiseParallel(), "1": RowwiseParallel()})
    whole = full.clone().requires_grad_()

    def ours() -> None:
        x.grad = first.weight.grad = second.weight.grad = None
        second(first(x)).backward(g)

    def torchs() -> None:
        model.zero_grad()
        whole.grad = None
        model(whole).backward(gradient)

    found = compare("a pair of Linears, 1024 x 1024 -> 4096 -> 1024", {"gingham": ours, "torch TP over Gloo": torchs}, options.rounds)
    say(f"{found['torch TP over Gloo'] / found['gingham']:.2f} x as fast as torch")
    gingham.destroy()


CASES = {"matmul": matmul, "collectives": collectives, "models": models}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--engine", default="ucx", choices=("ucx", "gloo"))
    parser.add_argument("--case", default="matmul", choices=CASES)
    parser.add_argument("--sizes", default="1024,2048")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.serve:
        with network(options.rate):
            return start(options)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    CASES[options.case](options)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
