"""Models of which no rank of a pipeline builds more than its stages: the weights of one process, and memory for no others."""

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import gingham
from gingham import nn
from gingham.commands.gpt import GPT, Shape, parallel_kit, serial_kit
from gingham.pipeline import build
from gingham.plan.pipeline import SCHEDULES
from pipelines import SHAPE, sample, tied


class Held(TorchDispatchMode):
    """Bytes of memory that tensors hold at once, at most: what torch allocates and what lies in the shared heap."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.now, self.peak = Counter[int](), 0, 0
        self.empty = gingham.Mesh.empty

    def note(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor) and type(x) is torch.Tensor and not x.is_meta:
            key, size = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
            self.now += size if not self.live[key] else 0
            self.live[key] += 1
            self.peak = max(self.peak, self.now)
            weakref.finalize(x, self.gone, key, size)
        return x

    def gone(self, key: int, size: int) -> None:
        self.live[key] -= 1
        self.now -= size if not self.live[key] else 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return pytree.tree_map(self.note, func(*args, **(kwargs or {})))

    def __enter__(self) -> Any:
        gingham.Mesh.empty = lambda mesh, *args, **named: self.note(self.empty(mesh, *args, **named))  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        gingham.Mesh.empty = self.empty  # type: ignore[method-assign]


def ours(mesh: Any, own: bool) -> Any:
    """A GPT; own: initialised anew by a loop of the user's, and in float64."""
    torch.manual_seed(3)
    model: Any = GPT(serial_kit() if mesh is None else parallel_kit(mesh), Shape(**SHAPE))
    if own:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.02)
                torch.nn.init.zeros_(module.bias)
            if isinstance(module, torch.nn.Embedding):
                module.weight.data.normal_(0, 0.02)
        torch.nn.init.trunc_normal_(model.position.weight, std=0.02)  # draws in more memory than its own
        model.head.weight.data.mul_(2)
        with torch.no_grad():
            model.norm.weight[3] = 0.5
            model.norm.bias.copy_(torch.linspace(0, 1, SHAPE["width"], device="cpu"))
        model.blocks[0].norm1.reset_parameters()
        model.double()
        model.blocks[1].mlp.fc2.weight.data.add_(1)
    return model


def plain(*mesh: Any) -> Any:
    """Of torch's own modules; a buffer and a parameter that are made of other tensors."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 8), torch.nn.Linear(8, 8))
    torch.nn.init.trunc_normal_(model[1].weight, std=0.02)  # draws in more memory than its own
    model[3].register_buffer("mask", torch.tril(torch.ones(8, 8)))
    model[3].weight = torch.nn.Parameter(torch.randn(8, 8) * 0.1)
    with torch.no_grad():
        model[3].weight[2].fill_(0.25)
    return model


KINDS = {
    "gpt": lambda mesh: ours(mesh, False),
    "own": lambda mesh: ours(mesh, True),
    "plain": plain,
    "tied": lambda mesh: tied(mesh, torch.float32),
}


def size_of(x: Any) -> int:
    local = x.to_local() if hasattr(x, "to_local") else x
    return local.numel() * local.element_size()


def full(x: Any) -> torch.Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def built(rank: int, kind: str, config: Any, schedule: str, builder: bool) -> Any:
    """Tensors of this rank's stages, the number drawn next, peak and held bytes; parameters are those that optimizers had before."""
    mesh = gingham.init(parallel=config, timeout=30.0)
    loss = (lambda y, target: y.square().mean()) if kind == "plain" else None
    with Held() as held:
        if builder:
            model = gingham.pipeline(lambda: KINDS[kind](mesh), mesh, 4, schedule, loss=loss)
        else:
            with torch.device("meta"):
                model = KINDS[kind](mesh)
            before = list(model.parameters())
            model = gingham.pipeline(model, mesh, 4, schedule, loss=loss)
            assert {id(each) for each in model.parameters()} <= {id(each) for each in before}
    drawn = torch.rand(1).item()
    mine = sum(map(size_of, {id(each): each for each in (*model.parameters(), *model.buffers())}.values()))
    found = {name: full(each) for name, each in (*model.named_parameters(), *model.named_buffers())}
    if kind == "plain":
        model.step(torch.ones(8, 8), torch.zeros(8, 8))
    else:
        model.step(*(each % 64 for each in sample(8)))
    return found, drawn, held.peak, mine


CASES = [
    ("own", dict(pipeline=2, tensor=dict(size=2, mode="1d")), "1f1b", False),
    ("plain", dict(pipeline=2), "gpipe", True),
    *(
        pytest.param(kind, config, schedule, builder, marks=pytest.mark.matrix)
        for kind in ("gpt", "own", "tied")
        for builder in (False, True)
        for config, schedule in (
            *((dict(pipeline=2), schedule) for schedule in SCHEDULES if schedule in ("zbv", "interleaved", "1f1b")),
            (dict(pipeline=2, data=dict(size=2, shard="all")), "1f1b"),
            (dict(pipeline=2, data=dict(size=2, shard="state"), tensor=dict(size=2, mode="1d", sequence=True)), "zero_bubble"),
            (dict(pipeline=2, tensor=dict(size=4, mode="2.5d", depth=4)), "gpipe"),
            (dict(pipeline=3, tensor=dict(size=4, mode="2d")), "gpipe"),
            (dict(tensor=dict(size=4, mode="2d")), "1f1b"),
        )
    ),
    *(pytest.param("plain", dict(pipeline=4), schedule, True, marks=pytest.mark.matrix) for schedule in ("gpipe", "1f1b")),
]


def ranks_of(config: Any) -> int:
    data = config.get("data", dict(size=1))
    return int(config.get("pipeline", 1) * config.get("tensor", dict(size=1))["size"] * data["size"])


@pytest.mark.parametrize(("kind", "config", "schedule", "builder"), CASES, ids=str)
def test_weights_of_one_process_and_memory_of_the_stages(ranks, kind: str, config: Any, schedule: str, builder: bool) -> None:
    serial = KINDS[kind](None)
    drawn = torch.rand(1).item()
    truth = {**dict(serial.named_parameters(remove_duplicate=False)), **dict(serial.named_buffers())}
    piece = max(each.numel() * each.element_size() for each in truth.values())
    seen: set[str] = set()
    for found, after, peak, mine in ranks(ranks_of(config))(built, kind, config, schedule, builder):
        assert not [name for name, each in found.items() if not torch.equal(each, truth[name])]
        assert after == drawn or kind == "tied"  # whose serial head draws a weight first, and drops it
        # where nobody has other stages, memory is not what this is about
        assert "pipeline" not in config or peak <= mine + piece, (peak, mine, piece)
        seen |= found.keys()
    assert seen | {"head.weight"} >= truth.keys()


def converted(rank: int, family: str, config: Any, schedule: str, folder: str, builder: bool) -> Any:
    """A transformers model built on meta: its weights, how much memory it takes, and after a folder was read."""
    import families

    mesh = gingham.init(**config, timeout=30.0)

    def make() -> Any:
        with torch.device("meta"):
            model = families.build(family, num_hidden_layers=4) if family != "gpt2" else families.build(family)
        torch.manual_seed(9)
        return gingham.parallelize(model, mesh)

    if mesh.whole is None:
        return families.plain(make(), gradients=False)
    heap = mesh.memory()["tensors"]
    model = gingham.pipeline(make if builder else make(), mesh, 2, schedule)
    heap, mine = mesh.memory()["tensors"] - heap, sum(map(size_of, model.parameters()))
    heap = mine if mesh.job.has_gpu else heap  # torch's allocator gives a GPU's parameters, which the mesh does not count
    drawn = {name: each.clone() for name, each in families.plain(model, gradients=False).items()}
    gingham.import_safetensors(model, folder)
    inputs = families.batch(family)
    ids = inputs["input_ids"] if "input_ids" in inputs else inputs["pixel_values"]
    labels = inputs["labels"]
    return drawn, families.plain(model, gradients=False), model.step(ids, labels).item(), heap, mine


@pytest.mark.parametrize(
    ("family", "tensor", "schedule", "builder"),
    [
        ("gpt2", dict(size=2, mode="1d"), "1f1b", False),
        *(
            pytest.param(family, tensor, schedule, builder, marks=pytest.mark.matrix)
            for family in ("gpt2", "llama", "bert", "vit")
            for builder in (False, True)
            for tensor, schedule in ((dict(size=1), "gpipe"), (dict(size=4, mode="2d"), "1f1b"), (dict(size=2, mode="sequence"), "1f1b"))
        ),
    ],
    ids=str,
)
def test_converted_models_from_meta_and_from_files(ranks, tmp_path: Path, family: str, tensor: Any, schedule: str, builder: bool) -> None:
    import families

    original = families.build(family, num_hidden_layers=4) if family != "gpt2" else families.build(family)
    original.save_pretrained(tmp_path)
    alone = ranks(1)(converted, family, dict(mode="1d", size=1), schedule, str(tmp_path), builder)[0]
    truth, seen = dict(original.named_parameters(remove_duplicate=False)), set[str]()
    config = dict(parallel=dict(pipeline=2, tensor=tensor))
    for drawn, loaded, loss, heap, mine in ranks(2 * tensor["size"])(converted, family, config, schedule, str(tmp_path), builder):
        assert not [name for name, each in drawn.items() if not torch.equal(each, alone[name])]
        assert not [name for name, each in loaded.items() if not torch.equal(each, truth[name])]
        assert mine <= heap <= mine + 4096  # what the heap rounds up, and buffers
        seen |= drawn.keys()
        expected = original(**{**families.batch(family), **({} if family == "vit" else dict(attention_mask=None))}).loss.item()
        assert loss == pytest.approx(expected, rel=1e-5)
    assert seen == alone.keys()


def refused(rank: int) -> Any:
    mesh = gingham.init(parallel=dict(pipeline=2), timeout=30.0)
    found = []

    def told(call: Any) -> None:
        with pytest.raises(gingham.MeshError) as error:
            call()
        found.append(str(error.value))

    def on_meta(make: Any) -> Any:
        with torch.device("meta"):
            return make()

    told(lambda: gingham.pipeline(on_meta(plain), mesh, 4))
    layer: Any = on_meta(lambda: nn.Linear(4, 4))
    told(lambda: layer(torch.ones(2, 4)))
    told(lambda: torch._foreach_mul_([layer.weight.data], 2.0))
    told(lambda: (layer.weight.data * 2).mul_(2))
    told(lambda: setattr(layer.weight, "data", layer.weight.data * 2))
    outside = torch.ones(4, 4, device="meta")
    two: Any = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))

    def of_others() -> Any:
        two[rank].weight = torch.nn.Parameter(outside * 2)
        return two

    told(lambda: gingham.pipeline(of_others, mesh, 2))
    told(lambda: gingham.pipeline(3, mesh, 2))  # type: ignore[arg-type]
    told(lambda: gingham.pipeline(lambda: 3, mesh, 2))  # type: ignore[arg-type,return-value]
    return found


def test_what_has_no_values_is_told_by_name(ranks) -> None:
    words = (
        "was built under torch.device('meta'), which keeps no account",
        "Linear was built under",
        "_foreach_mul_",
        "computed of a parameter",
        "computed of a parameter",
        "follows from tensors that were made before",
        "got a int",
        "function that gives a int",
    )
    for told in ranks(2)(refused):
        assert all(word in text for word, text in zip(words, told, strict=True)), told


def seeded(rank: int) -> str:
    mesh = gingham.init(parallel=dict(pipeline=2), timeout=30.0)
    torch.manual_seed(rank)
    with torch.device("meta"):
        model = torch.nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(gingham.MeshError) as error:
        gingham.pipeline(model, mesh, 2)
    return str(error.value)


def test_stages_that_were_drawn_from_other_seeds_are_told(ranks) -> None:
    assert all("gingham.pipeline(Sequential" in text for text in ranks(2)(seeded))


def test_values_are_put_on_the_device_of_the_mesh() -> None:
    """Which are drawn on the CPU, here for a device that every machine has."""
    model, tape = build.built(lambda: torch.nn.Linear(4, 4))
    build.fill(model, tape, torch.device("meta"))
    assert model.weight.is_meta and model.bias.is_meta
