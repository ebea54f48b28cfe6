"""transformers.Trainer on a mesh: trains, evaluates, saves and resumes as in one process.

Every rank goes through all of it; rank 0 writes the files that one process writes, with full tensors, so that a run goes on from them
on any grid and from_pretrained reads them.
"""

from __future__ import annotations

from typing import Any

from ..errors import MeshError
from ..mesh import Mesh
from .hooks import around, shared_mesh
from .one_process import refresh
from .parallel_wrappers import on_a_mesh
from .states import FullState, full_model, read_calls, wait, write_calls

_seed_worker: Any = None


def install(module: Any) -> None:
    """module: transformers.trainer."""
    global _seed_worker
    _seed_worker, module.seed_worker = module.seed_worker, seed_worker
    around(module.Trainer, "__init__", _begin)
    around(module.Trainer, "_save", _save)
    around(module.Trainer, "_save_checkpoint", _save_checkpoint)
    around(module.Trainer, "_save_optimizer_and_scheduler", _save_optimizer)
    around(module.Trainer, "_save_rng_state", _save_generators)
    around(module.Trainer, "_load_rng_state", _load_generators)


def seed_worker(worker_id: int, num_workers: int, rank: int) -> None:
    """Workers of all ranks draw alike: they make the same batches."""
    _seed_worker(worker_id, num_workers, 0 if shared_mesh() is not None else rank)


def _begin(mesh: Mesh, original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    refresh()  # TrainingArguments may be older than the mesh
    original(self, *args, **kwargs)
    if self.model is not None and on_a_mesh(self.model) is None:
        raise MeshError(
            f"Trainer: rank {mesh.rank} of {mesh.size} got a {type(self.model).__name__} that is not on the mesh, so that every rank would"
            " train all of it; expected model = gingham.parallelize(model), or no gingham.init"
        )


def _save(mesh: Mesh, original: Any, self: Any, output_dir: Any = None, state_dict: Any = None) -> None:
    """Every rank is here; those that write nothing take part in the gathering."""
    folder = output_dir if output_dir is not None else self.args.output_dir
    model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
    if not callable(getattr(model, "save_pretrained", None)) and state_dict is None:
        state_dict = full_model(model, f"Trainer's save to {folder}")
    if self.args.should_save:
        original(self, output_dir, state_dict)
    elif callable(getattr(model, "save_pretrained", None)):
        model.save_pretrained(folder, state_dict=state_dict, is_main_process=False)
    wait("Trainer's save")


def _save_checkpoint(mesh: Mesh, original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    wait("Trainer's checkpoint")  # whoever reads it next finds it complete


def _save_optimizer(mesh: Mesh, original: Any, self: Any, output_dir: Any) -> None:
    optimizer = self.optimizer
    self.optimizer = FullState(optimizer, mesh.index)
    try:
        original(self, output_dir)
    finally:
        self.optimizer = optimizer


def _save_generators(mesh: Mesh, original: Any, self: Any, output_dir: Any) -> None:
    if mesh.index == 0:
        original(self, output_dir)
    write_calls(self.model, output_dir, mesh.index)


def _load_generators(mesh: Mesh, original: Any, self: Any, checkpoint: Any) -> None:
    original(self, checkpoint)
    if checkpoint is not None:
        read_calls(self.model, checkpoint)
