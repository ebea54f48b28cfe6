"""Small models of the four families of transformers, their batches, and a converted model beside its original.

`beside(mesh, family)` runs one step of both in the same process: relative errors of loss, logits and every gradient.
"""

import copy
from typing import Any

import torch

from grids import relative, whole

FAMILIES = ("gpt2", "llama", "bert", "vit")
VOCABULARY, LAYERS, TIME, BATCH = 61, 2, 12, 6


class Around(torch.nn.Module):
    """A wrapper that does nothing."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def build(family: str, dropout: float = 0.0, width: int = 32, heads: int = 8, kv_heads: int = 4, **changed: Any) -> Any:
    """The model after torch.manual_seed(5), from a configuration alone: nothing is downloaded."""
    import transformers as hf

    torch.manual_seed(5)
    sizes: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=LAYERS, num_attention_heads=heads)
    if family == "gpt2":
        drops = dict(attn_pdrop=dropout, embd_pdrop=dropout, resid_pdrop=dropout)
        ends = dict(bos_token_id=0, eos_token_id=0)
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=VOCABULARY, n_embd=width, n_layer=LAYERS, n_head=heads, n_positions=32, **drops, **ends, **changed)
        )
    if family == "llama":
        rest = dict(intermediate_size=3 * width, num_key_value_heads=kv_heads, attention_dropout=dropout, max_position_embeddings=64)
        return hf.LlamaForCausalLM(hf.LlamaConfig(**(sizes | rest | dict(bos_token_id=0, eos_token_id=0, pad_token_id=1) | changed)))
    rest = dict(intermediate_size=2 * width, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    if family == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(**(sizes | rest | dict(max_position_embeddings=32) | changed)))
    sizes.pop("vocab_size")
    return hf.ViTForImageClassification(
        hf.ViTConfig(**(sizes | rest | dict(image_size=8, patch_size=2, num_channels=3, num_labels=10) | changed))
    )


def batch(family: str, seed: int = 7, rows: int = BATCH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        images = torch.randn(rows, 3, 8, 8, generator=generator)
        return dict(pixel_values=images, labels=torch.randint(10, (rows,), generator=generator))
    ids = torch.randint(2, VOCABULARY, (rows, TIME), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    labels = (
        torch.where(torch.rand(ids.shape, generator=generator) < 0.3, ids, -100) if family == "bert" else ids.masked_fill(mask == 0, -100)
    )
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def plain(model: torch.nn.Module, gradients: bool = True) -> dict[str, torch.Tensor]:
    """Full gradients (or weights) by the original's names: parts of a joined weight side by side."""
    found = {
        name: whole(parameter.grad if gradients else parameter.detach())
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not gradients or parameter.grad is not None
    }
    for path, module in model.named_modules():
        for name, (parts, dim) in getattr(module, "joins", {}).items():
            keys = [f"{path}.{part}".lstrip(".") for part in parts]
            if all(key in found for key in keys):
                found[f"{path}.{name}".lstrip(".")] = torch.cat([found.pop(key) for key in keys], dim)
    return found


def errors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative, by name; a key's bias, whose true gradient is 0, against the query's."""
    assert got.keys() == expected.keys(), sorted(got.keys() ^ expected.keys())
    found = {}
    for name, truth in expected.items():
        against = name.replace("key.bias", "query.bias").replace("k_proj.bias", "q_proj.bias")
        if against != name:
            found[name] = float((got[name] - truth).norm() / expected[against].norm())
        else:
            found[name] = relative(got[name], truth)
    return found


def joint_error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all gradients as one vector: for losses under which some are 0 in truth."""
    difference, norm = (
        sum(float(part.double().square().sum()) for part in parts)
        for parts in ([got[name] - truth for name, truth in expected.items()], expected.values())
    )
    assert got.keys() == expected.keys()
    return (difference / norm) ** 0.5


def beside(mesh: Any, family: str, verbose: bool = False, **changed: Any) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """Errors of the loss, the logits and every gradient; and what the plan says stayed serial, with the reasons."""
    import gingham

    original = build(family, **changed)
    inputs = batch(family)
    model = gingham.parallelize(copy.deepcopy(original), mesh, verbose=verbose)
    mine, theirs = plain(model, gradients=False), plain(original, gradients=False)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    expected = original(**inputs)
    expected.loss.backward()
    got = model(**inputs)
    got.loss.backward()
    found = errors(plain(model), plain(original))
    errors_of = {"loss": relative(got.loss, expected.loss), "logits": relative(got.logits, expected.logits), **found}
    return errors_of, [(line.path, line.reason) for line in model.gingham_plan if line.reason]


def curve(model: torch.nn.Module, family: str, steps: int, lr: float = 3e-4) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    losses = []
    for step in range(steps):
        loss = model(**batch(family, seed=step % 5)).loss  # five batches, so that all of them can be learned
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
