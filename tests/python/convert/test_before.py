"""What was there before parallelize: ranks that hold other values, optimizers that hold the parameters."""

import copy
import warnings
from typing import Any

import torch
from torch import nn

import families
from families import plain


def seeds(rank: int) -> dict[str, Any]:
    import gingham

    mesh = gingham.init(mode="2d", size=4)
    found: dict[str, Any] = {}

    def build(seed: int, width: int = 8) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8))
        model.register_buffer("scale", torch.randn(3))
        model.register_buffer("flags", torch.rand(5) > 0.5)
        return model.to(torch.bfloat16) if seed > 100 else model

    for name, seed in {"other seed": rank, "16 bit": 200 + rank, "one seed": 5}.items():
        model, first = build(seed), build({"other seed": 0, "16 bit": 200, "one seed": 5}[name])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = gingham.parallelize(model, mesh)
        got = {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in model.state_dict().items()}
        same = all(torch.equal(got[key], value) for key, value in first.state_dict().items())
        found[name] = same, [str(each.message) for each in caught if "parallelize" in str(each.message)]
    torch.manual_seed(5)
    head = build(5)
    if rank == 2:
        nn.init.ones_(head[2].weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gingham.parallelize(head, mesh)
    found["one head"] = [str(each.message) for each in caught]
    try:
        gingham.parallelize(build(5, 12 if rank == 1 else 8), mesh)
    except gingham.MeshError as error:
        found["structure"] = str(error)
    torch.manual_seed(40 + rank)
    with torch.device("meta"):
        drawn = nn.Sequential(nn.Linear(8, 8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drawn = gingham.parallelize(drawn, mesh)
    found["meta"] = drawn[0].weight.full_tensor().sum().item(), [str(each.message) for each in caught]
    return found


def test_a4_ranks_take_rank_0s_values_and_say_so_or_name_the_odd_structure(ranks) -> None:
    answers = ranks(4)(seeds)
    for found in answers:
        for name in ("other seed", "16 bit"):
            same, words = found[name]
            assert same and len(words) == 1 and "ranks 1, 2, 3" in words[0] and "'0.weight'" in words[0], (name, words)
        assert found["one seed"] == (True, [])
        assert len(found["one head"]) == 1 and "rank 2 held" in found["one head"][0] and "'2.weight'" in found["one head"][0]
        assert "of rank 1 differs" in found["structure"] and "0.weight (12, 8)" in found["structure"]
        assert found["meta"][0] == answers[0]["meta"][0] and "ranks 1, 2, 3 had another seed" in found["meta"][1][0]


def optimizers(rank: int, kind: type, grid: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, Any]:
    import gingham

    mesh = gingham.init(**grid)
    found: dict[str, Any] = {}
    for family in kinds:
        model = families.build(family)
        twin = copy.deepcopy(model)
        inputs = families.batch(family)
        pairs = [(each, kind(each.parameters(), lr=1e-2, foreach=False)) for each in (model, twin)]
        for each, optimizer in pairs:  # its state is then full, and moves too
            each(**inputs).loss.backward()
            optimizer.step()
        held = list(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(pairs[0][1], 1)
        converted = gingham.parallelize(model, mesh)
        gradients = families.joint_error(plain(converted), plain(twin))
        found[f"{family} held"] = all(a is b for a, b in zip(held, converted.parameters(), strict=True))
        for each, optimizer in pairs:
            for _ in range(2):
                optimizer.zero_grad()
                each(**inputs).loss.backward()
                optimizer.step()
        found[family] = gradients, families.joint_error(plain(converted, False), plain(twin, False))
        found[f"{family} schedule"] = scheduler.optimizer is pairs[0][1]
    joined = families.build("gpt2")
    optimizer = kind(joined.parameters(), lr=1e-2)
    joined = gingham.parallelize(joined, mesh)
    joined(**families.batch("gpt2")).loss.backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        found["joined"] = str(error)
    plain_model = nn.Linear(8, 8)
    attribute = plain_model.weight
    attribute.no_decay = True
    calls: list[int] = []
    attribute.register_hook(lambda grad: calls.append(1))
    new = gingham.parallelize(plain_model, mesh)
    new(torch.ones(4, 8)).sum().backward()
    found["attributes"] = new.weight.no_decay, len(calls)
    return found


def test_a11_optimizers_made_before_move_the_model_or_name_what_they_lost(ranks) -> None:
    for kind, grid, kinds in (
        (torch.optim.AdamW, dict(mode="2d", size=4), ("llama", "vit")),
        (torch.optim.SGD, dict(mode="1d", size=4), ()),
    ):
        found = ranks(4)(optimizers, kind, grid, kinds)[0]
        for family in kinds:
            assert found[f"{family} held"] and found[f"{family} schedule"]
            assert max(found[family]) <= 1e-4, (family, found[family])
        assert "c_attn.weight" in found["joined"]
        assert found["attributes"] == (True, 1)
