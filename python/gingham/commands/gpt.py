"""The GPT that `python -m gingham train` trains, written once over a kit of layers, and the text it reads.

The two kits build the same modules in the same order under the same names: `parallel_kit` from gingham.nn on a mesh,
`serial_kit` from torch.nn. After the same torch.manual_seed both hold the same weights and draw the same dropout masks.
"""

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from .. import nn
from ..nn.sequence import first_of_piece

VOCABULARY = 256  # a token is a byte


@dataclass(frozen=True)
class Shape:
    layers: int = 4
    width: int = 256
    heads: int = 8
    context: int = 128
    dropout: float = 0.1


@dataclass(frozen=True)
class Kit:
    """Constructors; attention is called with (width, heads), mlp with (width, hidden)."""

    embedding: Callable[[int, int], torch.nn.Module]
    norm: Callable[[int], torch.nn.Module]
    attention: Callable[[int, int], torch.nn.Module]
    mlp: Callable[[int, int], torch.nn.Module]
    head: Callable[[int, int], torch.nn.Module]
    dropout: Callable[[float], torch.nn.Module]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    first: Callable[[int], int] = lambda time: 0  # the position of the first of so many tokens


class Block(torch.nn.Module):
    def __init__(self, kit: Kit, shape: Shape) -> None:
        super().__init__()
        self.norm1 = kit.norm(shape.width)
        self.attention = kit.attention(shape.width, shape.heads)
        self.dropout1 = kit.dropout(shape.dropout)
        self.norm2 = kit.norm(shape.width)
        self.mlp = kit.mlp(shape.width, 4 * shape.width)
        self.dropout2 = kit.dropout(shape.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout1(self.attention(self.norm1(x)))
        return x + self.dropout2(self.mlp(self.norm2(x)))


class GPT(torch.nn.Module):
    """ids [batch, time] -> logits [batch, time, VOCABULARY]; with the parallel kit both are this rank's blocks."""

    cuts_sequences = True  # positions begin at those of this rank's piece

    def __init__(self, kit: Kit, shape: Shape) -> None:
        super().__init__()
        self.token = kit.embedding(VOCABULARY, shape.width)
        self.position = kit.embedding(shape.context, shape.width)
        self.dropout = kit.dropout(shape.dropout)
        self.blocks = torch.nn.ModuleList([Block(kit, shape) for _ in range(shape.layers)])
        self.norm = kit.norm(shape.width)
        self.head = kit.head(shape.width, VOCABULARY)
        self.loss, self.first = kit.loss, kit.first

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = ids
        for run, _ in self.in_a_row():
            x = run(x)
        return x

    def in_a_row(self) -> list[tuple[Callable[[torch.Tensor], torch.Tensor], list[torch.nn.Module]]]:
        """The forward pass as functions that gingham.pipeline may put in stages, each with the modules that it uses."""
        first = (self._embed, [self.token, self.position, self.dropout])
        return [first, *((block, [block]) for block in self.blocks), (self.norm, [self.norm]), (self.head, [self.head])]

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        first = self.first(ids.shape[1])
        positions = torch.arange(first, first + ids.shape[1], device=ids.device).expand_as(ids)
        return self.dropout(self.token(ids) + self.position(positions))


class SerialAttention(torch.nn.Module):
    causal = True

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (torch.nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class SerialMLP(torch.nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def serial_kit() -> Kit:
    return Kit(
        embedding=torch.nn.Embedding,
        norm=torch.nn.LayerNorm,
        attention=SerialAttention,
        mlp=SerialMLP,
        head=torch.nn.Linear,
        dropout=nn.Dropout,
        loss=lambda logits, target: F.cross_entropy(logits.flatten(0, 1), target.flatten()),
    )


def parallel_kit(mesh: Any) -> Kit:
    return Kit(
        embedding=lambda count, width: nn.Embedding(count, width, mesh=mesh),
        norm=lambda width: nn.LayerNorm(width, mesh=mesh),
        attention=lambda width, heads: nn.SelfAttention(width, heads, causal=True, swapped="auto", mesh=mesh),
        mlp=lambda width, hidden: nn.MLP(width, hidden, swapped="auto", mesh=mesh),
        head=lambda width, count: nn.Linear(width, count, layout="outer->inner", swapped="auto", mesh=mesh),
        dropout=lambda p: nn.Dropout(p, mesh=mesh),
        loss=lambda logits, target: nn.cross_entropy(logits, target, mesh=mesh, layout="inner"),
        first=partial(first_of_piece, mesh),
    )


def read_text(source: str | None, limit: int = 8 << 20) -> torch.Tensor:
    """Bytes of a file, or of a folder's files in sorted order, as uint8; by default Python's own standard library."""
    root = Path(source) if source else Path(sysconfig.get_path("stdlib"))
    if not root.exists():
        raise FileNotFoundError(f"text: {root} does not exist; give a file or a folder")
    skipped = set() if source else {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    pattern = "*" if source else "*.py"
    files = [root] if root.is_file() else sorted(p for p in root.rglob(pattern) if not skipped & set(p.parts[:-1]))
    text = bytearray()
    for path in files:
        if path.is_file():
            text += path.read_bytes()
        if len(text) >= limit:
            break
    if not text:
        raise ValueError(f"text: {root} holds no bytes to train on")
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


def batches(text: torch.Tensor, batch: int, context: int, seed: int) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """step -> (ids, targets), each [batch, context]: a function of the step's number, so that every rank draws the same."""
    if len(text) < context + 2:
        raise ValueError(f"text: {len(text)} bytes are fewer than one sample of {context} + 1 tokens needs")

    def draw(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(text) - context, (batch, 1), generator=generator, device="cpu")
        tokens = text[starts + torch.arange(context + 1, device="cpu")].long()
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return draw
