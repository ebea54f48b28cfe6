"""parallelize on meshes with data: each data rank's own batch in, its outputs out, the job's loss and gradients."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import gingham
from families import FAMILIES, batch, build, errors, joint_error, plain

MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "2 x none": (2, dict(data=2)),
    "2 x 1d 2": (4, dict(data=2, tensor=dict(size=2, mode="1d"))),
    "2 x 2d 4": (8, dict(data=2, tensor=dict(size=4, mode="2d"))),
    "2 x 2d 4, all": (8, dict(data=dict(size=2, shard="all"), tensor=dict(size=4, mode="2d"))),
    "2 x 1x2x2": (8, dict(data=2, tensor=dict(grid=(1, 2, 2)))),
    "2 x sequence 2": (4, dict(data=2, tensor=dict(size=2, mode="sequence"))),
    "3 x 1d 2, all": (6, dict(data=dict(size=3, shard="all"), tensor=dict(size=2, mode="1d"))),
}
ROWS = {2: (5, 1), 3: (4, 1, 2)}  # of each data rank: in 2 x 2d 4 a rank of the second would have none
QUICK = {("plain", "2 x 1d 2"), ("llama", "2 x 2d 4, all"), ("classes", "2 x none"), ("vit", "2 x sequence 2")}
CASES = [
    pytest.param(kind, name, marks=[] if (kind, name) in QUICK else [pytest.mark.matrix])
    for kind in ("plain", "classes", *FAMILIES)
    for name in MESHES
    if kind != "plain" or "sequence" not in name
]


def made(kind: str) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor | None]:
    """A model, its batch of 8 rows, and the targets of a loss that the caller takes."""
    if kind in FAMILIES:
        return build(kind), batch(kind, rows=8), None
    torch.manual_seed(0)
    if kind == "plain":
        model = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.GELU(), torch.nn.LayerNorm(24), torch.nn.Linear(24, 8))
        return model, {"input": torch.randn(8, 12)}, torch.randn(8, 8)
    from transformers import BertConfig, BertForSequenceClassification

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=16)
    drops = dict(hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    model = BertForSequenceClassification(BertConfig(vocab_size=96, num_labels=4, **drops, **sizes))
    return model, {"input_ids": torch.randint(96, (8, 9)), "labels": torch.randint(4, (8,))}, None


def step(model: Any, inputs: dict[str, torch.Tensor], target: torch.Tensor | None) -> tuple[float, torch.Tensor]:
    if target is None:
        output = model(**inputs)
        loss, logits = output.loss, output.logits
    else:
        logits = model(*inputs.values())
        loss = F.mse_loss(logits, target)
    loss.backward()
    return float(loss.detach()), logits.detach()


def trained(rank: int, config: dict[str, Any], kind: str) -> Any:
    mesh = gingham.init(parallel=config, timeout=30.0)
    model, inputs, target = made(kind)
    rows = ROWS[mesh.data.size]
    total = sum(rows)
    loss, logits = step(model, {name: x[:total] for name, x in inputs.items()}, None if target is None else target[:total])
    truth = plain(model)
    model, inputs, target = made(kind)
    model = gingham.parallelize(model, mesh)

    def own(x: torch.Tensor) -> torch.Tensor:
        return x[:total].split(rows)[mesh.data.rank]

    found, mine = step(model, {name: own(x) for name, x in inputs.items()}, None if target is None else own(target))
    got = plain(model)
    worst = joint_error(got, truth) if kind == "vit" else max(errors(got, truth).values())
    return found, loss, worst, float((mine - own(logits)).abs().max()), mesh.data.rank


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_each_data_rank_gives_its_own_batch(ranks, kind: str, name: str) -> None:
    """Loss of the job where the model takes it (labels=), the caller's own of its rows where not; gradients of one process on the joined
    batch in both, with rows and valid tokens that data ranks have different numbers of."""
    size, config = MESHES[name]
    answers = ranks(size)(trained, config, kind)
    rows = ROWS[config["data"] if isinstance(config["data"], int) else config["data"]["size"]]
    for found, loss, worst, off, data in answers:
        assert worst <= 3e-6 and off <= 1e-5, (worst, off)
        if kind != "plain":
            assert found == pytest.approx(loss, rel=1e-5)
        assert 0 <= data < len(rows)
    if kind == "plain":
        each = {data: found for found, *_, data in answers}
        mean = sum(each[data] * count for data, count in enumerate(rows)) / sum(rows)
        assert mean == pytest.approx(answers[0][1], rel=1e-5) and len(set(each.values())) == len(rows)


def refused(rank: int) -> list[str]:
    from transformers import GPT2Config, GPT2DoubleHeadsModel

    mesh = gingham.init(parallel=dict(data=2, tensor=dict(size=2, mode="1d")), timeout=30.0)
    model = gingham.parallelize(torch.nn.Linear(4, 4))
    told = []
    for call, kind in (
        (lambda: model(torch.ones(2, 4) + (rank == 3)), gingham.MeshError),
        (lambda: gingham.parallelize(GPT2DoubleHeadsModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2))), None),
    ):
        with pytest.raises(kind or NotImplementedError) as error:
            call()
        told.append(str(error.value))
    return [*told, str(mesh.data.rank)]


def test_what_is_refused_on_data_meshes(ranks) -> None:
    for told in ranks(4)(refused):
        assert "rank 3 got other inputs than the others of their data rank" in told[0] and "mesh.sampler" in told[0]
        assert "data=2" in told[1] and "nothing vouches for its head" in told[1]


def shared(rank: int) -> tuple[float, float, float]:
    """accelerate takes the ranks for one process, and gives all of them one batch."""
    from accelerate import Accelerator

    mesh = gingham.init(parallel=dict(data=2, tensor=dict(size=2, mode="1d")), timeout=30.0)
    model, inputs, _ = made("gpt2")
    loss, _ = step(model, inputs, None)
    truth = plain(model)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(gingham.parallelize(made("gpt2")[0], mesh))
    found, logits = step(prepared, inputs, None)
    return found, loss, max(errors(plain(prepared), truth).values()) if len(logits) == 8 else 1.0


def test_accelerate_gives_one_batch_to_all_data_ranks(ranks) -> None:
    for found, loss, worst in ranks(4)(shared):
        assert found == pytest.approx(loss, rel=1e-5) and worst <= 3e-6
