"""What a mutation is: a change of one place of csrc that one rung must find."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    name: str
    kind: str  # gemm, sm90, cast, sums, host ...
    file: str  # below csrc
    old: str  # stands there once
    new: str
    rung: int
    unit: str  # the .cu that is compiled anew
    checks: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    mutation: Mutation
    caught: bool
    said: str
    seconds: float


def host(name: str, kind: str, file: str, old: str, new: str, *checks: str) -> Mutation:
    return Mutation(name, kind, file, old, new, 5, "", checks)
