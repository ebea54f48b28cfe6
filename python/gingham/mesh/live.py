"""What lives in the processes of a job: a copy of whatever holds it holds the same one, and nothing of it can be stored."""

from __future__ import annotations

from typing import Any, Self


class Live:
    """Shared by copies; refuses to be pickled."""

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a {type(self).__name__}, and a layer or model that stands on it, cannot be pickled: it lives in the processes of its job."
            " Use gingham.save, gingham.export_safetensors or the full_tensor() of each entry of state_dict(); copy.deepcopy works"
        )
