"""Backward passes run in the thread that has a mesh on a GPU, from the first init to the end of the last mesh or an init that fails."""

import threading

import torch

import gingham

before = torch._C._is_multithreading_enabled()
assert before
gingham.init(device="cuda")
other = gingham.init(default=False)
elsewhere: list[bool] = []
thread = threading.Thread(target=lambda: elsewhere.append(torch._C._is_multithreading_enabled()))
thread.start()
thread.join()
seen = [torch._C._is_multithreading_enabled()]
gingham.destroy(other)
seen.append(torch._C._is_multithreading_enabled())
gingham.destroy()
assert (seen, elsewhere) == ([False, False], [True]), (seen, elsewhere)
assert torch._C._is_multithreading_enabled()
torch.autograd.set_multithreading_enabled(False)
gingham.init(device="cuda")
gingham.destroy()
assert not torch._C._is_multithreading_enabled()  # as it was found
