"""Ranks whose tensors lie on the GPU, for a run of the tests on a machine that has one: GINGHAM_DEVICE=cuda and a torch that sees it.

A test makes its tensors as on the CPU. In a rank process (pool.py) they are the GPU's: torch's default device is, what a generator of
the CPU draws is moved there, and so is all that comes from the test's own process, whose tensors stay the CPU's. Results go back as the
CPU's. What a twin in the test's own process draws without a generator has other bits than on a rank: such a twin computes on a rank.
"""

import io
import os
import pickle
from collections.abc import Callable
from typing import Any

import cloudpickle
import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode

PLAIN = (torch.Tensor, torch.nn.Parameter)

# What meshes of GPUs do not do: its tests are left out there, and nothing else is. By the words that stand in the skip's reason.
WINDOWS = "a mesh of GPUs refuses source='window' and link=: panels move through rings"
ANEW = "where memory runs out on a GPU the job is over (a GPU cannot take back what is queued): PeerOutOfMemory, then destroy and init"
HEAP = "the shared heap and its limits are the CPU's: on GPUs torch's allocator gives tensors and workspace, and is asked each time"
LEFT_OUT = {
    "test_b1_memory_that_runs_out_is_an_exception_on_all_and_the_mesh_goes_on": ANEW,
    "test_b1_memory_that_runs_out_between_calls_is_told_at_the_next": ANEW,
    "test_memory_that_runs_out_in_one_mesh_leaves_the_other_alone": ANEW,
    "test_steady_state_takes_no_more_memory": HEAP,
    "test_b8_the_heap_is_rank_0s_for_all": HEAP,
    "test_b2_a_memory_cgroup_is_asked_before_memory_is_taken": HEAP,
}


def wanted() -> bool:
    return os.environ.get("GINGHAM_DEVICE") == "cuda" and torch.cuda.is_available()


def left_out(name: str, parameters: dict[str, Any]) -> str | None:
    """Why a test, with its parameters, is not for GPUs."""
    slowed = parameters.get("link") is not None or parameters.get("op") == "amid"
    return WINDOWS if slowed or parameters.get("source") == "window" else LEFT_OUT.get(name)


class DrawnOnCpu(TorchFunctionMode):
    """Functions that are given a generator of the CPU draw there, and their result is moved: the same bits as without a GPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is None or generator.device.type != "cpu" or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        first = args[0] if args else kwargs.get("tensor")  # torch.nn.init's
        if not isinstance(first, torch.Tensor):
            return func(*args, **kwargs, device="cpu").to(self.device)
        if type(first) not in PLAIN or first.device.type == "cpu":
            return func(*args, **kwargs)
        drawn = func(first.detach().cpu(), *args[1:], **{name: each for name, each in kwargs.items() if name != "tensor"})
        with torch.no_grad():
            return first.copy_(drawn) if func.__name__.endswith("_") else drawn.to(first.device)


def begin(rank: int) -> None:
    """From here on this rank's process, the calling thread, makes its tensors on the GPU that gingham.init gives the rank."""
    if wanted() and not isinstance(_get_current_function_mode(), DrawnOnCpu):
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.set_default_device(device)
        DrawnOnCpu(device).__enter__()
        redistribute_through_the_host()


def redistribute_through_the_host() -> None:
    """DTensor.full_tensor of ranks that share a GPU: torch's NCCL refuses them, and its Gloo ends in a segmentation fault where it waits
    for gathered CUDA tensors (torch 2.11), so the blocks are gathered as the CPU's."""
    from torch.distributed.tensor import _redistribute

    from gingham.launch.gpu import ranks_share_gpus

    given = _redistribute.redistribute_local_tensor
    if not ranks_share_gpus() or hasattr(given, "given"):
        return

    def moved(local: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return given(local.cpu(), *args, **kwargs).to(local.device)

    moved.given = given  # type: ignore[attr-defined]
    _redistribute.redistribute_local_tensor = moved


def told_in_time(call: Callable[[], Any]) -> None:
    """A call with wrong indices, which raises at once on the CPU. On a GPU the next call that looks at indices once the device has got
    there raises it: here the same one again."""
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        call()


def end() -> None:
    mode = _get_current_function_mode()
    if isinstance(mode, DrawnOnCpu):
        mode.__exit__(None, None, None)
        torch.set_default_device(None)


def follow_init(patch: Any) -> None:
    """A mesh in the test's own process: its tensors are the GPU's while there is one."""
    import gingham

    init, destroy = gingham.init, gingham.destroy

    def begun(*args: Any, **kwargs: Any) -> Any:
        mesh = init(*args, **kwargs)
        begin(0)
        return mesh

    def ended(*args: Any, **kwargs: Any) -> None:
        destroy(*args, **kwargs)
        end()

    patch.setattr(gingham, "init", begun)
    patch.setattr(gingham, "destroy", ended)


class _Pickler(cloudpickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) in PLAIN and value.device.type != "cpu":
            here = value.detach().cpu()
            here = torch.nn.Parameter(here) if isinstance(value, torch.nn.Parameter) else here
            return here.requires_grad_(value.requires_grad).__reduce_ex__(2)
        return super().reducer_override(value)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if (module, name) != ("torch._utils", "_rebuild_tensor_v2"):
            return found
        return lambda *args: found(*args).to(torch.get_default_device())


def dumps(value: Any) -> bytes:
    """Of a rank's result, with its tensors as the CPU's."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


def loads(message: bytes) -> Any:
    """What the test's process sent to a rank, with its tensors on the rank's default device."""
    return _Unpickler(io.BytesIO(message)).load()
