"""Mode "sequence": GPT-2 and Llama whose sequences are cut, attention a ring, with one process's loss and gradients."""

from typing import Any

import pytest
import torch

import families
import gingham


def converted(rank: int, family: str, size: int, source: str) -> Any:
    mesh = gingham.init("sequence", size=size, source=source)
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
