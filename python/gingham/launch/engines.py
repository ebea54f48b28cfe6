"""Which engine moves bytes between hosts: UCX where a library of it is found, else torch's Gloo, which is always there."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .. import native
from ..errors import MeshError
from .gloo import GlooEngine, gloo_backend

ENGINES = ("ucx", "gloo")


@dataclass(frozen=True)
class Choice:
    """The engine's name, and why it is this one: for people, and for all ranks to compare."""

    name: str
    why: str
    ucx_version: str = ""

    def words(self) -> str:
        """On which all ranks must agree."""
        return f", engine {self.name}{' ' + self.ucx_version if self.ucx_version else ''}"


class UcxEngine:
    """`engine`, of the core, over UCX; as GlooEngine for those who open and close it."""

    def __init__(self, rank: int, settings: Mapping[str, str]) -> None:
        self.engine = native.ucx_engine(rank, dict(settings))

    def close(self, seconds: float = 5.0) -> None:
        """Tells all peers, waits at most `seconds` until they have heard it, and frees everything."""
        self.engine.close(seconds)


def find_ucx() -> dict[str, Any]:
    """Tells the core where the libucx wheel keeps its libraries, and returns what it found: found, version, from."""
    wheel = importlib.util.find_spec("libucx")
    for folder in (wheel.submodule_search_locations or ()) if wheel else ():
        native.set_ucx_path(str(Path(folder) / "lib"))
    return native.ucx_report()


def choose_engine() -> Choice:
    """The engine of this process: GINGHAM_ENGINE=ucx|gloo insists; without it UCX where it is found, else Gloo.

    Raises MeshError where GINGHAM_ENGINE is another word, or insists on a UCX that is not found (what was tried is named),
    or where GINGHAM_UCX names a library that does not load.
    """
    wanted = os.environ.get("GINGHAM_ENGINE", "")
    if wanted not in ("", *ENGINES):
        raise MeshError(f"GINGHAM_ENGINE={wanted!r}: expected 'ucx' or 'gloo', or nothing: UCX where it is found, else Gloo")
    if wanted == "gloo":
        return Choice("gloo", "GINGHAM_ENGINE=gloo")
    ucx = find_ucx()
    if ucx["found"]:
        version = ".".join(map(str, (ucx["version"] // 10000, ucx["version"] // 100 % 100, ucx["version"] % 100)))
        return Choice("ucx", f"UCX {version} from {ucx['from']}", version)
    if wanted or "GINGHAM_UCX" in os.environ:
        raise MeshError(f"{'GINGHAM_ENGINE=ucx' if wanted else 'GINGHAM_UCX'}: UCX {ucx['from']}")
    return Choice("gloo", f"UCX {ucx['from']}")


def engine_report() -> dict[str, str]:
    """What `doctor` says of engines: engine and why, or error; never raises."""
    try:
        choice = choose_engine()
    except MeshError as error:
        return {"engine": "", "error": str(error)}
    return {"engine": choice.name, "why": choice.why, "error": ""}


def open_engine(
    name: str, rank: int, ranks: Sequence[int], store: dist.Store, timeout: float, interface: str = ""
) -> UcxEngine | GlooEngine:
    """Opens the engine of `rank` and connects it to the other `ranks` of the job, which all open the same one.

    store: a store of these ranks whose keys nothing else uses, nor an earlier engine has. timeout: seconds for all to
    connect. interface: the one to use, for example "eth0"; "" lets UCX choose, and Gloo take GLOO_SOCKET_IFNAME.
    Raises MeshError naming the ranks that cannot be reached, what was tried and what to do.
    """
    if name == "gloo":
        return GlooEngine(rank, ranks, *gloo_backend(rank, ranks, store, timeout, interface))
    if name != "ucx":
        raise MeshError(f"engine {name!r}: expected 'ucx' or 'gloo'")
    find_ucx()
    opened = UcxEngine(rank, {"NET_DEVICES": interface} if interface else {})
    store.set(f"address{rank}", opened.engine.address.hex())
    keys = {peer: f"address{peer}" for peer in ranks if peer != rank}
    try:
        store.wait(list(keys.values()), timedelta(seconds=timeout))
    except dist.DistError as error:
        silent = [peer for peer, key in keys.items() if not store.check([key])]
        raise MeshError(f"rank {rank}: ranks {silent} have not opened their UCX engine within {timeout:g} s") from error
    addresses = {peer: bytes.fromhex(store.get(key).decode()) for peer, key in keys.items()}
    opened.engine.connect(addresses, timeout)
    return opened
