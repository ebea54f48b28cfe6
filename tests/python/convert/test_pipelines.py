"""Pipelines of converted models: the loss and gradients that the original gives on the whole batch, and its checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch

import gingham
from grids import whole
from pipelines import original

BATCH = (32, 12)


def batch(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(64, BATCH, generator=generator)
    if name in ("vit", "BertForSequenceClassification"):
        images = torch.randn(BATCH[0], 3, 8, 8, generator=generator).double()
        return images if name == "vit" else ids, torch.randint(5, BATCH[:1], generator=generator)
    labels = ids % 5 if name == "BertForTokenClassification" else ids.clone()
    labels[:3, :7] = -100
    return ids, labels


def run(rank: int, name: str, tensor: dict[str, Any], schedule: str, folder: str) -> Any:
    mesh = gingham.init(parallel=dict(pipeline=2, tensor=tensor), timeout=60.0)
    model = gingham.pipeline(gingham.parallelize(original(name), mesh), mesh, 4, schedule)
    ids, labels = batch(name)
    loss = model.step(ids, labels)
    grads = {key: whole(weight.grad).clone() for key, weight in model.named_parameters() if weight.grad is not None}
    norm = gingham.clip_grad_norm_(model.parameters(), 1.0)
    logits = model(ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.step()
    gingham.save(model, optimizer, folder)
    with pytest.raises(NotImplementedError, match="pipeline"):
        model.generate(ids)
    if mesh.outer.rows and mesh.outer.rows != mesh.outer.time:
        with pytest.raises(gingham.ShapeError, match="needs at least [248] rows in each"):
            model.step(ids[:4], labels[:4])
    return loss.item(), grads, norm.item(), logits


@pytest.mark.parametrize(
    ("name", "tensor", "schedule"),
    [
        ("gpt2", dict(size=2, mode="1d"), "zero_bubble"),
        ("llama", dict(size=2, mode="1d"), "1f1b"),
        ("BertForMaskedLM", dict(size=2, mode="sequence"), "1f1b"),
        ("vit", dict(size=2, mode="sequence"), "zero_bubble"),
        pytest.param("vit", dict(size=2, mode="1d"), "zbv", marks=pytest.mark.matrix),
        pytest.param("vit", dict(size=4, mode="2d"), "1f1b", marks=pytest.mark.matrix),
        pytest.param("BertForMaskedLM", dict(size=4, mode="2d"), "dual", marks=pytest.mark.matrix),
        pytest.param("BertForMaskedLM", dict(size=2, mode="1d"), "gpipe", marks=pytest.mark.matrix),
        pytest.param("BertForTokenClassification", dict(size=2, mode="sequence"), "interleaved", marks=pytest.mark.matrix),
        pytest.param("BertForSequenceClassification", dict(size=3, mode="sequence"), "1f1b", marks=pytest.mark.matrix),
        pytest.param("BertForSequenceClassification", dict(size=4, mode="2d"), "zero_bubble", marks=pytest.mark.matrix),
        pytest.param("gpt2", dict(size=2, mode="sequence", attention="heads"), "dual", marks=pytest.mark.matrix),
        pytest.param("llama", dict(size=3, mode="sequence"), "1f1b", marks=pytest.mark.matrix),
        pytest.param("gpt2", dict(size=4, mode="2d"), "dual", marks=pytest.mark.matrix),
        pytest.param("llama", dict(size=4, mode="2d"), "zbv", marks=pytest.mark.matrix),
        pytest.param("gpt2", dict(size=4, mode="2.5d", depth=4), "interleaved", marks=pytest.mark.matrix),
        pytest.param("llama", dict(size=1), "gpipe", marks=pytest.mark.matrix),
    ],
    ids=str,
)
@pytest.mark.parametrize("data", [1, pytest.param(2, marks=pytest.mark.matrix)])
def test_as_the_original(ranks, tmp_path: Path, name: str, tensor: dict[str, Any], schedule: str, data: int) -> None:
    answers = ranks(2 * data * tensor["size"])(run, name, tensor, schedule, str(tmp_path / "run"))
    model = original(name)
    ids, labels = batch(name)
    loss = model(ids, labels=labels).loss
    loss.backward()
    truth = {key: weight.grad.clone() for key, weight in model.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    logits = model(ids).logits.detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.step()
    for found, grads, clipped, outputs in answers:
        assert found == pytest.approx(loss.item(), rel=1e-6) and clipped == pytest.approx(norm.item(), rel=1e-6)
        assert float((outputs - logits).abs().max()) <= 1e-5
        for key in grads.keys() & truth.keys():
            assert float((grads[key] - truth[key]).norm()) <= 1e-5 * float(truth[key].norm().clamp_min(1e-6)), key
    assert sum(len(grads.keys() & truth.keys()) for _, grads, *_ in answers[:: tensor["size"]]) >= len(truth) * 2 // 3
    fresh = original(name)
    gingham.load(fresh, torch.optim.AdamW(fresh.parameters(), lr=1e-2), str(tmp_path / "run"))
    for (key, got), expected in zip(fresh.named_parameters(), model.parameters(), strict=True):
        if (
            "c_attn.bias" not in key and "key.bias" not in key and "k_proj.bias" not in key
        ):  # the key's part has no gradient but noise, of which AdamW makes whole steps
            assert float((got - expected).detach().abs().max()) <= 1e-4, key


def unknown(rank: int) -> None:
    mesh = gingham.init(parallel=dict(pipeline=2), timeout=60.0)
    with pytest.raises(NotImplementedError, match="BertForPreTraining.*GPT2LMHeadModel, LlamaForCausalLM"):
        gingham.pipeline(gingham.parallelize(original("BertForPreTraining"), mesh), mesh)
    model = gingham.pipeline(gingham.parallelize(original("vit"), mesh), mesh)
    with pytest.raises(gingham.ShapeError, match="expected 4 dims for a ViTForImageClassification"):
        model.step(*batch("gpt2"))


def test_other_families_are_refused_by_name(ranks) -> None:
    ranks(2)(unknown)
