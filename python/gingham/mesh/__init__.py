"""The grid: modes, layouts, the mesh that calls run on, and the DTensors that live on it."""

from .mesh import Axes as Axes
from .mesh import Mesh as Mesh
from .mesh import any_mesh as any_mesh
from .mesh import axes_of as axes_of
from .mesh import axes_of_device_mesh as axes_of_device_mesh
from .mesh import check_local as check_local
from .mesh import current as current
from .mesh import cuts_of as cuts_of
from .mesh import has_mesh as has_mesh
from .mesh import mesh_among as mesh_among
from .mesh import mesh_of as mesh_of
from .mesh import mesh_on as mesh_on
from .mesh import neighbours as neighbours
from .mesh import set_current as set_current
from .zigzag import is_zigzag as is_zigzag
