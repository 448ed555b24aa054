"""Write files atomically, write strict JSON, lock folders, and raise errors that name the file."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class FileError(ValueError):
    """A file cannot be used; the message names the file and the reason."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{os.fspath(path)}: {reason}")


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the content of a file. After a crash, the file has either the old or the new content.

    Several processes may write at the same time; each replaces the whole file. A process locks `<name>.partial`, writes
    the new content to it, and renames it. If a process is killed, the next writer reuses its partial file. A partial
    file with a unique name would never be deleted.
    """
    partial = path.with_name(path.name + ".partial")
    while True:
        with partial.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(partial, file.fileno()):
                continue  # the previous lock holder has renamed or deleted the file
            try:
                file.truncate(0)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            break
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # otherwise, a power failure could undo the rename
    finally:
        os.close(folder)


def keep(path: Path, copy: Path) -> None:
    """Give the content of a file a second name, replacing the file of that name. Later writes change only one of them.

    If the file system has no hard links, the content is copied.
    """
    linked = copy.with_name(copy.name + ".partial")
    linked.unlink(missing_ok=True)
    try:
        os.link(path, linked)
    except OSError:
        write_atomically(copy, path.read_bytes())
    else:
        os.replace(linked, copy)


def require_room(folder: Path, size: int) -> None:
    """Check that the disk of a folder, which need not exist yet, has room for `size` bytes.

    Raises:
        FileError: the disk has less room.
    """
    disk = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(disk).free
    if free < size:
        raise FileError(folder, f"expected {size:,} free bytes on its disk, got {free:,}")


def strict_json(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON. Infinite numbers and NaN, which JSON does not have, become null."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: finite(each) for name, each in part.items()}
        if isinstance(part, list | tuple):
            return [finite(each) for each in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process while the context is active.

    Raises:
        FileError: the folder cannot be opened, or another process has locked it.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise FileError(folder, f"cannot be opened: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileError(folder, "another process is writing to this run") from error
        yield
    finally:
        os.close(descriptor)
