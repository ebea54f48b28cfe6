"""A converted model that takes its batch in a dict, a list, a dataclass, ..: cut, checked and gathered like tensors that are arguments
(A8, A17), and what cannot be opened is refused by name."""

import copy
import warnings
from collections import OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import gingham
from families import errors, plain
from grids import GRIDS, ranks_of, relative

Pair = namedtuple("Pair", "ids w")


class Named(NamedTuple):
    ids: torch.Tensor
    w: torch.Tensor


class Derived(Pair):
    def both(self) -> Any:
        return self.ids, self.w


@dataclass
class Batch:
    ids: torch.Tensor
    w: torch.Tensor
    kind: str = "words"
    made: Any = field(init=False)

    def __post_init__(self) -> None:
        self.made, self.length = [self.ids], self.w


@dataclass(frozen=True, slots=True)
class Frozen:
    ids: torch.Tensor
    w: torch.Tensor


class Words(dict):  # type: ignore[type-arg]
    """Has an attribute beside its entries."""


class Mirror(dict):  # type: ignore[type-arg]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Listed(list):  # type: ignore[type-arg]
    pass


class Slots:
    __slots__ = ("_held",)

    def __init__(self, **held: Any) -> None:
        self._held = held


def words(ids: torch.Tensor, w: torch.Tensor) -> Words:
    found = Words(ids=ids)
    found.w = w  # type: ignore[attr-defined]
    return found


def encoded(ids: torch.Tensor, w: torch.Tensor) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding({"ids": ids, "w": w})


def with_fields(ids: torch.Tensor, w: torch.Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=ids, hidden_states=(w,))


# what holds ids and w, and how both are taken out
KINDS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], Any]]] = {
    "dict": (lambda ids, w: {"ids": ids, "w": w}, lambda b: (b["ids"], b["w"])),
    "w first": (lambda ids, w: {"w": w, "ids": ids}, lambda b: (b["ids"], b["w"])),
    "list": (lambda ids, w: [ids, w], lambda b: b),
    "tuple": (lambda ids, w: (ids, w), lambda b: b),
    "namedtuple": (Pair, lambda b: (b.ids, b.w)),
    "NamedTuple": (Named, lambda b: (b.ids, b.w)),
    "derived": (Derived, lambda b: b.both()),
    "OrderedDict": (lambda ids, w: OrderedDict(ids=ids, w=w), lambda b: b.values()),
    "defaultdict": (lambda ids, w: defaultdict(list, ids=ids, w=w), lambda b: (b["ids"], b["w"], b["none"])[:2]),
    "deque": (lambda ids, w: deque([ids, w], maxlen=2), lambda b: b),
    "UserDict": (lambda ids, w: UserDict(ids=ids, w=w), lambda b: (b["ids"], b["w"])),
    "UserList": (lambda ids, w: UserList([ids, w]), lambda b: b),
    "BatchEncoding": (encoded, lambda b: (b.ids, b["w"])),
    "ModelOutput": (with_fields, lambda b: (b.last_hidden_state, b["hidden_states"][0])),
    "dataclass": (Batch, lambda b: (b.made[0], b.length) if b.kind == "words" else None),
    "frozen": (Frozen, lambda b: (b.ids, b.w)),
    "entry and attribute": (words, lambda b: (b["ids"], b.w)),
    "attributes are entries": (lambda ids, w: Mirror(ids=ids, w=w), lambda b: (b.ids, b["w"])),
    "derived list": (lambda ids, w: Listed([ids, w]), lambda b: b),
    "deeper": (lambda ids, w: {"x": [Batch(ids, w), 3], "y": None}, lambda b: (b["x"][0].ids, b["x"][0].w)),
    "popped": (lambda ids, w: UserDict(ids=ids, w=w), lambda b: (b.pop("ids"), b.pop("w"))),
}


class Net(nn.Module):
    def __init__(self, take: Callable[[Any], Any], mix: bool = False) -> None:
        super().__init__()
        self.take, self.mix, self.seen = take, mix, set()
        self.e, self.a = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, inputs: Any) -> torch.Tensor:
        self.seen.add(type(inputs))
        ids, w = self.take(inputs)
        y = self.a(self.e(ids).mean(1)) * w[:, None]
        return y.softmax(0) if self.mix else y

    def encode(self, inputs: Any) -> torch.Tensor:
        return self.a(self.e(list(self.take(inputs))[0]).mean(1))


def built(*args: Any) -> Net:
    torch.manual_seed(0)
    return Net(*args)


def batch_of(rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(rows * 7).view(rows, 7) % 11, torch.rand(rows, generator=torch.Generator().manual_seed(0))


def beside(rank: int, options: dict[str, Any]) -> dict[str, float]:
    mesh, found = gingham.init(**options), {}
    warnings.simplefilter("ignore")
    ids, w = batch_of()
    for name, (make, take) in KINDS.items():
        original, model = built(take), gingham.parallelize(built(take), mesh)
        outputs = [original(make(ids, w)), model(inputs=make(ids, w)), model(make(ids, w))]  # the last without the probe
        for y in outputs:
            y.square().sum().backward()
        found[name] = max(relative(y, outputs[0]) for y in outputs)
        for parameter in original.parameters():
            parameter.grad = 2 * parameter.grad
        found[name] = max(found[name], *errors(plain(model), plain(original)).values())
        assert model.seen == original.seen
        found[f"{name}, another way in"] = relative(model.encode(make(ids, w)), original.encode(make(ids, w)))
    return found


@pytest.mark.parametrize("name", ["2d", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("1d", "2.5d", "3d", "3x2x2"))])
def test_a17_a_batch_in_a_container_is_cut_as_its_tensors_alone(ranks, name: str) -> None:
    for found in ranks(ranks_of(name))(beside, GRIDS[name]):
        assert len(found) == 2 * len(KINDS) and max(found.values()) <= 2e-6, found


def own_batches(rank: int) -> float:
    mesh = gingham.init(parallel=dict(data=2, tensor=dict(size=4, mode="2d")))
    warnings.simplefilter("ignore")
    make, take = KINDS["dataclass"]
    original, model = built(take), gingham.parallelize(built(take), mesh)
    ids, w = batch_of(6)
    expected = original(make(ids, w))
    expected.square().mean().backward()
    part = slice(0, 4) if mesh.data.rank == 0 else slice(4, 6)
    y = model(make(ids[part], w[part]))
    y.square().mean().backward()
    return max(relative(y, expected[part]), *errors(plain(model), plain(original)).values())


def test_a17_each_data_rank_gives_its_own_container(ranks) -> None:
    assert max(ranks(8)(own_batches)) <= 2e-6


class Holder:
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


class Extra(nn.Module):
    """Takes the ids as they are, and something beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, ids: Any, more: Any = None) -> torch.Tensor:
        return self.a(self.e(ids).mean(1))


def packed(ids: torch.Tensor) -> Any:
    return nn.utils.rnn.pack_padded_sequence(ids[..., None].float(), [7, 6, 5, 4, 3], batch_first=True)


CLOSED: dict[str, Callable[[Any, Any], Any]] = {
    "Holder": lambda ids, w: Holder(ids=ids),
    "Holder deeper": lambda ids, w: {"x": [Holder(inner=Holder(of={"w": w}))]},
    "Slots": lambda ids, w: Slots(w=w),
    "SimpleNamespace": lambda ids, w: SimpleNamespace(ids=ids),
    "mappingproxy": lambda ids, w: MappingProxyType({"w": w}),
    "set": lambda ids, w: {w},
    "Normal": lambda ids, w: torch.distributions.Normal(w, w),
    "PackedSequence": lambda ids, w: packed(ids),
}


def refused(rank: int) -> dict[str, Any]:
    mesh, found = gingham.init(**GRIDS["2d"]), {}
    ids, w = batch_of()
    for name, make in CLOSED.items():
        for place in ("alone", "beside"):
            model: Any = gingham.parallelize(Extra(), mesh)
            with pytest.raises(NotImplementedError) as raised:
                model(make(ids, w)) if place == "alone" else model(ids, make(ids, w))
            found[f"{name}, {place}"] = str(raised.value)
    original = Extra()
    model, said = (gingham.parallelize(copy.deepcopy(original), mesh, whole=names) for names in ((), ("more",)))
    empty = Holder(name="a", number=3, table={"one": [1.0]}, scale=torch.ones(()), model=nn.Linear(2, 2))
    found["whole"] = relative(said(ids, Holder(ids=ids)), original(ids))
    found["without"] = relative(model(ids, empty), original(ids))
    return found


class Made(nn.Module):
    """Makes tensors of what are none."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(7, 3)

    def forward(self, rows: Any) -> dict[str, Any]:
        return {"y": [self.a(torch.as_tensor(rows, dtype=torch.float32))]}


def found_none(rank: int, options: dict[str, Any]) -> str:
    model = gingham.parallelize(Made(), gingham.init(**options))
    try:
        return str(tuple(model(batch_of()[0].numpy())["y"][0].shape))
    except NotImplementedError as error:
        return str(error)


def test_a17_an_object_with_tensors_is_refused_by_name(ranks) -> None:
    for rank, found in enumerate(ranks(4)(refused)):
        assert found.pop("whole") <= 2e-6 and found.pop("without") <= 2e-6
        for name, message in found.items():
            kind, argument = name.split(",")[0].split()[0], "ids" if "alone" in name else "more"
            assert f"rank {rank} got {argument}" in message and f"a {kind} that holds a tensor of shape" in message, (name, message)
            assert ("padded" if kind == "PackedSequence" else "give its tensors as arguments") in message and "whole=(" in message
    for rank, message in enumerate(ranks(4)(found_none, GRIDS["2d"])):
        assert f"Made.y.0: rank {rank} found no tensor of samples" in message and "(rows)" in message and "(5, 3)" in message
    assert set(ranks(4)(found_none, GRIDS["1d"])) == {"(5, 3)"}  # which cuts no rows


def checked(rank: int) -> dict[str, str]:
    """What the first call and the comparison of inputs see inside of a dataclass and of a mapping."""
    mesh, found = gingham.init(**GRIDS["2d"]), {}
    warnings.simplefilter("ignore")
    ids, w = batch_of()
    for name in ("dict", "dataclass", "UserDict", "deeper", "popped"):
        make, take = KINDS[name]
        model = gingham.parallelize(built(take, True), mesh)
        with pytest.raises(NotImplementedError) as raised:
            model(make(ids, w))
        found[f"{name} mixed"] = str(raised.value)
        model = gingham.parallelize(built(take), mesh)
        with pytest.raises(gingham.MeshError) as other:
            model(make(ids, w + (rank == 1)))
        found[f"{name} unlike"] = str(other.value)
    return found


def test_a8_a17_the_first_call_and_the_comparison_of_ranks_see_what_containers_hold(ranks) -> None:
    for found in ranks(4)(checked):
        for name, message in found.items():
            assert ("mixes samples" if "mixed" in name else "rank 1 got other inputs than the others in inputs") in message, (name, message)


@dataclass
class State:
    h: torch.Tensor
    steps: int = 0


class Cell(nn.Module):
    """Gives a state that it is given again, and positions beside the batch, with an object of its own that it fills."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, given: dict[str, Any], state: Any = None, memory: Any = None) -> Any:
        x = given["x"] * given["positions"][:, None]
        h = self.a(x).mean(1)
        h = h if state is None else (h + self.b(state.h)).tanh()
        memory = Holder(sum=0.0) if memory is None else memory
        memory.sum = memory.sum + h.detach()
        return State(h, 0 if state is None else state.steps + 1), memory


def round_trip(rank: int) -> tuple[Any, ...]:
    mesh = gingham.init(**GRIDS["2d"])
    torch.manual_seed(0)
    original = Cell()
    model = gingham.parallelize(copy.deepcopy(original), mesh, whole=("given.positions",))
    x, positions, states = torch.randn(5, 5, 6), torch.linspace(0.5, 1.5, 5), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for each in (original, model):
            state, memory = each({"positions": positions, "x": x})
            for _ in range(2):
                state, memory = each({"positions": positions, "x": x}, state, memory)
            state.h.square().sum().backward()
            states.append(state)
    told = [str(each.message) for each in caught if "whole=" in str(each.message)]
    named = None
    try:
        gingham.parallelize(Cell(), mesh, whole=("give.positions",))
    except ValueError as error:
        named = str(error)
    worst = max(errors(plain(model), plain(original)).values())
    return type(states[1]), states[1].steps, relative(states[1].h, states[0].h), worst, told, named


def test_a17_states_come_back_and_what_a_dict_holds_may_be_said_whole(ranks) -> None:
    for kind, steps, output, gradients, told, named in ranks(4)(round_trip):
        assert kind.__name__ == "State" and steps == 2 and max(output, gradients) <= 2e-6, (output, gradients)
        assert told == [] and "no argument 'give.positions'" in named


def compiled(rank: int) -> dict[str, float]:
    mesh, found = gingham.init(**GRIDS["2d"]), {}
    ids, w = batch_of(8)
    for name in ("dict", "tuple"):
        make, take = KINDS[name]
        original, model = (built(lambda b, take=take: [x.squeeze(-1) for x in take(b)]) for _ in range(2))
        model = gingham.parallelize(model, mesh)
        model.seen = original.seen = SimpleNamespace(add=lambda kind: None)
        given = make(ids, w[:, None])
        found[name] = relative(torch.compile(model, backend="aot_eager", fullgraph=True)(given), original(given))
    return found


def test_a17_a_compiled_model_takes_containers(ranks) -> None:
    for found in ranks(4)(compiled):
        assert max(found.values()) <= 2e-6, found


def local(rank: int) -> bool:
    mesh = gingham.init(**GRIDS["2d"])
    seen: list[Any] = []
    model = gingham.parallelize(built(lambda b: seen.append(b) or b), mesh, io="local")
    given = [mesh.scatter(x, "rows") for x in batch_of()]
    model(given)
    return seen[0] is given


def test_io_local_hands_on_what_it_is_given(ranks) -> None:
    assert all(ranks(4)(local))
