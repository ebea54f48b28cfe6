"""accelerate's view of the job: one process, whose number is the rank, so that rank 0 alone prints and writes."""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

from .hooks import around, shared_mesh

KEPT = "_gingham_before"  # what the state held before a mesh changed it


def install(module: Any) -> None:
    """module: accelerate.state."""
    for state in (module.PartialState, module.AcceleratorState):
        _look_again(state)
    # Accelerator.end_training ends a process group; the mesh's is gingham.destroy's to end
    around(module.PartialState, "destroy_process_group", lambda mesh, original, self, group=None: None)
    divided = module.PartialState.use_distributed

    # what is decorated with on_main_process runs on rank 0 only, though there is one process to share data with
    module.PartialState.use_distributed = property(lambda self: shared_mesh() is not None or divided.fget(self))


def _look_again(state: Any) -> None:
    begin = state.__init__

    @wraps(begin)
    def begin_and_look(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        refresh()

    state.__init__ = begin_and_look


def refresh() -> None:
    """Makes the states that exist say one process while ranks share a batch, and what they said before once the mesh is gone."""
    module: Any = sys.modules["accelerate.state"]
    mesh = shared_mesh()
    for state in (module.PartialState._shared_state, module.AcceleratorState._shared_state):
        if "distributed_type" not in state:
            continue
        if mesh is not None:
            names = ("distributed_type", "num_processes", "process_index", "local_process_index", "device")
            state.setdefault(KEPT, {name: state[name] for name in names if name in state})
            state.update(
                distributed_type=module.DistributedType.NO,
                num_processes=1,
                process_index=mesh.index,
                local_process_index=mesh.index,
                device=mesh.device,
            )
        elif KEPT in state:
            state.update(state.pop(KEPT))
