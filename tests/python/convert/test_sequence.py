"""Mode "sequence": GPT-2, Llama, BERT and ViT whose sequences are cut, attention a ring, with one process's loss and gradients."""

import copy
from typing import Any

import pytest
import torch

import families
import gingham


def converted(rank: int, family: str, size: int, source: str | None, attention: str | None = None) -> Any:
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
    for errors, serial, received in ranks(2)(converted, family, 2, None, attention):
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


def encoders(rank: int, family: str, size: int, source: str, attention: str | None) -> Any:
    mesh = gingham.init("sequence", size=size, source=source, attention=attention)
    mesh.traffic(reset=True)
    errors, serial = families.beside(mesh, family)
    received = mesh.traffic()["m"]["bytes_received"]
    if family == "vit":
        base = families.build(family).vit
        errors |= images(mesh, base)
    else:
        model, ids = families.build(family), families.batch(family)["input_ids"]
        mask = torch.rand(len(ids), 1, 7, 7, generator=torch.Generator().manual_seed(1)) > 0.5
        mask |= torch.eye(7, dtype=torch.bool)
        calls = (dict(input_ids=ids[:, :7]), dict(input_ids=ids[:, :7], attention_mask=mask))
        calls += (dict(input_ids=ids, token_type_ids=ids % 2, position_ids=torch.arange(ids.shape[1]).flip(0).unsqueeze(0)),)
        expected = [model(**call).logits for call in calls]
        model = gingham.parallelize(model, mesh)
        for index, (call, truth) in enumerate(zip(calls, expected, strict=True)):
            errors[f"call {index}"] = families.relative(model(**call).logits, truth)
    return errors, serial, received


def images(mesh: Any, base: Any) -> dict[str, float]:
    """The base of a ViT alone, at another size too, with a gradient for the images; mask of keys."""
    found = {}
    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(2))
    keys = torch.ones(2, 25, dtype=torch.int64)
    keys[1, 20:] = 0
    ours = gingham.parallelize(copy.deepcopy(base), mesh)
    for name, options in (("wide", {}), ("masked keys", dict(attention_mask=keys))):
        pair = []
        for model in (ours, base):
            leaf = x.clone().requires_grad_()
            y = model(leaf, interpolate_pos_encoding=True, **options).last_hidden_state
            y.pow(3).sum().backward()  # squares of a norm's outputs have no gradient to speak of
            pair.append((y.detach(), leaf.grad))
        found |= {f"{name} y": families.relative(pair[0][0], pair[1][0]), f"{name} dx": families.relative(pair[0][1], pair[1][1])}
    return found


MATRIX = [("bert", 3, "ring", None), ("vit", 4, "ring", "auto"), ("bert", 4, "window", "heads"), ("vit", 3, "window", "gathered")]


@pytest.mark.parametrize(
    ("family", "size", "source", "attention"),
    [("bert", 2, "window", None), ("vit", 2, "window", None), *(pytest.param(*each, marks=pytest.mark.matrix) for each in MATRIX)],
)
def test_encoders_are_one_processs(ranks, family: str, size: int, source: str, attention: str | None) -> None:
    """BERT and ViT, not causal; 17 places of class token and patches, which no number of ranks here divides."""
    for errors, serial, received in ranks(size)(encoders, family, size, source, attention):
        assert not serial and received > 0
        assert max(errors.values()) <= 2e-6, {name: error for name, error in errors.items() if error > 2e-6}


def headed(rank: int) -> dict[str, Any]:
    import heads

    mesh = gingham.init("sequence", size=3)
    return {name: heads.compared(mesh, name) for name in heads.cases("Bert")}


@pytest.mark.matrix
def test_heads_of_bert(ranks) -> None:
    """Those that read the first token have it on one rank; a decoder and what takes several choices are refused."""
    for found in ranks(3)(headed):
        refused = {name for name, errors in found.items() if isinstance(errors, str)}
        assert refused == {"BertLMHeadModel", "BertForMultipleChoice"}, found
        assert max(max(errors.values()) for errors in found.values() if not isinstance(errors, str)) <= 3e-6, found


def dropped(rank: int, family: str, size: int) -> Any:
    """Losses of two steps with dropout, and the logits."""
    mesh = gingham.init("sequence", size=size)
    model = gingham.parallelize(families.build(family, dropout=0.3), mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        output = model(**families.batch(family))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
    return losses


@pytest.mark.parametrize("family", [pytest.param(each, marks=[pytest.mark.matrix] if each != "vit" else []) for each in families.FAMILIES])
def test_dropout_is_that_of_one_rank(ranks, family: str) -> None:
    assert ranks(3)(dropped, family, 3)[0] == pytest.approx(ranks(1)(dropped, family, 1)[0], rel=1e-5)


def refusals(rank: int) -> list[str]:
    mesh = gingham.init("sequence", size=2)
    found = []
    import transformers as hf

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    config = hf.BertConfig(vocab_size=96, is_decoder=True, **sizes)
    choices = hf.BertForMultipleChoice(hf.BertConfig(vocab_size=96, **sizes))
    for model in (hf.BertModel(config), hf.ViTForMaskedImageModeling(hf.ViTConfig(image_size=8, patch_size=2, **sizes)), choices):
        with pytest.raises(NotImplementedError) as refused:
            gingham.parallelize(model, mesh)
        found.append(str(refused.value))
    model = gingham.parallelize(families.build("llama"), mesh)
    with pytest.raises(gingham.ShapeError) as short:
        model(torch.ones(2, 1, dtype=torch.int64))
    with pytest.raises(NotImplementedError) as packed:
        model(torch.ones(1, 8, dtype=torch.int64), position_ids=torch.tensor([[0, 1, 0, 1, 2, 3, 0, 1]]), use_cache=False)
    return [*found, str(short.value), str(packed.value)]


def test_what_has_no_form_is_refused_by_name(ranks) -> None:
    for bert, vit, choices, short, packed in ranks(2)(refusals):
        assert "BertForMultipleChoice" in choices and "next sentences" in choices and "choices" not in choices
        assert "BERT as a decoder" in bert and "ViTForMaskedImageModeling" in vit
        assert "1 places on 2 ranks" in short and "packed" in packed
