"""Where checkpoints stand so that a kill at any moment leaves one that loads, and several jobs may save into one folder.

path/00000007                   complete: it got this name by a rename after all its files were on the disk
path/00000008                   complete, newer
path/.writing-00000009-5f0c92ab being written, or left by a process that was killed; a later save removes what is left

A writer holds a lock (flock) on its folder's checksums.json. The kernel gives it up when the process dies, however it dies, so
that a folder whose lock can be had has no owner. A reader holds the same lock, shared: what is being read is not removed. It is
assumed that flock reaches every host that sees the folder (local disks, NFS since Linux 2.6.12, Lustre mounted with -o flock,
GPFS); where it does not, saves and loads work, and leftovers of killed processes stay. Anything else in the folder is a stranger
and is left alone: other names, files, links.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .metadata import METADATA, is_plain
from .together import CheckpointError

LOCK = "checksums.json"  # written last; until then it is the writer's lock
WRITING = ".writing-"
NUMBER, LEFT = (
    re.compile(r"[0-9]{8,18}", re.ASCII),
    re.compile(r"\.writing-[0-9]{8,18}(-[0-9a-f]{8})?|\.writing-export-[0-9a-f]{8}", re.ASCII),
)
BUSY = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


def absolute(path: str | os.PathLike[str]) -> Path:
    """A path as a caller gave it. Raises CheckpointError for an empty one, which would be the current folder."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise CheckpointError(f"path={path!r}: expected the path of a folder; '.' is the current one")
    return Path(path).absolute()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def complete(path: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    if not path.is_dir():
        return []
    found = [entry for entry in path.iterdir() if NUMBER.fullmatch(entry.name) and _is_folder(entry) and (entry / METADATA).is_file()]
    return sorted(found, key=lambda folder: int(folder.name))


def unfinished(path: Path) -> list[Path]:
    """What is being written in a folder, or was left by killed processes."""
    return sorted(entry for entry in path.iterdir() if LEFT.fullmatch(entry.name) and _is_folder(entry)) if path.is_dir() else []


def newest(path: Path) -> Path:
    """The newest complete checkpoint of `path`, or `path` itself where it is one. Raises CheckpointError where there is none."""
    if (path / METADATA).is_file():
        return path
    found = complete(path)
    if not found:
        holds = sorted(entry.name for entry in path.iterdir())[:5] if path.is_dir() else "nothing: no such folder"
        raise CheckpointError(f"{path}: no complete checkpoint; expected a folder that gingham.save wrote, it holds {holds}")
    return found[-1]


def inside(folder: Path, name: str) -> Path:
    """The file of that name in a folder. Raises CheckpointError for names with folders in them, links that leave the folder, and
    what is no file."""
    if not is_plain(name):
        raise CheckpointError(f"{folder}: names the file {name!r}, expected a name without folders")
    file = folder / name
    if file.resolve().parent != folder.resolve():
        raise CheckpointError(f"{file}: is a link to {file.resolve()}, expected a file in the folder")
    if file.exists() and not file.is_file():
        raise CheckpointError(f"{file}: expected a file, it is something else")
    return file


@dataclass
class Lock:
    """A file held open with a lock on it; `known` False: its file system has none."""

    file: int
    known: bool

    def release(self) -> None:
        if self.file >= 0:
            os.close(self.file)
        self.file = -1


def _locked(file: Path, flags: int, kind: int) -> Lock | None:
    """The lock of a file, or None where another has it or has removed the file meanwhile. Raises FileNotFoundError."""
    lock = Lock(os.open(file, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644), True)
    try:
        fcntl.flock(lock.file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in BUSY:
            lock.release()
            return None
        lock.known = False
    try:
        mine, there = os.fstat(lock.file), os.stat(file, follow_symlinks=False)
    except FileNotFoundError:
        there = None
    if there is None or (mine.st_ino, mine.st_dev) != (there.st_ino, there.st_dev) or not stat.S_ISREG(mine.st_mode):
        lock.release()
        return None
    return lock


def reading(path: Path) -> tuple[Path, Lock | None]:
    """newest(path) and a lock that keeps other jobs from removing it; None where it has no file to lock."""
    for _ in range(100):
        folder = newest(path)
        try:
            lock = _locked(inside(folder, LOCK), os.O_RDONLY, fcntl.LOCK_SH)
        except FileNotFoundError:
            if (folder / METADATA).is_file():
                return folder, None
            continue
        if lock is not None:
            return folder, lock
        time.sleep(0.02)  # it has just got its name, or is about to lose it
    raise CheckpointError(f"{folder}: is being removed by a job that saves into the same folder; load another one")


@dataclass
class Writing:
    """A folder that this process writes; nobody else touches it."""

    folder: Path
    lock: Lock

    def give_up(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.release()


def begin(path: Path, what: str = "") -> Writing:
    """A new folder in `path` to write into; what killed processes left is removed. what: "" for a checkpoint, or "export"."""
    if not what and (path / METADATA).is_file():
        raise CheckpointError(f"{path}: is a single checkpoint, expected a folder of checkpoints; save to another path")
    if not path.is_dir():
        try:
            path.mkdir(parents=True, exist_ok=True)  # another job may have made it since
        except (FileExistsError, NotADirectoryError):
            raise CheckpointError(f"{path}: is no folder, expected one, or nothing, to put checkpoints into") from None
        sync(path.parent)
    for left in unfinished(path):
        _remove_if_dead(left)
    for _ in range(100):
        folder = path / f"{WRITING}{what or f'{_next(path):08d}'}-{secrets.token_hex(4)}"
        folder.mkdir()
        try:
            lock = _locked(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, fcntl.LOCK_EX)
        except (FileNotFoundError, FileExistsError):
            lock = None  # taken for a leftover between mkdir and lock
        if lock is not None:
            return Writing(folder, lock)
        shutil.rmtree(folder, ignore_errors=True)
    raise CheckpointError(f"{path}: 100 folders that were begun in it went away; what removes them?")


def _next(path: Path) -> int:
    return max((int(entry.name) for entry in path.iterdir() if NUMBER.fullmatch(entry.name)), default=0) + 1


def _remove_if_dead(folder: Path) -> None:
    """Removes a folder whose owner is dead or is done with it; does nothing where it has one, or nobody can know."""
    try:
        lock = _locked(folder / LOCK, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX)
    except OSError:  # removed meanwhile, or another user's
        return
    if lock is None:
        return
    try:
        if lock.known:
            _remove(folder)
    finally:
        lock.release()


def _remove(folder: Path) -> None:
    """Its lock goes last: a kill in between leaves a folder that the next save knows as a leftover. Another job may do the same now."""
    try:
        entries = list(folder.iterdir())
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.name != LOCK:
            shutil.rmtree(entry, ignore_errors=True) if _is_folder(entry) else entry.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def commit(writing: Writing, keep: int) -> Path:
    """Makes a written folder the newest checkpoint, then removes all but the last `keep`. The rename is the moment:
    before it the previous checkpoint is the newest, after it this one, and both are complete."""
    path = writing.folder.parent
    sync(writing.folder)
    while True:
        final = path / f"{_next(path):08d}"
        try:
            os.rename(writing.folder, final)
            break
        except OSError as error:  # another job took the number
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
    writing.lock.release()  # at once: readers wait for it
    sync(path)
    for old in complete(path)[:-keep]:
        _remove_old(old)
    return final


def _remove_old(old: Path) -> None:
    """Removes a checkpoint unless somebody reads it; then a later save does."""
    try:
        lock = _locked(old / LOCK, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX)
    except FileNotFoundError:  # another job was first
        return
    if lock is None:
        return
    # a half-removed folder must not look complete, so it loses its name first
    gone = old.with_name(f"{WRITING}{old.name}-{secrets.token_hex(4)}")
    try:
        os.rename(old, gone)
        _remove(gone)
    except FileNotFoundError:
        pass
    finally:
        lock.release()


@contextmanager
def turn(folder: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """One job at a time in a folder, or (LOCK_SH) any number that only read, where its file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def sync(folder: Path) -> None:
    """Flushes a folder's entries (names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
