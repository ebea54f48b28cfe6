"""Mode "sequence": GPT-2 and Llama whose sequences are cut, attention a ring, with one process's loss and gradients."""

from typing import Any

import pytest
import torch

import families
import gingham


def converted(rank: int, family: str, size: int, source: str, attention: str | None = None) -> Any:
    mesh = gingham.init(parallel=dict(tensor=dict(size=size, mode="sequence", attention=attention)), source=source)
    mesh.traffic(reset=True)
    errors, serial = families.beside(mesh, family, **({"kv_heads": 2} if family == "llama" else {}))
    bytes_ = mesh.traffic(reset=True)["m"]["bytes_received"]
    model = gingham.parallelize(families.build(family), mesh)
    ids = families.batch(family)["input_ids"]
    unmasked, expected = model(ids).logits, families.build(family)(ids).logits
    uneven = model(ids[:, :11]).logits, families.build(family)(ids[:, :11]).logits
    errors["11 places"] = families.relative(*uneven)
    embedded = model(inputs_embeds=families.build(family).get_input_embeddings()(ids).detach()).logits
    errors["no mask"] = families.relative(unmasked, expected)
    errors["embedded"] = families.relative(embedded, expected)
    mask = torch.rand(len(ids), 1, families.TIME, families.TIME, generator=torch.Generator().manual_seed(1)) > 0.5
    mask |= torch.eye(families.TIME, dtype=torch.bool)
    masked = model(ids, attention_mask=mask).logits, families.build(family)(ids, attention_mask=mask).logits
    errors["mask of 4 dims"] = families.relative(*masked)
    return errors, serial, bytes_


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("size", "source"), [(2, "window"), *(pytest.param(*each, marks=pytest.mark.matrix) for each in ((3, "ring"), (4, "ring")))]
)
def test_loss_and_gradients_are_one_processs(ranks, family: str, size: int, source: str) -> None:
    for errors, serial, received in ranks(size)(converted, family, size, source):
        assert not serial and received > 0
        assert max(errors.values()) <= 2e-6, {name: error for name, error in errors.items() if error > 2e-6}


@pytest.mark.parametrize("attention", ["heads", *(pytest.param(each, marks=pytest.mark.matrix) for each in ("gathered", "auto"))])
@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.matrix)])
def test_loss_and_gradients_by_the_other_ways(ranks, family: str, attention: str) -> None:
    for errors, serial, received in ranks(2)(converted, family, 2, "window", attention):
        assert not serial and received > 0
        assert max(errors.values()) <= 2e-6, {name: error for name, error in errors.items() if error > 2e-6}


def ways(rank: int) -> list[Any]:
    found: list[Any] = []
    for attention, kv_heads in (("auto", 8), ("auto", 1), (None, 8), ("heads", 1)):
        mesh = gingham.init("sequence", size=2, attention=attention, source="ring")
        try:
            model = gingham.parallelize(families.build("llama", kv_heads=kv_heads), mesh)
            found.append({module.sequence_way for module in model.modules() if hasattr(module, "sequence_way")})
        except gingham.ShapeError as error:
            found.append(str(error))
        gingham.destroy()
    with pytest.raises(gingham.MeshError) as other:
        gingham.init("2d", size=4, attention="heads")
    return [*found, str(other.value)]


def test_the_way_is_told_and_too_few_heads_are_refused(ranks) -> None:
    for many, one, default, few, other in ranks(2)(ways):
        assert (many, one, default) == ({"heads"}, {"gathered"}, {"ring"})
        assert "1 heads of keys and values" in few and "LlamaAttention" in few
        assert "belongs to mode 'sequence'" in other


def refusals(rank: int) -> list[str]:
    mesh = gingham.init("sequence", size=2)
    found = []
    for family in ("bert", "vit"):
        with pytest.raises(NotImplementedError) as refused:
            gingham.parallelize(families.build(family), mesh)
        found.append(str(refused.value))
    model = gingham.parallelize(families.build("llama"), mesh)
    with pytest.raises(gingham.ShapeError) as short:
        model(torch.ones(2, 1, dtype=torch.int64))
    with pytest.raises(NotImplementedError) as packed:
        model(torch.ones(1, 8, dtype=torch.int64), position_ids=torch.tensor([[0, 1, 0, 1, 2, 3, 0, 1]]), use_cache=False)
    return [*found, str(short.value), str(packed.value)]


def test_what_has_no_form_is_refused_by_name(ranks) -> None:
    for bert, vit, short, packed in ranks(2)(refusals):
        assert "BertForMaskedLM" in bert and "ViTForImageClassification" in vit
        assert "1 places on 2 ranks" in short and "packed" in packed
