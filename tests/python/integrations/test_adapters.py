"""peft around models that a mesh holds: files and state dicts of adapters as in one process, and what is refused by name."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import families
from grids import GRIDS, relative

TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "llama": ["q_proj", "v_proj", "down_proj"]}


def around(model: Any, family: str, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS[family], init_lora_weights=False, **options))
    return model.eval()


def difference(model: Any, serial: Any, family: str) -> float:
    inputs = {name: value for name, value in families.batch(family).items() if name != "labels"}
    with torch.no_grad():
        return relative(model(**inputs).logits, serial(**inputs).logits)


def written(rank: int, folder: Path, family: str, late: bool) -> dict[str, float]:
    import peft
    from safetensors.torch import load_file

    import gingham

    mesh = gingham.init(**GRIDS["2d"])
    serial = around(families.build(family), family)
    before = None if late else gingham.parallelize(copy.deepcopy(serial), mesh)
    model = before or around(gingham.parallelize(families.build(family), mesh), family)
    found = {"as it is": difference(model, serial, family)}
    model.save_pretrained(folder / "mesh", True)
    if rank == 0:
        serial.save_pretrained(folder / "serial")
        names = [sorted(path.name for path in (folder / each).iterdir()) for each in ("mesh", "serial")]
        assert names[0] == names[1], names
    torch.distributed.barrier()
    got, expected = (load_file(folder / each / "adapter_model.safetensors") for each in ("mesh", "serial"))
    assert got.keys() == expected.keys()
    found["file"] = max(relative(got[name], truth) for name, truth in expected.items())
    states = [peft.get_peft_model_state_dict(each) for each in (model, serial)]
    assert states[0].keys() == states[1].keys()
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.zero_()
    assert not peft.set_peft_model_state_dict(model, states[1]).unexpected_keys
    found["set"] = difference(model, serial, family)
    model.load_adapter(str(folder / "mesh"), "again")
    model.set_adapter("again")
    found["loaded"] = difference(model, serial, family)
    with model.disable_adapter():
        found["without"] = difference(model, families.build(family), family)
    if family != "gpt2":
        merged = model.merge_and_unload()
        merged.save_pretrained(folder / "merged")
        found["merged"] = difference(type(merged).from_pretrained(folder / "merged").eval(), serial, family)
    return found


@pytest.mark.parametrize(("family", "late"), [("gpt2", True), ("llama", False)])
def test_c7_adapters_are_saved_and_loaded_as_in_one_process(ranks, tmp_path: Path, family: str, late: bool) -> None:
    for found in ranks(4)(written, tmp_path, family, late):
        assert max(found.values()) <= 2e-6, found


def trained(rank: int) -> list[list[str]]:
    import gingham

    mesh = gingham.init(**GRIDS["2d"])
    found = []
    for model in (gingham.parallelize(families.build("gpt2"), mesh), families.build("gpt2")):
        adapted = around(model, "gpt2", bias="lora_only")
        adapted(**families.batch("gpt2")).loss.backward()
        found.append(sorted(families.plain(adapted)))
    return found


def test_c7_lora_only_trains_the_bias_of_a_weight_held_as_three(ranks) -> None:
    mine, serial = ranks(4)(trained)[0]
    assert mine == serial


def refused(rank: int) -> dict[str, str]:
    import peft

    import gingham

    mesh = gingham.init(**GRIDS["2d"])
    found = {}

    def say(name: str, call: Any) -> None:
        with pytest.raises((NotImplementedError, AttributeError)) as raised:
            call()
        found[name] = str(raised.value)

    linears: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    tokens: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    configs = {kind: getattr(peft, kind)(**tokens) for kind in ("PrefixTuningConfig", "PromptTuningConfig")}
    configs |= {f"{kind}Config": getattr(peft, f"{kind}Config")(**linears) for kind in ("LoHa", "LoKr", "OFT", "Vera", "HRA")}
    configs["IA3Config"] = peft.IA3Config(**linears, feedforward_modules=[])
    configs["AdaLoraConfig"] = peft.AdaLoraConfig(**linears, total_step=10)
    configs["TrainableTokensConfig"] = peft.TrainableTokensConfig(token_indices=[1, 2])
    configs["AdaptionPromptConfig"] = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    configs["LoraConfig(trainable_token_indices"] = peft.LoraConfig(**linears, trainable_token_indices=[1, 2])
    configs["LoraConfig(use_dora"] = peft.LoraConfig(**linears, use_dora=True)
    configs["LoraConfig(alora_invocation_tokens"] = peft.LoraConfig(**linears, alora_invocation_tokens=[1], task_type="CAUSAL_LM")
    for kind, config in configs.items():
        say(f"{kind} before", lambda config=config: gingham.parallelize(peft.get_peft_model(families.build("llama"), config), mesh))
    converted = gingham.parallelize(families.build("llama"), mesh)
    configs["LoraConfig(init_lora_weights='pissa'"] = peft.LoraConfig(**linears, init_lora_weights="pissa")
    for kind, config in configs.items():
        say(f"{kind} after", lambda config=config: peft.get_peft_model(converted, config))
    say("IA3Config without a PeftModel", lambda: peft.inject_adapter_in_model(configs["IA3Config"], converted))
    model = around(gingham.parallelize(families.build("gpt2"), mesh), "gpt2")
    say("merge", model.merge_adapter)
    say("combine", lambda: model.add_weighted_adapter(["default"], [0.5], "half"))
    return found


def test_c7_adapters_and_merges_of_whole_tensors_are_refused_by_name(ranks) -> None:
    found = ranks(4)(refused)[0]
    for name, message in found.items():
        expected = {"merge": "q.weight", "combine": "combine them on a model"}.get(name, "use peft.LoraConfig")
        assert expected in message and (name.split()[0] in message or name in ("merge", "combine")), (name, message)
