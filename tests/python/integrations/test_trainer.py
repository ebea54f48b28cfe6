"""transformers.Trainer on a mesh beside the same Trainer in one process: losses, norms, evaluation, files, a resumed run."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gingham
from families import VOCABULARY, build
from grids import GRIDS, ranks_of


def made(family: str) -> Any:
    return build(family, **({} if family == "gpt2" else {"vocab_size": 64}))


def samples(family: str, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Token sequences and which positions count."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(2, VOCABULARY, (10,), generator=generator)
        labels = torch.where(torch.rand(10, generator=generator) < 0.3, torch.tensor(-100), ids)
        rest = {"token_type_ids": torch.zeros_like(ids)} if family == "bert" else {"attention_mask": torch.ones_like(ids)}
        found.append({"input_ids": ids, "labels": labels} | rest)
    return found


def right(predicted: Any) -> dict[str, float]:
    kept = predicted.label_ids != -100
    return {"right": float((predicted.predictions.argmax(-1) == predicted.label_ids)[kept].mean()), "count": float(kept.sum())}


def train(folder: Path, family: str, model: Any, resume: str | None = None, **changed: Any) -> dict[str, Any]:
    """Losses and norms of every step, metrics of the evaluations, and what was predicted."""
    import transformers as hf

    options: dict[str, Any] = dict(
        max_steps=20, per_device_train_batch_size=6, per_device_eval_batch_size=5, logging_steps=1, eval_strategy="steps", eval_steps=10,
        save_steps=10, learning_rate=3e-3, max_grad_norm=0.5, seed=3, report_to=[], disable_tqdm=True, use_cpu=True, weight_decay=0.1,
        dataloader_num_workers=0, load_best_model_at_end=True,
    )  # fmt: skip
    arguments = hf.TrainingArguments(output_dir=str(folder), **(options | changed))
    trainer = hf.Trainer(
        model=model, args=arguments, train_dataset=samples(family, 31, 1), eval_dataset=samples(family, 13, 2), compute_metrics=right
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "last"))
    history = trainer.state.log_history
    found = {
        name: [entry[name] for entry in history if name in entry] for name in ("loss", "grad_norm", "eval_loss", "eval_right", "eval_count")
    }
    return found | {"logits": trainer.predict(samples(family, 7, 4)).predictions, "world": arguments.world_size}


def on_mesh(rank: int, family: str, options: dict[str, Any], folder: Path, resume: str | None, changed: dict[str, Any]) -> dict[str, Any]:
    mesh = gingham.init(**options)
    return train(folder, family, gingham.parallelize(made(family), mesh), resume, **changed)


def same(got: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    for name in ("loss", "grad_norm", "eval_loss", "eval_right"):
        assert got[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name
    assert got["eval_count"] == expected["eval_count"]
    assert np.abs(got["logits"] - expected["logits"]).max() < 20 * tolerance


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "family"),
    [("2d", "bert"), pytest.param("2.5d", "llama", marks=pytest.mark.matrix), pytest.param("2d", "gpt2", marks=pytest.mark.matrix)],
)
def test_c2_trainer_trains_saves_and_resumes_as_one_process(ranks, tmp_path: Path, name: str, family: str) -> None:
    expected = train(tmp_path / "serial", family, made(family))
    for got in ranks(ranks_of(name))(on_mesh, family, GRIDS[name], tmp_path / "mesh", None, {}):
        same(got, expected)
        assert got["world"] == 1
    assert files(tmp_path / "mesh") - files(tmp_path / "serial") <= {f"checkpoint-{step}/gingham_dropout.json" for step in (10, 20)}
    assert files(tmp_path / "serial") <= files(tmp_path / "mesh")
    mine, theirs = (load_file(tmp_path / where / "last" / "model.safetensors") for where in ("mesh", "serial"))
    assert mine.keys() == theirs.keys()
    assert all((mine[key] - theirs[key]).abs().max() < 1e-4 for key in theirs)
    again = type(made(family)).from_pretrained(tmp_path / "mesh" / "last")
    assert all(torch.equal(value, mine[key]) for key, value in again.state_dict().items() if key in mine)
    for got in ranks(ranks_of(name))(on_mesh, family, GRIDS[name], tmp_path / "mesh", str(tmp_path / "mesh" / "checkpoint-10"), {}):
        same(got, expected)
    # GPT-2's c_attn is one parameter in the file and three on the mesh
    back = train(tmp_path / "mesh", family, made(family), str(tmp_path / "mesh" / "checkpoint-10"))
    same(back, expected)
    shutil.copytree(tmp_path / "serial" / "checkpoint-10", tmp_path / "from_serial" / "checkpoint-10")
    folder = tmp_path / "from_serial"
    for got in ranks(ranks_of(name))(on_mesh, family, GRIDS[name], folder, str(folder / "checkpoint-10"), {}):
        assert got["loss"][10:] == pytest.approx(expected["loss"][10:], rel=1e-5)
