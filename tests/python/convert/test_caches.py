"""Caches of keys and values at a converted model's border: known by what they can do, whatever a release calls them."""

import inspect
from typing import Any

import families


def caches(rank: int) -> dict[str, str]:
    import torch
    from transformers import DynamicCache
    from transformers.utils import ModelOutput

    import gingham
    from gingham.convert.inputs import Border

    mesh = gingham.init(mode="2d", size=4)
    model = gingham.parallelize(families.build("llama").eval(), mesh)
    found = {}
    for name in ("past_key_values", "cache", "memory"):
        cache = DynamicCache(config=model.config)
        Border(model, mesh, "full", "outer", 0, None)._fields(model, ModelOutput({name: cache}), None)
        found[name] = attempt(lambda cache=cache: cache.reorder_cache(torch.arange(2)))
    ids = families.batch("llama", rows=4)["input_ids"]
    mine = DynamicCache(config=model.config)
    takes = inspect.signature(model.forward).parameters
    model(ids, **{"cache" if "cache" in takes else "past_key_values": mine})
    found["given"] = attempt(lambda: mine.batch_repeat_interleave(2))
    found["beams"] = attempt(lambda: model.generate(ids, num_beams=2, max_new_tokens=3))
    return found


def attempt(call: Any) -> str:
    try:
        return f"nothing was raised: {call()}"
    except NotImplementedError as error:
        return str(error)


def test_c3_reordering_a_cache_of_cut_rows_is_refused_whatever_its_field_is_called(ranks) -> None:
    for found in ranks(4)(caches):
        for name, words in found.items():
            assert "reorders rows" in words, (name, words)
