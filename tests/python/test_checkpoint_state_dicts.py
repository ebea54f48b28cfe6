"""load_state_dict with a torch model's full tensors, copies of layers and models on a mesh, averages of weights: as in one process."""

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gingham
from families import batch, build
from grids import relative, whole

GRIDS: list[Any] = [dict(mode="2d", size=4), dict(mode="1d", size=4)]
MORE: list[Any] = [dict(mode="2.5d", size=8, depth=2), dict(mode="3d", size=8)]


class Net(torch.nn.Module):
    """The same keys in torch.nn and on a mesh."""

    def __init__(self, layers: Any = torch.nn, width: int = 12) -> None:
        super().__init__()
        self.table = layers.Embedding(10, width)
        self.first, self.norm, self.second = layers.Linear(width, 20), layers.LayerNorm(20), layers.Linear(20, 6, bias=False)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.norm(self.first(self.table(ids))))
        return y


def serial(seed: int, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def full(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(value.detach()) for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def load_full(rank: int, grid: dict[str, Any]) -> None:
    gingham.init(**grid)
    Net(gingham.nn)
    gingham.destroy()  # DTensor's caches remember that mesh; layers on the next one load all the same
    mesh = gingham.init(**grid)
    source = serial(5)
    source.seen.fill_(3.0)
    state, ids = source.state_dict(), torch.arange(8) % 10
    for assign in (False, True):
        torch.manual_seed(9)
        model = Net(gingham.nn)
        assert model.load_state_dict(state, assign=assign) == ([], [])
        assert same(full(model), dict(state)) and all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert relative(mesh.gather(model(mesh.scatter(ids))), source(ids)) < 1e-5
    # what is cut is the state's own copy: neither the dict nor its tensors have changed
    assert same(dict(state), full(source)) and not any(isinstance(value, DTensor) for value in state.values())
    model.load_state_dict({name: value.double() for name, value in state.items()})
    assert model.first.weight.dtype == torch.float32 and same(full(model), dict(state))
    model.first.load_state_dict(serial(6).first.state_dict())  # a layer by itself
    model.load_state_dict(full(model) | {"norm.weight": model.norm.weight.detach()})  # both kinds
    for change, word in (
        (lambda found: found.pop("first.weight"), 'Missing key(s) in state_dict: "first.weight"'),
        (lambda found: found.update(more=torch.ones(1)), 'Unexpected key(s) in state_dict: "more"'),
        (
            lambda found: found.update(serial(5, width=16).state_dict()),
            "torch.Size([20, 16]) from checkpoint, the shape in current model is",
        ),
        (lambda found: found.update({"second.weight": model.second.weight.to_local().detach()}), "current model is torch.Size([6, 20])"),
    ):
        changed = dict(state)
        change(changed)
        with pytest.raises(RuntimeError) as caught:
            model.load_state_dict(changed)
        assert word in str(caught.value), caught.value
        if "size" not in str(caught.value) and "shape" not in str(caught.value):
            assert any(model.load_state_dict(changed, strict=False))
    gingham.destroy()


@pytest.mark.parametrize(
    "grid", [*GRIDS, *(pytest.param(grid, marks=pytest.mark.matrix) for grid in MORE)], ids=lambda grid: str(grid.get("mode"))
)
def test_c7_load_state_dict_takes_full_tensors(ranks: Any, grid: dict[str, Any]) -> None:
    ranks(grid["size"])(load_full, grid)


def steps_of(model: Any, optimizer: Any, average: Any, seeds: range, call: Any) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(10, (8,), generator=generator)
        optimizer.zero_grad()
        call(model, ids).square().sum().backward()
        optimizer.step()
        average.update_parameters(model)


def averaged(rank: int, grid: dict[str, Any], kind: str) -> None:
    mesh = gingham.init(**grid)
    options = {"ema": dict(multi_avg_fn=get_ema_multi_avg_fn(0.9)), "mean": dict()}[kind]

    def on_mesh(model: Any, ids: torch.Tensor) -> torch.Tensor:
        return mesh.gather(model(mesh.scatter(ids)))

    def plain(model: Any, ids: torch.Tensor) -> torch.Tensor:
        return model(ids)  # type: ignore[no-any-return]

    reference = serial(3)
    torch.manual_seed(3)
    model = Net(gingham.nn)
    averages = AveragedModel(model, **options), AveragedModel(reference, **options)
    for each, average, call in ((model, averages[0], on_mesh), (reference, averages[1], plain)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
        steps_of(each, optimizer, average, range(3), call)
    expected = dict(averages[1].module.named_parameters())
    for name, parameter in averages[0].module.named_parameters():
        assert relative(whole(parameter), expected[name]) < 1e-5, name
        assert parameter is not model.get_parameter(name)
    ids = torch.arange(8) % 10
    assert relative(on_mesh(averages[0], ids), averages[1](ids)) < 1e-4
    averages[1].load_state_dict({name: whole(value) for name, value in averages[0].state_dict().items()})
    averages[0].load_state_dict(averages[1].state_dict())  # and back, as full tensors


@pytest.mark.parametrize("kind", ["ema", "mean"])
@pytest.mark.parametrize("grid", [GRIDS[0], *(pytest.param(grid, marks=pytest.mark.matrix) for grid in GRIDS[1:] + MORE)], ids=str)
def test_c7_averaged_models_equal_serial(ranks: Any, grid: dict[str, Any], kind: str) -> None:
    ranks(grid["size"])(averaged, grid, kind)


def copies(rank: int) -> None:
    mesh = gingham.init(mode="2d", size=4)
    torch.manual_seed(3)
    model = Net(gingham.nn)
    linears = [gingham.nn.Linear(12, 8), gingham.nn.Linear(12, 8)]
    gingham.nn.share_input(*linears)
    x = mesh.scatter(torch.ones(8, 12))
    shared = torch.nn.ModuleList(linears)
    shared[0](x)
    ids = mesh.scatter(torch.arange(8) % 10)
    before = model(ids)
    twin, other = copy.deepcopy(model), copy.deepcopy(shared)
    assert twin.first.mesh is mesh and copy.copy(model.first).mesh is mesh and copy.deepcopy(mesh) is mesh
    assert other[0].group is not shared[0].group and other[0].group.linears[1] is other[1]
    assert torch.equal(other[1](x), shared[1](x))
    assert torch.equal(twin(ids), before) and twin.first.weight is not model.first.weight
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2.0)
    assert torch.equal(model(ids), before) and not torch.equal(twin(ids), before)
    twin(ids).sum().backward()
    assert model.first.weight.grad is None and twin.first.weight.grad is not None
    for thing in (model.first, torch.nn.Sequential(model.norm), mesh):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(thing)


def test_c7_copies_share_the_mesh_and_pickling_is_refused(ranks: Any) -> None:
    ranks(4)(copies)


def optimizers(rank: int, name: str) -> None:
    """The state that a serial optimizer saved, in full tensors, goes on on a mesh as it does in one process."""
    mesh = gingham.init(mode="2d", size=4)
    make = {
        "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
        "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
        "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    }[name]
    reference = serial(3)
    model = Net(gingham.nn)
    optimizer, mine = make(reference.parameters()), make(model.parameters())
    ids = torch.arange(8) % 10

    def step(each: Any, by: Any, y: torch.Tensor) -> None:
        by.zero_grad()
        y.square().sum().backward()
        by.step()

    for _ in range(2):
        step(reference, optimizer, reference(ids))
    model.load_state_dict(reference.state_dict())
    mine.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        step(reference, optimizer, reference(ids))
        step(model, mine, mesh.gather(model(mesh.scatter(ids))))
    for key, parameter in model.named_parameters():
        assert relative(whole(parameter), reference.get_parameter(key)) < 1e-5, key
        for kept, value in mine.state[parameter].items():
            theirs = optimizer.state[reference.get_parameter(key)][kept]
            assert value is None or relative(whole(value), theirs) < 1e-4, (key, kept)
            assert value is None or value.dim() == 0 or isinstance(value, DTensor)
    again = make(model.parameters())
    again.load_state_dict(mine.state_dict())  # its own state, in blocks
    step(model, again, mesh.gather(model(mesh.scatter(ids))))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adam"])
def test_c7_optimizer_state_of_one_process(ranks: Any, name: str) -> None:
    ranks(4)(optimizers, name)


def converted(rank: int, family: str, grid: dict[str, Any]) -> None:
    mesh = gingham.init(**grid)
    torch.manual_seed(5)
    source = build(family)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.manual_seed(6)
    model = gingham.parallelize(build(family), mesh)
    assert model.load_state_dict(source.state_dict()) == ([], [])
    torch.manual_seed(7)
    other = gingham.parallelize(build(family), mesh)
    other.load_state_dict(source.state_dict(), assign=True)
    twin = copy.deepcopy(model)
    ids = torch.arange(4 * 6).view(4, 6) % 60
    inputs = (
        dict(pixel_values=torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))) if family == "vit" else dict(input_ids=ids)
    )
    for each in (source, model, other, twin):
        each.eval()
    expected = source(**inputs).logits
    for each in (model, other, twin):
        assert relative(each(**inputs).logits, expected) < 1e-4
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert relative(model(**inputs).logits, expected) < 1e-4
    average = AveragedModel(model)
    average.update_parameters(model)
    assert relative(average(**inputs).logits, expected) < 1e-4
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({key: value for key, value in source.state_dict().items() if "norm" not in key.lower() and "ln_" not in key})
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(model)
    if family == "gpt2":
        assert model.resize_token_embeddings() is model.get_input_embeddings()
        with pytest.raises(NotImplementedError, match=r"before gingham\.parallelize"):
            model.resize_token_embeddings(99)
        key = next(key for key in source.state_dict() if key.endswith("c_attn.weight"))
        with pytest.raises(RuntimeError, match="size mismatch for .*c_attn.weight"):
            model.load_state_dict({**source.state_dict(), key: torch.zeros(3, 5)})


@pytest.mark.parametrize(
    ("family", "grid"),
    [
        pytest.param(family, grid, marks=[] if (family, grid["mode"]) in (("gpt2", "2d"), ("bert", "2d")) else pytest.mark.matrix)
        for family in ("gpt2", "llama", "bert", "vit")
        for grid in (*GRIDS, *MORE)
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.get("mode")),
)
def test_c7_converted_models_load_and_are_copied(ranks: Any, family: str, grid: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    ranks(grid["size"])(converted, family, grid)


def other_process(rank: int, plain: bool) -> dict[str, float]:
    """An optimizer's state_dict of one process, loaded on a mesh that holds in_proj in three, and back."""
    from gingham.integrations.states import FullState

    mesh = gingham.init(mode="2d", size=4)
    torch.manual_seed(0)
    serial = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    x = torch.randn(8, 5, 16)

    def step(model: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()

    def adam(model: Any) -> torch.optim.Optimizer:
        named = list(model.named_parameters())
        whole = [each if plain else each[1] for each in named if each[1].dim() > 1]
        rest = [each if plain else each[1] for each in named if each[1].dim() == 1]
        return torch.optim.AdamW([{"params": whole, "weight_decay": 0.3}, {"params": rest}], lr=0.1)

    ours = gingham.parallelize(copy.deepcopy(serial), mesh)
    mine, theirs = adam(ours), adam(serial)
    for _ in range(2):
        step(serial, theirs)
    ours.load_state_dict(serial.state_dict())
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    step(serial, theirs)
    step(ours, mine)
    back, expected = FullState(mine, rank).state_dict(), theirs.state_dict()
    errors = {"output": float((ours(x) - serial(x)).abs().max())}
    if rank == 0:
        assert [{**group, "lr": 0} for group in back["param_groups"]] == [{**group, "lr": 0} for group in expected["param_groups"]]
        for number, values in expected["state"].items():
            for name, value in values.items():
                errors[f"{number}.{name}"] = float((back["state"][number][name] - value).abs().max())
    return errors


@pytest.mark.parametrize("plain", [False, True], ids=["parameters", "named parameters"])
def test_c2_an_optimizers_state_of_one_process_fits_parameters_held_in_three_and_back(ranks, plain: bool) -> None:
    for errors in ranks(4)(other_process, plain):
        assert max(errors.values()) < 1e-4, errors


def outliving(rank: int) -> bool:
    """A copy whose original is gone on all ranks but one: whether its calls are alike on all."""
    mesh = gingham.init(mode="2d", size=4)
    q, k = (gingham.nn.Linear(8, 8) for _ in range(2))
    gingham.nn.share_input(q, k)
    model = torch.nn.Sequential(q, k, gingham.nn.MLP(8, 16), gingham.nn.SelfAttention(8, 2), gingham.nn.LayerNorm(8))
    x = mesh.scatter(torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0)))
    before = model(x)
    copied = copy.deepcopy(model)
    kept = [model, q, k] if rank == 1 else None
    del model, q, k
    gc.collect()
    after = copied(x)
    return bool(torch.equal(before, after)) and (kept is None) == (rank != 1)


def test_c7_a_copy_outlives_its_original(ranks: Any) -> None:
    assert all(ranks(4)(outliving))


def over_a_copy(rank: int, folder: Path) -> dict[str, float]:
    """Losses after an optimizer over a copy of a converted model was saved and loaded into another copy, beside one process's."""
    mesh = gingham.init(mode="2d", size=4)
    inputs = batch("gpt2")

    def losses(model: Any, optimizer: Any, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            found.append(float(loss))
        return found

    def made() -> tuple[Any, Any]:
        model = copy.deepcopy(gingham.parallelize(build("gpt2").eval(), mesh))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    plain = build("gpt2").eval()
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    losses(plain, theirs, 2)
    kept = copy.deepcopy((plain.state_dict(), theirs.state_dict()))
    expected = losses(plain, theirs, 2)
    model, optimizer = made()
    losses(model, optimizer, 2)
    gingham.save(model, optimizer, folder / "ours")
    torch.save((model.state_dict(), optimizer.state_dict()), folder / f"{rank}.pt")
    pairs: dict[str, tuple[Any, Any]] = {"both copied": copy.deepcopy((model, optimizer))}
    for name in ("gingham.load", "torch.load", "of one process"):
        other, its = pairs[name] = made()
        if name == "gingham.load":
            gingham.load(other, its, folder / "ours")
        else:
            states = kept if name == "of one process" else torch.load(folder / f"{rank}.pt", weights_only=False)
            other.load_state_dict(states[0])
            its.load_state_dict(states[1])
    return {name: max(abs(a - b) for a, b in zip(losses(*pair, 2), expected, strict=True)) for name, pair in pairs.items()}


def test_c7_an_optimizer_over_a_copied_model_is_saved_and_loaded(ranks: Any, tmp_path: Path) -> None:
    for errors in ranks(4)(over_a_copy, tmp_path):
        assert len(errors) == 4 and max(errors.values()) < 1e-5, errors
