"""The C++ core's names, in one place: no other module imports _C."""

from ._C import Attention as Attention
from ._C import Axis as Axis
from ._C import Engine as Engine
from ._C import Job as Job
from ._C import Label as Label
from ._C import Operand as Operand
from ._C import Program as Program
from ._C import Step as Step
from ._C import blas as blas
from ._C import crc32c as crc32c
from ._C import device_report as device_report
from ._C import dropout as dropout
from ._C import gelu_backward as gelu_backward
from ._C import handed_engine as handed_engine
from ._C import hopper_status as hopper_status
from ._C import keep_links_alive as keep_links_alive
from ._C import max_host_ranks as max_host_ranks
from ._C import max_ranks as max_ranks
from ._C import set_nccl_path as set_nccl_path
from ._C import set_num_threads as set_num_threads
from ._C import set_ucx_path as set_ucx_path
from ._C import shut_links as shut_links
from ._C import shut_silent_links as shut_silent_links
from ._C import ucx_engine as ucx_engine
from ._C import ucx_report as ucx_report
from ._C import version as version
