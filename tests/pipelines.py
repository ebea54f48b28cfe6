"""The models and batches of the tests of pipelines."""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from gingham import nn
from gingham.commands.gpt import GPT, Block, Shape, parallel_kit, serial_kit

SHAPE = dict(layers=4, width=32, heads=4, context=8, dropout=0.1)


def sample(batch: int, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(256, (batch, SHAPE["context"] + 1), generator=torch.Generator().manual_seed(step))
    targets = tokens[:, 1:].contiguous()
    targets[: batch // 3] = -100  # micro-batches have unequal numbers of valid tokens
    return tokens[:, :-1].contiguous(), targets


def gpt(mesh: Any, dtype: torch.dtype) -> Any:
    torch.manual_seed(3)
    return GPT(serial_kit() if mesh is None else parallel_kit(mesh), Shape(**SHAPE)).to(dtype)


def sequential(linear: Any) -> Any:
    torch.manual_seed(1)
    return torch.nn.Sequential(linear(8, 16, dtype=torch.float64), torch.nn.GELU(), linear(16, 4, dtype=torch.float64))


class Tied(torch.nn.Module):
    """Ids -> logits by the table that read them; blocks are recomputed."""

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        kit = serial_kit() if mesh is None else parallel_kit(mesh)
        self.table = kit.embedding(64, 32)
        self.blocks = torch.nn.ModuleList([Block(kit, Shape(**SHAPE)) for _ in range(4)])
        self.head: Any = (
            torch.nn.Linear(32, 64, bias=False) if mesh is None else nn.Classifier(32, 64, mesh=mesh, tied=self.table, bias=False)
        )
        self.head.weight = self.table.weight

    def in_a_row(self) -> Any:
        def recomputed(block: Any) -> Any:
            return lambda x: checkpoint(block, x, use_reentrant=False) if self.training else block(x)

        return [(self.table, [self.table]), *((recomputed(block), [block]) for block in self.blocks), (self.head, [self.head])]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for run, _ in self.in_a_row():
            x = run(x)
        return x


def tied(mesh: Any, dtype: torch.dtype) -> Any:
    torch.manual_seed(3)
    return Tied(mesh).to(dtype)


class Ringed(torch.nn.Module):
    """Ids [batch, time] whose time the row ranks cut: attention over it and MLPs, with residuals."""

    def __init__(self, way: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(3)
        options: dict[str, Any] = dict(dtype=torch.float64)
        self.table = nn.Embedding(64, 16, **options)
        self.norms = torch.nn.ModuleList([nn.LayerNorm(16, **options) for _ in range(3)])
        self.blocks = torch.nn.ModuleList([nn.SelfAttention(16, 4, dim=1, rotary=1e3, dropout=0.2, **way, **options) for _ in range(3)])
        self.head = nn.Linear(16, 64, **options)

    def in_a_row(self) -> Any:
        def run(norm: Any, block: Any) -> Any:
            return lambda x: x + block(norm(x))

        layers = ((run(*pair), list(pair)) for pair in zip(self.norms, self.blocks, strict=True))
        return [(self.table, [self.table]), *layers, (self.head, [self.head])]


def original(name: str) -> Any:
    """A small model of transformers of float64, without dropout, of 4 layers."""
    import transformers

    torch.manual_seed(0)
    common = dict(vocab_size=64, bos_token_id=0, eos_token_id=0)
    if name == "gpt2":
        dropout = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=16, **common, **dropout)
        ).double()
    if name.startswith("Bert"):
        drops = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=16, num_labels=5)
        config = transformers.BertConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, **drops, **common
        )
        return getattr(transformers, name)(config).double()
    if name == "vit":
        sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=2)
        return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=5)).double()
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, max_position_embeddings=16, **common)).double()
