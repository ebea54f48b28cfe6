"""parallel=dict(pipeline=.., tensor=dict(size=, mode=, depth=)): the examples of the published pages, legal and not."""

from typing import Any

import pytest

import gingham
from gingham.launch.parallel_config import parse_parallel, parse_pipeline
from gingham.mesh import axes_of

# configuration, number of ranks -> (pm, pn, pk), or what is not built yet
LEGAL: list[tuple[dict[str, Any], int, tuple[int, int, int] | str]] = [
    ({}, 1, (1, 1, 1)),
    (dict(tensor=dict(size=1, mode=None)), 1, (1, 1, 1)),
    (dict(pipeline=dict(size=1), tensor=dict(size=1, mode=None)), 1, (1, 1, 1)),
    (dict(pipeline=1, tensor=1), 1, (1, 1, 1)),
    (dict(pipeline=None, tensor=None), 1, (1, 1, 1)),
    (dict(tensor=dict(size=4, mode="1d")), 4, (1, 4, 1)),
    (dict(tensor=dict(size=4, mode="2d")), 4, (2, 2, 1)),
    (dict(tensor=dict(size=8, mode="2.5d", depth=2)), 8, (4, 2, 1)),
    (dict(tensor=dict(size=4, mode="2.5d", depth=1)), 4, (2, 2, 1)),
    (dict(tensor=dict(size=8, mode="3d")), 8, (2, 2, 2)),
    (dict(pipeline=1, tensor=dict(mode="3d", size=8)), 8, (2, 2, 2)),
    (dict(data=1, tensor=dict(size=8, mode="3d")), 8, (2, 2, 2)),
    (dict(tensor=dict(size=6, grid=(1, 3, 2))), 6, (1, 3, 2)),
    (dict(tensor=dict(size=4, mode="1d", sequence=True)), 4, (1, 4, 1)),
    (dict(tensor=dict(size=4, mode="sequence")), 4, (4, 1, 1)),
    (dict(data=2, tensor=dict(size=4, mode="sequence")), 8, (8, 1, 1)),
    (dict(pipeline=2, tensor=dict(size=4, mode="sequence")), 8, (4, 1, 1)),
    (dict(pipeline=2), 2, (1, 1, 1)),
    (dict(pipeline=dict(size=2)), 2, (1, 1, 1)),
    (dict(pipeline=2, tensor=dict(size=4, mode="2d")), 16, (4, 2, 1)),
    (dict(pipeline=dict(size=2, schedule="zbv", microbatches=8), tensor=dict(size=4, mode="2d")), 8, (2, 2, 1)),
    (dict(pipeline=4, data=2), 8, (2, 1, 1)),
    ({}, 2, (2, 1, 1)),
    (dict(tensor=dict(size=4, mode="2d")), 8, (4, 2, 1)),
    (dict(data=2, tensor=dict(size=4, mode="2d")), 8, (4, 2, 1)),
    (dict(data=dict(size=2, shard="all"), tensor=dict(size=8, mode="3d")), 16, (4, 2, 2)),
    (dict(data=dict(shard="all"), tensor=dict(size=2, mode="1d")), 6, (3, 2, 1)),
    (dict(data=dict(size=2, shard="state")), 2, (2, 1, 1)),
]
ILLEGAL: list[tuple[Any, int, str]] = [
    (dict(tensor=4), 4, r"tensor=4 without a mode, write tensor=dict\(size=4, mode=...\): .*mode='1d'"),
    (dict(tensor=dict(size=4)), 4, "tensor=4 without a mode"),
    (dict(tensor=dict(size=4, mode=None)), 4, "tensor=4 without a mode"),
    (dict(pipeline=2, tensor=4), 8, "tensor=4 without a mode"),
    (dict(tensor=dict(size=8, mode="2d")), 8, "nearest valid sizes: 1, 4, 9|nearest valid sizes: 9, 4"),
    (dict(tensor=dict(size=8, mode="3.5d")), 8, "unknown mode '3.5d'"),
    (dict(tensor=dict(mode="2d")), 4, "needs size="),
    (dict(tensor=dict(size=4, mode="2d", depth=2)), 4, "depth=2 belongs to mode '2.5d'"),
    (dict(tensor=dict(size=8, mode="2.5d", depth=3)), 8, "q\\*q\\*depth"),
    (dict(tensor=dict(size=4, mode="2d", width=2)), 4, r"unknown \['width'\]"),
    (dict(tensor=dict(size=4, mode="sequence", depth=2)), 4, "belong to other modes"),
    (dict(tensor=dict(mode="sequence")), 4, "needs size="),
    (dict(tensor="4"), 4, "expected a number"),
    (dict(tensor=True), 1, "expected a number"),
    (dict(tensor=dict(size="4", mode="1d")), 4, "needs size="),
    (dict(pipeline=0), 1, "expected a number of at least 1"),
    (dict(pipeline="2"), 2, "expected a number"),
    (dict(pipeline=dict(size=2, stages=3)), 2, r"unknown \['stages'\]"),
    (dict(pipeline=dict(size=2, schedule="1F1B")), 2, "schedule='1F1B': expected 'gpipe', '1f1b'"),
    (dict(pipeline=dict(size=2, microbatches=0)), 2, "microbatches=0: expected a number of at least 1"),
    (dict(pipeline=3), 4, "4 ranks do not divide by pipeline 3 x tensor 1"),
    (dict(pipelines=2), 2, r"unknown \['pipelines'\]"),
    (dict(data=1, tensor=dict(size=4, mode="2d")), 8, "data=1 x pipeline 1 x tensor 4: the job has 8 ranks"),
    (dict(tensor=dict(size=8, mode="1d")), 12, "12 ranks do not divide by pipeline 1 x tensor 8 = 8: start a multiple of 8"),
    (dict(tensor=dict(size=3, mode="1d")), 4, "4 ranks do not divide"),
    (dict(data=dict(size=2, shard="grads")), 2, "shard='grads': expected None"),
    (dict(data=dict(size=2, zero=3)), 2, r"unknown \['zero'\]"),
    (dict(data=3, tensor=dict(size=4, mode="2d")), 8, "data=3 x pipeline 1 x tensor 4: the job has 8 ranks"),
    ([2, 4], 8, r"expected dict\(pipeline"),
]


@pytest.mark.parametrize(("parallel", "world", "meaning"), LEGAL, ids=str)
def test_legal_examples(parallel: dict[str, Any], world: int, meaning: Any) -> None:
    if isinstance(meaning, str):
        with pytest.raises(NotImplementedError, match=meaning):
            parse_parallel(parallel, world)
        return
    axes = axes_of(**{"mode": None, **parse_parallel(parallel, world)})
    assert tuple(_parts(axes, names) for names in (axes.m, axes.n, axes.k)) == meaning
    assert axes.size * parse_pipeline(parallel)["size"] == world
    assert parse_parallel(parallel).items() <= parse_parallel(parallel, world).items()  # without a world data's size is not known


def _parts(axes: Any, names: tuple[str, ...]) -> int:
    size = 1
    for name in names:
        size *= axes.sizes[name]
    return size


@pytest.mark.parametrize(("parallel", "world", "message"), ILLEGAL, ids=str)
def test_illegal_examples(parallel: Any, world: int, message: str) -> None:
    with pytest.raises(gingham.MeshError, match=message):
        parse_parallel(parallel, world)


def test_pipeline_2_equals_pipeline_of_size_2() -> None:
    forms = [dict(pipeline=pipeline, tensor=dict(size=4, mode="1d")) for pipeline in (2, dict(size=2))]
    assert parse_parallel(forms[0], 8) == parse_parallel(forms[1], 8) and parse_pipeline(forms[0]) == parse_pipeline(forms[1])


def test_init_reads_it_and_refuses_before_it_starts_anything(ranks: Any) -> None:
    def run(rank: int) -> tuple[int, ...]:
        import torch

        for parallel, error in (
            (dict(tensor=4), gingham.MeshError),
            (dict(pipeline=2, tensor=dict(size=3, mode="1d")), gingham.MeshError),
        ):
            with pytest.raises(error):
                gingham.init(parallel=parallel)
            assert not torch.distributed.is_initialized()
        with pytest.raises(gingham.MeshError, match="excludes"):
            gingham.init(mode="3d", parallel=dict(tensor=dict(size=8, mode="3d")))
        return gingham.init(parallel=dict(pipeline=1, tensor=dict(size=8, mode="2.5d", depth=2))).grid

    assert ranks(8)(run) == [(4, 2, 1)] * 8
