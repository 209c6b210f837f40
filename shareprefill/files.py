"""Files that are never half-written: atomic replacement, one writer a folder or file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from shareprefill.errors import DataError

LOCK_NAME = ".lock"
_CHECKSUM = "checksum"
_TEMPORARY = ".sp-{}.tmp"
_OUTPUT_LOCK = ".sp-{}.lock"
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


def kind_of(path: str | Path) -> Literal["file", "folder"] | None:
    """What is at `path`; None where nothing is, or where no file could have such a name."""
    # Not `Path.exists`: it raises where a name is too long.
    if not os.path.exists(path):
        return None
    return "folder" if os.path.isdir(path) else "file"


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path` so that the old or the new content is found there, never a part.

    Temporary files that killed writers of the same path left are removed.

    Raises:
        DataError: the file cannot be written; an earlier file is untouched and nothing is left.
    """
    path = _named(path)
    mark = _mark(path)
    temporary = path.with_name(_TEMPORARY.format(f"{mark}-{secrets.token_hex(8)}"))
    try:
        if kind_of(path) == "folder":
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
    except (OSError, ValueError) as error:
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
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error
    return path


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there.

    Raises:
        DataError: it cannot be removed.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot remove {printable(path)}: {error.strerror}") from error


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, which are to be written as JSON, with a checksum of them."""
    return {**values, _CHECKSUM: _checksum(values)}


def unsealed(values: Any) -> dict[str, Any]:
    """What `sealed` was given; what earlier versions wrote, without a checksum, as it is.

    Raises:
        ValueError: it is no object, or was changed since it was written.
    """
    if not isinstance(values, dict):
        raise ValueError(f"it is a {type(values).__name__}, not an object")
    values = dict(values)
    if _CHECKSUM in values and values.pop(_CHECKSUM) != _checksum(values):
        raise ValueError("its checksum is another: it was changed since it was written")
    return values


def _checksum(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def locked_folder(path: str | Path) -> Iterator[Path]:
    """Holds the folder `path`, created where missing, for this process alone.

    The lock is the system's own, on `<path>/.lock`: it ends with the process, however that ends.
    Temporary files that a killed process left in the folder are removed.

    Raises:
        DataError: another process holds the folder, or it cannot be written or locked.
    """
    folder = make_folder(path)
    with _held(folder / LOCK_NAME, folder):
        _remove_abandoned(folder.rglob(_TEMPORARY.format("*")))
        yield folder


@contextmanager
def reading_folder(path: str | Path) -> Iterator[Path]:
    """Keeps writers out of the folder `path`; several processes may read it at once.

    A folder that cannot be written here is read without a lock.

    Raises:
        DataError: a process that writes holds the folder.
    """
    folder = Path(path)
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except (OSError, ValueError):
        # There is no such folder, as its reader will say, or it is read-only.
        yield folder
        return
    try:
        try:
            _lock(descriptor, shared=True)
        except OSError as error:
            if error.errno not in _NOT_OFFERED:
                raise _cannot_lock(folder, error) from error
        yield folder
    finally:
        os.close(descriptor)  # releases the lock


@contextmanager
def locked_output(path: str | Path) -> Iterator[Path]:
    """Holds the file `path`, there or still to be written, for this process alone.

    A command that works for long before it writes one file takes this first: a second one that
    would write the same file fails before its work, and a path that cannot be written does too.
    The lock is a file beside `path` while it is held; one that a killed process left is taken over.

    Raises:
        DataError: another process holds the file, or its folder cannot be written or locked.
    """
    path = _named(path)
    lock = path.with_name(_OUTPUT_LOCK.format(_mark(path)))
    with _held(lock, path):
        try:
            if kind_of(path) == "folder":
                raise _cannot_write(path, IsADirectoryError(errno.EISDIR, ""))
            yield path
        finally:
            # While it is still held: whoever waits for it sees that it is gone, and makes another.
            with suppress(OSError):
                lock.unlink()


@contextmanager
def _held(lock: Path, target: Path) -> Iterator[None]:
    """Holds a lock file for the block; `target` is what messages name."""
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except (OSError, ValueError) as error:
            raise _cannot_write(target, error) from error
        try:
            try:
                _lock(descriptor)
            except OSError as error:
                raise _cannot_lock(target, error) from error
            if not _is_at(descriptor, lock):
                continue  # the one who held it removed it meanwhile
            yield
            return
        finally:
            os.close(descriptor)  # releases the lock


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _named(path: str | Path) -> Path:
    """`path` as that of a file; `.` and `/` have no name of their own.

    Raises:
        DataError: no file can have this name.
    """
    path = Path(path)
    if not path.name:
        raise _cannot_write(path, IsADirectoryError(errno.EISDIR, ""))
    try:
        path.lstat()
    except ValueError as error:
        raise _cannot_write(path, error) from error
    except OSError:
        pass  # as whoever opens it will say
    return path


def _mark(path: Path) -> str:
    """What temporary and lock files of one path have in common."""
    return hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]


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


def _lock(descriptor: int, *, shared: bool = False) -> None:
    if sys.platform == "win32":  # which has no shared ones
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def _cannot_lock(path: Path, error: OSError) -> DataError:
    if error.errno in _NOT_OFFERED:
        return DataError(
            f"cannot lock {printable(path)}: its file system has no locks: "
            "choose a folder on a local disk"
        )
    return DataError(
        f"{printable(path)} is in use by another process: "
        "wait until that one has ended, or choose another place"
    )


def _cannot_write(path: Path, error: OSError | ValueError) -> DataError:
    if isinstance(error, OSError):
        advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
    else:
        advice = "no file can have this name: choose another path"
    return DataError(f"cannot write {printable(path)}: {advice}")
