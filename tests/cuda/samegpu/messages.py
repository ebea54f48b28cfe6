"""Processes that send each other messages through the same-GPU stand-in for NCCL, without gingham: on a real GPU, or on a fake one
(FAKE_CUDA_LIBRARY names the fake runtime). Prints what went wrong, as JSON: [] for nothing, else its status is 1.

python messages.py LIBRARY exchange | mismatch | abort | again | old driver
"""

import ctypes
import json
import multiprocessing
import os
import random
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

RANKS, ROUNDS, LIVES = 3, 6, 4
PIECE = 1 << 20
SIZES = [0, 1, 4097, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5, 5 * PIECE]
INT8 = 0


class Id(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * 128)]


class Refused(RuntimeError):
    pass


class Gpu:
    """A stream, and memory: torch's on a real GPU, the host's on a fake one."""

    def __init__(self) -> None:
        fake = os.environ.get("FAKE_CUDA_LIBRARY")
        self.device = torch.device("cpu" if fake else "cuda")
        self.stream = ctypes.c_void_p()
        if fake:
            self.runtime = ctypes.CDLL(fake)
            self.runtime.cudaStreamCreateWithFlags(ctypes.byref(self.stream), 1)
        else:
            self.torch_stream = torch.cuda.Stream()
            self.stream = ctypes.c_void_p(self.torch_stream.cuda_stream)

    def idle(self) -> bool:
        if self.device.type == "cuda":
            return self.torch_stream.query()
        event = ctypes.c_void_p()
        self.runtime.cudaEventCreateWithFlags(ctypes.byref(event), 2)
        self.runtime.cudaEventRecord(event, self.stream)
        time.sleep(0.01)
        return bool(self.runtime.cudaEventQuery(event) == 0)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            self.torch_stream.synchronize()
        else:
            self.runtime.cudaStreamSynchronize(self.stream)


class World:
    def __init__(self, library: str, rank: int, size: int, pipe: Connection | None) -> None:
        self.rank, self.gpu, self.nccl = rank, Gpu(), ctypes.CDLL(library)
        self.nccl.ncclGetErrorString.restype = ctypes.c_char_p
        self.nccl.ncclCommInitRank.argtypes = [ctypes.c_void_p, ctypes.c_int, Id, ctypes.c_int]
        for call in (self.nccl.ncclSend, self.nccl.ncclRecv):
            call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        unique = Id()
        if rank == 0:
            self.check(self.nccl.ncclGetUniqueId(ctypes.byref(unique)))
            if pipe:
                pipe.send(bytes(unique))
        if pipe:
            unique = Id.from_buffer_copy(pipe.recv())
        self.world, self.line = ctypes.c_void_p(), ctypes.c_void_p()
        self.check(self.nccl.ncclCommInitRank(ctypes.byref(self.world), size, unique, rank))
        # a split that turns the order round: rank r is number size - 1 - r in it
        self.check(self.nccl.ncclCommSplit(self.world, 0, size - rank, ctypes.byref(self.line), None))

    def check(self, status: int) -> None:
        if status:
            raise Refused(f"{status}: {self.nccl.ncclGetErrorString(status).decode()}")

    def send(self, data: torch.Tensor, peer: int) -> None:
        self.check(self.nccl.ncclSend(data.data_ptr(), data.numel(), INT8, RANKS - 1 - peer, self.line, self.gpu.stream))

    def recv(self, data: torch.Tensor, peer: int) -> None:
        self.check(self.nccl.ncclRecv(data.data_ptr(), data.numel(), INT8, RANKS - 1 - peer, self.line, self.gpu.stream))

    def error(self) -> str:
        status = ctypes.c_int()
        self.nccl.ncclCommGetAsyncError(self.line, ctypes.byref(status))
        return self.nccl.ncclGetErrorString(status).decode() if status.value else ""

    def destroy(self) -> None:
        """The line's communicator while messages are under way, which must not wait for them; the memory is given back later."""
        self.check(self.nccl.ncclCommDestroy(self.line))
        self.gpu.synchronize()
        self.check(self.nccl.ncclCommDestroy(self.world))


def content(number: int, source: int, to: int, size: int, device: torch.device) -> torch.Tensor:
    start = 7 * number + 31 * source + 101 * to
    return ((torch.arange(size, device=device) * 2654435761 + start) >> 7).to(torch.int8)


def exchange(world: World, rounds: int = ROUNDS) -> list[str]:
    """Groups of two messages for every pair of ranks, the next queued before the last has ended."""
    draw, kept = random.Random(1), []
    for number in range(rounds):
        sizes = {(a, b, i): draw.choice(SIZES) for a in range(RANKS) for b in range(RANKS) for i in range(2)}
        sent, received = [], []
        for (source, to, i), size in sizes.items():
            data = content(2 * number + i, source, to, size, world.gpu.device)
            if source == world.rank:
                sent.append((data, to))
            if to == world.rank:
                received.append((torch.full_like(data, -1), data, source))
        if world.gpu.device.type == "cuda":
            torch.cuda.synchronize()  # torch's stream has made them; of the communication stream is nothing waited for
        world.nccl.ncclGroupStart()
        for into, _, source in received:
            world.recv(into, source)
        for data, to in sent:
            world.send(data, to)
        world.check(world.nccl.ncclGroupEnd())
        kept.append((number, sent, received))
    world.destroy()
    return [
        f"rank {world.rank} round {number}: {into.numel()} bytes from {source} differ"
        for number, _, received in kept
        for into, expected, source in received
        if not torch.equal(into, expected)
    ]


def wait_for_error(world: World) -> str:
    end = time.monotonic() + 10
    while not world.error() and time.monotonic() < end:
        time.sleep(0.01)
    return world.error()


def ends_soon(world: World) -> list[str]:
    """After an abort what is queued passes."""
    began = time.monotonic()
    world.check(world.nccl.ncclCommAbort(world.line))
    while not world.gpu.idle() and time.monotonic() - began < 5:
        time.sleep(0.01)
    took = time.monotonic() - began
    return [f"rank {world.rank}: the stream went on {took:.1f} s after the abort"] if took > 2 else []


def mismatch(world: World) -> list[str]:
    """Rank 0 sends 4096 bytes to rank 1, who expects 100; the third has nothing to do with it. Both hear of it."""
    data = torch.zeros(4096 if world.rank == 0 else 100, dtype=torch.int8, device=world.gpu.device)
    said = ""
    try:
        if world.rank == 0:
            world.send(data, 1)
        if world.rank == 1:
            world.recv(data, 0)
    except Refused as refused:
        said = str(refused)
    wrong = []
    expected = "message 0 from rank 0 to rank 1 is sent with 4096 bytes and received with 100"
    for words in [wait_for_error(world), said] if said else [wait_for_error(world)]:
        if expected not in words:
            wrong.append(f"rank {world.rank} was told {words!r}")
    return wrong + ends_soon(world)


def abort(world: World) -> list[str]:
    """Rank 0 waits for messages that never come behind one that does, and rank 2 for one of its own to be taken: both are let go by
    their own abort alone. Rank 1 sends, aborts nothing and writes its counter whenever it comes to it."""
    data = torch.zeros(3 * PIECE, dtype=torch.int8, device=world.gpu.device)
    if world.rank == 0:
        for _ in range(5):
            world.recv(data, 1)
    if world.rank == 1:
        world.send(data, 0)
        world.gpu.synchronize()
    if world.rank == 2:
        world.send(data, 1)
    time.sleep(0.3)
    return ends_soon(world) if world.rank != 1 else []


def leftovers() -> tuple[int, int, list[str]]:
    """Open files, mappings of the stand-in's memory, and what lies in /dev/shm."""
    mapped = Path("/proc/self/maps").read_text().count("nccl stand-in")
    return len(list(Path("/proc/self/fd").iterdir())), mapped, sorted(os.listdir("/dev/shm"))


def serve(library: str, mode: str, rank: int, pipe: Connection) -> None:
    wrong: list[str] = []
    kept: list[Any] = []
    try:
        for life in range(LIVES if mode == "again" else 1):
            world = World(library, rank, RANKS, pipe)
            wrong += {"exchange": exchange, "mismatch": mismatch, "abort": abort, "again": lambda w: exchange(w, 1)}[mode](world)
            if mode in ("exchange", "again"):
                pipe.send(None)  # all have destroyed theirs
                pipe.recv()
                kept.append(leftovers())
                if kept[-1][1] or kept[-1] != kept[0]:
                    wrong.append(f"rank {rank} life {life}: files, mappings and /dev/shm {kept[-1]}, at first {kept[0]}")
    except Exception as error:
        wrong.append(f"rank {rank}: {type(error).__name__}: {error}")
    pipe.send(wrong)
    pipe.recv()  # until all have said theirs: who ends frees what others may wait for
    os._exit(0)


def relay(pipes: list[Connection], processes: list[Any]) -> list[str]:
    """Hands the id of rank 0 to all and lets them meet, until each has said what is wrong."""
    waiting, wrong = set(range(len(pipes))), []
    while waiting:
        for rank in sorted(waiting):
            if not pipes[rank].poll(0.01):
                if not processes[rank].is_alive() and not pipes[rank].poll(0):
                    raise RuntimeError(f"rank {rank} died: {processes[rank].exitcode}")
                continue
            message = pipes[rank].recv()
            if isinstance(message, list):
                wrong += message
                waiting.discard(rank)
            elif message is None:
                for other in range(len(pipes)):
                    if other != rank:
                        assert pipes[other].recv() is None
                for pipe in pipes:
                    pipe.send(None)
            else:
                for pipe in pipes:
                    pipe.send(message)
    for pipe in pipes:
        pipe.send(None)
    return wrong


def main() -> list[str]:
    library, mode = sys.argv[1], sys.argv[2]
    if mode == "old driver":
        try:
            World(library, 0, 1, None)
        except Refused as refused:
            return [str(refused)]
        return ["an old driver was taken"]
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(RANKS)]
    processes = [context.Process(target=serve, args=(library, mode, rank, pairs[rank][1]), daemon=True) for rank in range(RANKS)]
    for process in processes:
        process.start()
    try:
        return relay([ours for ours, _ in pairs], processes)
    finally:
        for process in processes:
            process.join(5)
            process.kill()


if __name__ == "__main__":
    began = time.monotonic()
    found = main()
    print(f"{sys.argv[2]}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    print(json.dumps(found))
    sys.exit(1 if found else 0)
