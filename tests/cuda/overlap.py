"""The expected overlap of one Linear of a deep stack, forward and backward, on 8 H100s of one NVLink host at 2.5D (q = 2, depth 2).

    PYTHONPATH=tests python -m cuda.overlap      prints the table of docs/cuda.md

What a step queues is not assumed: fake/deep.py runs the host side on fake devices, every size divided by SCALE, and what each rank
queues on which stream, with its events, is written down (fake/trace.cc). Here that is replayed in time, which is a model: several
GPUs were never seen. It assumes:

  host             ahead of the devices at all times, as in a CUDA graph
  links            380 GB/s a direction of 450, shared by all messages of a rank under way; 8 us until a group's first byte
  products         R / (1 + H / K), R = 808 TFLOP/s, H = 265 with results in 16 bits: through 759 at K = 4096 and 642 at K = 1024,
                   both measured on one H100. H = 400 where C is fp32, stored or added to: 581 at K = 1024, the slow end of what was
                   computed for it (docs/cuda_kernels.md). H = 650 where C is read and the result stored in 16 bits, as measured of
                   that way out
  other kernels    what they read and write at 3.0 TB/s, and 2 us
  kernels at once  of two streams share the device evenly
  multiprocessors  messages by NCCL hold 16 of 132 while one is under way: products are that much slower (maxCTAs is not set: NCCL
                   may take more); by copy engines none
  copy engines     (GINGHAM_COPY_ENGINES=1) 2 us until a copy begins, then the links' rate into a peer's window, or what it reads and
                   writes at 3.0 TB/s out of the own one, by an engine as well; 0.5 us for each wait for a flag and each write of one

A share is the time of one layer's products alone, each in one launch with results in 16 bits, over what a layer adds to a step:
stacks of two depths are compared, so that the first and the last layer, which have nothing beside them, do not count. What torch
computes between layers is left out.
"""

from __future__ import annotations

import collections
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from cuda import fake_build

NVLINK, ALPHA, HBM, LAUNCH, FLAG = 380e9, 8e-6, 3.0e12, 2e-6, 0.5e-6
BEST, NARROW, WIDE, READING = 808e12, 265.0, 400.0, 650.0
BLOCKS, MULTIPROCESSORS = 16, 132
RANKS, Q, DEPTH = 8, 2, 2
SCALE = 64  # by which sizes are divided on the fake devices
DEPTHS = (2, 4)  # layers of the two stacks
WINDOW = 64 << 20  # bytes an axis
CARRIERS = {"NCCL": BLOCKS, "copy engines": 0}  # multiprocessors that they hold
SHAPES = ((16384, 8192), (8192, 8192), (32768, 16384))
DEEP = Path(__file__).parent / "fake" / "deep.py"


@dataclass
class Work:
    """A piece of a rank's stream. seconds: of a kernel alone on the device."""

    kind: str  # kernel, product, copy, record, wait, group, push, set, take
    seconds: float = 0.0  # of a kernel alone on the device, of a copy or what is done with a flag
    ticket: int = -1
    messages: list[tuple[str, int, int, float]] = field(default_factory=list)  # way, hall, peer, bytes
    flag: str = ""
    value: int = 0


@dataclass
class Transfer:
    source: int
    target: int
    left: float  # bytes
    ends: int = 0  # that have begun
    since: float = 0.0


def product_seconds(m: int, n: int, k: int, adds: bool, stored: int) -> float:
    half = READING if adds and stored == 2 else WIDE if adds or stored > 2 else NARROW
    flops = 2.0 * m * n * k / BEST * (1 + half / k)
    return max(flops, (2 * (m * k + k * n) + m * n * (stored + 4 * adds)) / HBM)


def kernel(words: list[str], scale: int) -> Work:
    if words[0] == "gemm":
        m, n, k, adds, stored = map(int, words[1:])
        return Work("product", product_seconds(m * scale, n * scale, k * scale, bool(adds), stored))
    return Work("kernel", int(words[1]) * scale**2 / HBM + LAUNCH)


def by_engine(what: str, words: list[str], scale: int) -> Work:
    if what == "P":
        return Work("push", messages=[("s", -1, int(words[0]), int(words[1]) * scale**2)])
    if what == "L":
        return Work("copy", LAUNCH + 2 * int(words[0]) * scale**2 / HBM)
    return Work("take" if what == "T" else "set", FLAG, flag=words[0], ticket=int(words[1]), value=int(words[2]))


def read(path: Path, scale: int, marks: tuple[str, str]) -> dict[int, list[Work]]:
    """The streams of a rank between two marks."""
    streams: dict[int, list[Work]] = collections.defaultdict(list)
    on = False
    for line in path.read_text().splitlines():
        what, first, *words = line.split(" ")
        if what == "M":
            text = " ".join([first, *words])
            on = text == marks[0] or (on and text != marks[1])
            continue
        if not on:
            continue
        stream = streams[int(first)]
        if what == "K":
            stream.append(kernel(words, scale))
        elif what in "RW":
            stream.append(Work("record" if what == "R" else "wait", ticket=int(words[0])))
        elif what in "PLTS":
            stream.append(by_engine(what, words, scale))
        else:
            parts = [word.split(",") for word in words]
            stream.append(Work("group", messages=[(way, int(hall), int(peer), int(size) * scale**2) for way, hall, peer, size in parts]))
    return streams


class Machine:
    """All ranks' streams, replayed."""

    def __init__(self, ranks: list[dict[int, list[Work]]], lent: int) -> None:
        self.queues = {(rank, stream): collections.deque(work) for rank, streams in enumerate(ranks) for stream, work in streams.items()}
        self.known = [{work.ticket for works in streams.values() for work in works if work.kind == "record"} for streams in ranks]
        self.done: list[set[int]] = [set() for _ in ranks]
        self.lent, self.now = lent, 0.0
        self.left: dict[tuple[int, int], float] = {}  # seconds of the kernels and copies under way
        self.flags: dict[str, int] = {}  # those whose value is not what they held at first
        self.transfers: dict[tuple[int, int, int, int], Transfer] = {}
        self.counts: collections.Counter[tuple[int, int, int, str]] = collections.Counter()
        self.groups: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
        self.busy = [0.0] * len(ranks)  # seconds in which a rank had a product under way

    def run(self) -> float:
        while any(self.queues.values()):
            changed = True
            while changed:
                changed = False
                for place in self.queues:
                    changed |= self._begin(place)
            if any(self.queues.values()):
                self._advance()
        return self.now

    def _begin(self, place: tuple[int, int]) -> bool:
        """Starts or ends what stands first in a stream; whether anything changed."""
        queue, rank = self.queues[place], place[0]
        if not queue:
            return False
        work = queue[0]
        if work.kind == "record":
            self.done[rank].add(work.ticket)
        elif work.kind == "wait":
            if work.ticket in self.known[rank] and work.ticket not in self.done[rank]:
                return False
        elif work.kind == "group":
            if place not in self.groups:
                self.groups[place] = [self._join(rank, *message) for message in work.messages if message[3]]
                return True
            if any(key in self.transfers for key in self.groups[place]):
                return False
            del self.groups[place]
        elif work.kind == "push":
            if place not in self.groups:
                self.groups[place] = [self._push(rank, *work.messages[0][2:])]
                return True
            if self.groups[place][0] in self.transfers:
                return False
            del self.groups[place]
        elif work.kind == "take" and self.flags.get(work.flag, work.ticket) != work.value:
            return False
        else:
            if place not in self.left:
                self.left[place] = work.seconds
                return True
            if self.left[place] > 1e-12:
                return False
            del self.left[place]
            if work.kind == "set":
                self.flags[work.flag] = work.value
        queue.popleft()
        return True

    def _join(self, rank: int, way: str, hall: int, peer: int, size: float) -> tuple[int, int, int, int]:
        source, target = (rank, peer) if way == "s" else (peer, rank)
        self.counts[hall, source, target, way] += 1
        key = (hall, source, target, self.counts[hall, source, target, way])
        transfer = self.transfers.setdefault(key, Transfer(source, target, size))
        assert transfer.left == size, f"a message of {size} bytes meets one of {transfer.left}"
        transfer.ends += 1
        transfer.since = self.now + ALPHA
        return key

    def _push(self, rank: int, peer: int, size: float) -> tuple[int, int, int, int]:
        self.counts[-1, rank, peer, "p"] += 1
        key = (-1, rank, peer, self.counts[-1, rank, peer, "p"])
        self.transfers[key] = Transfer(rank, peer, size, ends=2, since=self.now + LAUNCH)
        return key

    def _advance(self) -> None:
        moving = [each for each in self.transfers.values() if each.ends == 2 and each.since <= self.now]
        out, into = collections.Counter(each.source for each in moving), collections.Counter(each.target for each in moving)
        talks = {rank for each in self.transfers.values() if each.ends == 2 for rank in (each.source, each.target)}
        kernels = collections.Counter(place[0] for place in self.left if self.queues[place][0].kind in ("kernel", "product"))
        speeds = [NVLINK / max(out[each.source], into[each.target]) for each in moving]
        rates = {}
        for place in self.left:
            slower = (MULTIPROCESSORS - self.lent) / MULTIPROCESSORS if place[0] in talks and self.queues[place][0].kind == "product" else 1
            rates[place] = slower / kernels[place[0]] if self.queues[place][0].kind in ("kernel", "product") else 1
        times = [each.left / speed for each, speed in zip(moving, speeds, strict=True)]
        times += [each.since - self.now for each in self.transfers.values() if each.ends == 2 and each.since > self.now]
        times += [self.left[place] / rate for place, rate in rates.items()]
        assert times, "every stream waits"
        step = max(min(times), 1e-12)
        for place in self.left:
            if self.queues[place][0].kind == "product":
                self.busy[place[0]] += step
        for each, speed in zip(moving, speeds, strict=True):
            each.left -= speed * step
        for place, rate in rates.items():
            self.left[place] -= rate * step
        self.now += step
        for key in [key for key, each in self.transfers.items() if each.left <= 1e-3]:
            del self.transfers[key]


def seconds(folder: Path, scale: int, lent: int, marks: tuple[str, str]) -> float:
    files = sorted(folder.glob("*.txt"), key=lambda path: int(path.stem))
    assert len(files) == RANKS, f"{folder} holds the queues of {len(files)} ranks, expected {RANKS}"
    return Machine([read(path, scale, marks) for path in files], lent).run()


def record(package: Path, folder: Path, layers: int, tokens: int, width: int, engines: bool = False) -> Path:
    """What the ranks queue. package: a build of fake_build with its binding."""
    folder.mkdir(parents=True)
    sizes = {"GINGHAM_EARLY_BYTES": "0", "GINGHAM_CHUNK_BYTES": str((4 << 20) // SCALE**2), "GINGHAM_COPY_BYTES": str(WINDOW // SCALE**2)}
    told = fake_build.package_environment(package, FAKE_TRACE=str(folder), GINGHAM_COPY_ENGINES=str(int(engines)), **sizes)
    fake_build.check(sys.executable, str(DEEP), *map(str, (layers, tokens // SCALE, width // SCALE)), environment=told)
    return folder


@dataclass
class Layer:
    """Seconds that a layer adds to a step, and of its products alone, each with K whole."""

    seconds: float
    alone: float

    @property
    def share(self) -> float:
        return self.alone / self.seconds


def layer(package: Path, tokens: int, width: int) -> dict[str, dict[str, Layer]]:
    """Of stacks of Linear(width, width): by what carries messages, forward, backward and both."""
    m, n = tokens // (Q * DEPTH), width // Q
    y, dx, dw = (product_seconds(*sizes, False, 2) for sizes in ((m, n, width), (m, width, n), (width, n, m)))
    parts = {
        "forward": (("step 3", "backward 3"), [y]),
        "backward": (("backward 3", "step 4"), [dx, dw]),
        "both": (("step 3", "step 4"), [y, dx, dw]),
    }
    found: dict[str, dict[str, Layer]] = {}
    with tempfile.TemporaryDirectory() as room:
        for carrier, lent in CARRIERS.items():
            shallow, deep = (record(package, Path(room) / carrier / str(n), n, tokens, width, carrier != "NCCL") for n in DEPTHS)
            found[carrier] = {}
            for part, (marks, products) in parts.items():
                one, other = (seconds(folder, SCALE, lent, marks) for folder in (shallow, deep))
                found[carrier][part] = Layer((other - one) / (DEPTHS[1] - DEPTHS[0]), sum(products))
    return found


def main() -> None:
    package = fake_build.build("cpu", binding=True)
    print("| tokens x in x out | messages by | pass | products alone | a layer | of the products alone |")
    print("|---|---|---|---|---|---|")
    for tokens, width in SHAPES:
        for carrier, parts in layer(package, tokens, width).items():
            for part, found in parts.items():
                figures = f"{found.alone * 1e3:.2f} ms | {found.seconds * 1e3:.2f} ms | {found.share:.0%}"
                print(f"| {tokens} x {width} x {width} | {carrier} | {part} | {figures} |")


if __name__ == "__main__":
    main()
