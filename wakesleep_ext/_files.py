"""Files that are never half-written, and errors that name them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FileError(ValueError):
    """Something is wrong with a file; the message names it and the reason."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{os.fspath(path)}: {reason}")


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content such that a crash at any moment leaves the old or the new.

    Several processes may write at once: each replaces the whole. A process writes the new content to
    `<name>.partial`, which it locks, and then renames that. If it is killed, the next writer takes the file over; a
    file with a unique name would stay for good.
    """
    partial = path.with_name(path.name + ".partial")
    while True:
        with partial.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(partial, file.fileno()):
                continue  # the process that held the lock has made it the new file
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
        os.fsync(folder)  # or a power failure could still undo the rename
    finally:
        os.close(folder)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone.

    Raises:
        FileError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileError(folder, "another process is writing to this run") from error
        yield
    finally:
        os.close(descriptor)
