"""Files that are never half-written: atomic replacement, and one process a folder."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shareprefill.errors import DataError

LOCK_NAME = ".lock"
_TEMPORARY = ".sp-{}.tmp"
# A writer locks its temporary file right after it was created: a younger one may not be locked yet.
_LOCKED_AFTER_S = 1.0
_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space, or choose a folder on another disk",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose a folder elsewhere",
    errno.EFBIG: "the file would be larger than is allowed here: choose a folder elsewhere",
    errno.EROFS: "the folder is read-only: choose a folder that can be written",
    errno.EACCES: "permission denied: choose a folder that you may write to",
    errno.EPERM: "permission denied: choose a folder that you may write to",
    errno.ENOENT: "its folder does not exist: create it, or choose another path",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another path",
    errno.EEXIST: "a file of this name stands in the way: remove it, or choose another path",
    errno.EISDIR: "it is a folder: name a file",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
}
# Raised where a file system has no locks, or cannot sync a folder.
_NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def printable(value: object, limit: int = 200) -> str:
    """`value` as one line that a terminal can show: non-printable characters escaped, cut short."""
    text = str(value)
    if not text.isprintable():
        text = ascii(text)[1:-1]
    return text if len(text) <= limit else text[: limit - 3] + "..."


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path` so that the old or the new content is found there, never a part.

    Temporary files that killed writers of the same path left are removed.

    Raises:
        DataError: the file cannot be written; an earlier file is untouched and nothing is left.
    """
    path = Path(path)
    mark = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    temporary = path.with_name(_TEMPORARY.format(f"{mark}-{secrets.token_hex(8)}"))
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        try:
            _remove_abandoned(path.parent.glob(_TEMPORARY.format(f"{mark}-*")), _LOCKED_AFTER_S)
            with _write_synced(temporary, data):
                os.replace(temporary, path)
        finally:
            # Gone already after a rename; there after any failure, Ctrl-C among them.
            with suppress(OSError):
                temporary.unlink()
        _sync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


def atomic_write_text(path: str | Path, text: str) -> None:
    """`atomic_write_bytes` of `text` in UTF-8, line ends as they are.

    Raises:
        DataError: as for `atomic_write_bytes`.
    """
    atomic_write_bytes(path, text.encode())


def make_folder(path: str | Path) -> Path:
    """Creates the folder `path`, and those above it, where missing.

    Raises:
        DataError: it cannot be created.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return path


@contextmanager
def locked_folder(path: str | Path) -> Iterator[Path]:
    """Holds the folder `path`, created where missing, for this process alone.

    The lock is the system's own, on `<path>/.lock`: it ends with the process, however that ends.
    Temporary files that a killed process left in the folder are removed.

    Raises:
        DataError: another process holds the folder, or it cannot be written or locked.
    """
    folder = make_folder(path)
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        try:
            _lock(descriptor)
        except OSError as error:
            raise _cannot_lock(folder, error) from error
        _remove_abandoned(folder.rglob(_TEMPORARY.format("*")))
        yield folder
    finally:
        os.close(descriptor)  # releases the lock


@contextmanager
def _write_synced(path: Path, data: bytes) -> Iterator[None]:
    """Writes a new file, and holds it for the block, so that nobody takes it for abandoned."""
    # Not `tempfile`: its files are private to the user whatever the umask says.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with open(descriptor, "wb") as file:
        if sys.platform != "win32":  # an open file cannot be renamed there
            with suppress(OSError):  # no locks here, so nobody removes it either
                _lock(descriptor)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if sys.platform == "win32":
            file.close()
        yield


def _remove_abandoned(files: Iterable[Path], age_s: float = 0.0) -> None:
    """Removes temporary files that no process holds any more, and that are at least so old."""
    for path in files:
        with suppress(OSError):
            if time.time() - path.stat().st_mtime < age_s:
                continue
            descriptor = os.open(path, os.O_RDWR)
            try:
                _lock(descriptor)
                path.unlink()
            finally:
                os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return  # a folder cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _cannot_lock(folder: Path, error: OSError) -> DataError:
    if error.errno in _NOT_OFFERED:
        return DataError(
            f"cannot lock {printable(folder)}: its file system has no locks: "
            "choose a folder on a local disk"
        )
    return DataError(
        f"{printable(folder)} is in use by another process: "
        "wait until that one has ended, or choose another folder"
    )


def _cannot_write(path: Path, error: OSError) -> DataError:
    advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
    return DataError(f"cannot write {printable(path)}: {advice}")
