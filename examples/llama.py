"""A small Llama of transformers' learns a text, byte by byte, and then writes: training and generate() as ever, on a mesh.

python examples/llama.py --mode 3d --steps 100       starts its own 8 ranks
torchrun --nproc-per-node 8 examples/llama.py        uses torchrun's
"""

from typing import Any

import torch
from launch import arguments, launch
from transformers import LlamaConfig, LlamaForCausalLM

import gingham
from gingham.commands.gpt import batches, read_text


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8)
    ends = dict(bos_token_id=0, eos_token_id=None, pad_token_id=0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=128, **sizes, **ends))


def train(model: Any, options: Any) -> tuple[list[float], str]:
    """Losses, and what the model writes after "def "."""
    draw = batches(read_text(options.text), 12, 48, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)
    losses = []
    for step in range(options.steps):
        ids, _ = draw(step)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    start = torch.tensor([list(b"def ")])
    written = model.eval().generate(start, attention_mask=torch.ones_like(start), max_new_tokens=options.write, do_sample=False)
    return losses, bytes(written[0].tolist()).decode(errors="replace")


def main(rank: int, options: Any, grid: dict[str, Any]) -> tuple[Any, Any]:
    """(losses, text) on the mesh, and on rank 0 those of the serial model."""
    mesh = gingham.init(**grid)
    losses, text = train(gingham.parallelize(build(), mesh), options)
    gingham.destroy()
    serial = train(build(), options) if rank == 0 else None
    if rank == 0:
        print(f"{mesh}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, serial {serial[0][-1]:.4f}\n{text!r}\n{serial[1]!r}")
    return (losses, text), serial


if __name__ == "__main__":
    parser = arguments(__doc__, steps=100)
    parser.add_argument("--text", help="a file or folder")
    parser.add_argument("--write", type=int, default=40, help="bytes to write at the end")
    launch(main, parser.parse_args())
