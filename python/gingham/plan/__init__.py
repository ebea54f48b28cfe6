"""What layers move and hold on any grid, and which grid a model should train on: arithmetic, without the core and without torch."""

from .choose import Machine as Machine
from .workload import Workload as Workload
