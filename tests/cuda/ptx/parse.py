"""PTX text -> Module: entries with their parameters, registers, shared and local variables, and instructions.

Grammar as in the PTX ISA manual, section 4 (syntax) and 5 (state spaces, types, variables). Only what nvcc writes is read;
anything else is an error with its line. Inline assembly may open scopes `{ .reg .pred p; ... }`: names declared there are
renamed, labels too.
"""

import re
import struct
from dataclasses import dataclass, field

WIDTH = {
    "pred": 1,
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    "b128": 16, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "tf32": 4,
}  # fmt: skip


class PtxError(Exception):
    """What the interpreter refuses: an unknown opcode, an access out of bounds, a deadlock."""


@dataclass(frozen=True)
class Reg:
    name: str


@dataclass(frozen=True)
class Imm:
    bits: int  # of an integer, or of the float below
    real: str = ""  # "f" or "d" where the bits are those of a float32 or float64


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Vec:
    items: tuple["Operand", ...]


@dataclass(frozen=True)
class Address:
    base: "Operand"
    offset: int = 0
    coords: tuple["Operand", ...] = ()


Operand = Reg | Imm | Symbol | Vec | Address


@dataclass
class Instr:
    text: str
    line: int
    opcode: str
    mods: tuple[str, ...]
    operands: list[Operand]
    guard: str = ""  # predicate register
    negated: bool = False
    target: str = ""  # branch target, resolved
    index: int = 0

    def __str__(self) -> str:
        return f"line {self.line}: {' '.join(self.text.split())}"


@dataclass
class Variable:
    name: str
    space: str  # shared, local, global, const, param
    size: int
    align: int
    data: bytes = b""
    dynamic: bool = False  # extern .shared x[]


@dataclass
class Entry:
    name: str
    params: list[Variable] = field(default_factory=list)
    regs: dict[str, str] = field(default_factory=dict)  # name -> type
    variables: list[Variable] = field(default_factory=list)
    instrs: list[Instr] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)  # .branchtargets
    threads: int = 0  # .maxntid or .reqntid, 0 where not given
    unread: tuple[str, int] | None = None  # the body's text and first line: read when it is asked for

    def whole(self) -> "Entry":
        if self.unread:
            Body(self, *self.unread).parse()
            self.unread = None
        return self


@dataclass
class Module:
    target: str
    entries: dict[str, Entry]
    variables: list[Variable]

    def find(self, *parts: str) -> Entry:
        """The one entry whose mangled name contains all parts."""
        found = [entry for name, entry in self.entries.items() if all(part in name for part in parts)]
        if len(found) != 1:
            raise PtxError(f"{len(found)} entries contain {parts} among {sorted(self.entries)}")
        return found[0].whole()


NUMBER = re.compile(r"-?(0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|\d+\.\d*(?:[eE][-+]?\d+)?|\d+U?)$")


def number(text: str) -> Imm | None:
    if not NUMBER.match(text):
        return None
    sign, body = (-1, text[1:]) if text.startswith("-") else (1, text)
    if body[:2] in ("0f", "0F") and len(body) == 10:
        return Imm(int(body[2:], 16) ^ (0x80000000 if sign < 0 else 0), "f")
    if body[:2] in ("0d", "0D") and len(body) == 18:
        return Imm(int(body[2:], 16) ^ (1 << 63 if sign < 0 else 0), "d")
    if "." in body:
        return Imm(struct.unpack("<Q", struct.pack("<d", sign * float(body)))[0], "d")
    return Imm(sign * int(body.rstrip("U"), 0))


def split(text: str) -> list[str]:
    """At commas outside of brackets and braces."""
    out, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            out.append(text[start:at].strip())
            start = at + 1
    rest = text[start:].strip()
    return [*out, rest] if rest else out


def variable(text: str, space: str) -> Variable:
    """`.align 8 .b8 name[32] = {..}` or `.u64 .ptr .global .align 1 name`."""
    head, _, init = text.partition("=")
    align = re.search(r"\.align\s+(\d+)", head)
    kind = next(word for word in re.findall(r"\.(\w+)", head) if word in WIDTH)
    match = re.search(r"([$%\w]+)((?:\s*\[\s*\d*\s*\])*)\s*$", head)
    if match is None:
        raise PtxError(f"variable {text!r}")
    name, dims = match.group(1), re.findall(r"\[\s*(\d*)\s*\]", match.group(2))
    count = 1
    for dim in dims:
        count *= int(dim or 0)
    width = WIDTH[kind]
    data = b""
    if init:
        for word in split(init.strip().strip("{}")):
            value = number(word)
            if value is None:
                raise PtxError(f"initialiser {word!r} of {name}")
            data += (value.bits & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    stated = int(align.group(1)) if align and ".ptr" not in head else width
    return Variable(name, space, count * width, stated, data, dynamic=dims == [""])


class Scope:
    """Names of registers and labels visible at a place of the body."""

    def __init__(self, parent: "Scope | None", number_: int) -> None:
        self.parent, self.number = parent, number_
        self.names: dict[str, str] = {}

    def declare(self, name: str) -> str:
        self.names[name] = name if self.parent is None else f"{name}@{self.number}"
        return self.names[name]

    def find(self, name: str) -> str | None:
        scope: Scope | None = self
        while scope:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        return None


LABEL = re.compile(r"([$%\w]+)\s*:(?!:)")


class Body:
    """The statements between the braces of an entry."""

    def __init__(self, entry: Entry, text: str, line: int) -> None:
        self.entry, self.text, self.line = entry, text, line
        self.scopes = 0
        self.pending: list[tuple[Instr, list[str], Scope]] = []

    def parse(self) -> None:
        scope, at, text = Scope(None, 0), 0, self.text
        line, counted = self.line, 0
        while at < len(text):
            char = text[at]
            if char.isspace():
                at += 1
            elif char == "{":
                self.scopes += 1
                scope, at = Scope(scope, self.scopes), at + 1
            elif char == "}":
                assert scope.parent is not None
                scope, at = scope.parent, at + 1
            elif label := LABEL.match(text, at):
                self.entry.labels[scope.declare(label.group(1))] = len(self.entry.instrs)
                at = label.end()
            else:
                end = text.index(";", at)
                line, counted = line + text.count("\n", counted, at), at
                self.statement(text[at:end].strip(), line, scope)
                at = end + 1
        for instr, words, where in self.pending:
            instr.operands = [self.operand(word, where) for word in words]
            if instr.opcode == "bra":
                instr.target = self.symbol(words[0], where)

    def symbol(self, word: str, scope: Scope) -> str:
        return scope.find(word) or word

    def statement(self, text: str, line: int, scope: Scope) -> None:
        if text.startswith(".reg"):
            kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
            for name in split(names):
                many = re.match(r"(.*)<(\d+)>$", name)
                for one in [f"{many.group(1)}{i}" for i in range(int(many.group(2)))] if many else [name]:
                    self.entry.regs[scope.declare(one)] = kind
        elif text.startswith(".branchtargets"):
            name = next(label for label, at in reversed(self.entry.labels.items()) if at == len(self.entry.instrs))
            self.entry.tables[name] = [word.strip() for word in text.removeprefix(".branchtargets").split(",")]
        elif match := re.match(r"\.(shared|local)\b(.*)", text, re.DOTALL):
            self.entry.variables.append(variable(match.group(2), match.group(1)))
        elif text and not re.match(r"\.(loc|pragma|file)\b", text):
            self.instruction(text, line, scope)

    def instruction(self, text: str, line: int, scope: Scope) -> None:
        match = re.match(r"(?:@(!?)([%$\w]+)\s+)?([a-z_0-9]+)((?:\.[\w:]+)*)\s*(.*)$", text, re.DOTALL)
        if match is None:
            raise PtxError(f"line {line}: cannot read {text!r}")
        negated, guard, opcode, mods, rest = match.groups()
        instr = Instr(text, line, opcode, tuple(mods.split(".")[1:]), [], negated=bool(negated), index=len(self.entry.instrs))
        instr.guard = self.symbol(guard, scope) if guard else ""
        self.entry.instrs.append(instr)
        self.pending.append((instr, split(rest), scope))

    def operand(self, word: str, scope: Scope) -> Operand:
        if word.startswith("{"):
            return Vec(tuple(self.operand(item, scope) for item in split(word[1:-1])))
        if word.startswith("["):
            parts = split(word[1:-1])
            base = re.match(r"([$%\w.]+)\s*(?:\+\s*(-?\w+))?$", parts[0])
            if base is None:
                raise PtxError(f"address {word!r}")
            coords = self.operand(parts[1], scope) if len(parts) > 1 else Vec(())
            assert isinstance(coords, Vec)
            return Address(self.operand(base.group(1), scope), int(base.group(2) or "0", 0), coords.items)
        if "|" in word:
            return Vec(tuple(self.operand(item.strip(), scope) for item in word.split("|")))
        if word.startswith("!"):
            return Vec((Symbol("!"), self.operand(word[1:].strip(), scope)))
        value = number(word)
        if value is not None:
            return value
        found = self.symbol(word, scope)
        if found in self.entry.regs:
            return Reg(found)
        return Symbol(found)


def strip_comments(text: str) -> str:
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"/\*.*?\*/", lambda found: "\n" * found.group().count("\n"), text, flags=re.DOTALL)


def closing(text: str, at: int) -> int:
    """Of the brace that opens at `at`."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    raise PtxError("a brace is left open")


HEADER = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.(entry|func)\b")
GLOBAL = re.compile(r"(?:\.(?:visible|weak|extern|common)\s+)*\.(global|const|shared)\b([^;]*);")


def parse(text: str) -> Module:
    text = strip_comments(text)
    target = re.search(r"\.target\s+(\w+)", text)
    module = Module(target.group(1) if target else "", {}, [])
    at = 0
    while True:
        header, outer = HEADER.search(text, at), GLOBAL.search(text, at)
        if outer and (header is None or outer.start() < header.start()):
            module.variables.append(variable(outer.group(2), outer.group(1)))
            at = outer.end()
            continue
        if header is None:
            return module
        opening = text.index("{", header.end())
        semicolon = text.find(";", header.end(), opening)
        if semicolon >= 0:  # a declaration without a body
            at = semicolon + 1
            continue
        end = closing(text, opening)
        if header.group(1) == "entry":
            entry = entry_of(text[header.end() : opening])
            entry.unread = (text[opening + 1 : end], text.count("\n", 0, opening) + 1)
            module.entries[entry.name] = entry
        at = end + 1


def entry_of(text: str) -> Entry:
    match = re.match(r"\s*([$%\w]+)\s*(?:\((.*?)\))?(.*)$", text, re.DOTALL)
    if match is None:
        raise PtxError(f"entry {text!r}")
    entry = Entry(match.group(1))
    for word in split(match.group(2) or ""):
        entry.params.append(variable(word.removeprefix(".param"), "param"))
    threads = re.search(r"\.(?:max|req)ntid\s+([\d,\s]+)", match.group(3))
    if threads:
        entry.threads = 1
        for dim in threads.group(1).split(","):
            entry.threads *= int(dim)
    return entry
