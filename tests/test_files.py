from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shareprefill import files
from shareprefill.errors import DataError
from shareprefill.files import (
    atomic_write_bytes,
    atomic_write_text,
    locked_folder,
    locked_output,
    make_folder,
    printable,
    reading_folder,
)

HOLD = """
import sys
from shareprefill import files
with getattr(files, sys.argv[1])(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(kind: str, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds `path`; killed after the block."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, kind, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == b"held"
        try:
            yield holder
        finally:
            holder.kill()


def test_writes_replace_the_file_and_leave_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    atomic_write_bytes(path, b"one")
    atomic_write_bytes(str(path), b"two")
    atomic_write_text(tmp_path / "b.txt", "é\r\n")
    assert path.read_bytes() == b"two"
    assert (tmp_path / "b.txt").read_bytes() == "é\r\n".encode()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "b.txt"]


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "disk is full: free some space"),
        (errno.EROFS, "read-only: choose a folder"),
        (errno.EACCES, "permission denied: choose"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_faults_leave_the_earlier_file(
    call: str, number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    atomic_write_bytes(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    target, name = (files, "_write_synced") if call == "write" else (os, call)
    monkeypatch.setattr(target, name, fail)
    with pytest.raises(DataError, match=rf"cannot write .*a\.bin: .*{message}"):
        atomic_write_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def on_full_device(path: object, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_EXCL:
            return real("/dev/full", os.O_WRONLY)
        return real(path, flags, mode)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", on_full_device)
    with pytest.raises(DataError, match="disk is full"):
        atomic_write_bytes(tmp_path / "a", b"x" * 100_000)


def test_interrupt_removes_the_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_bytes(tmp_path / "a", b"x")
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "none" / "a", "its folder does not exist"),
        (tmp_path / "file" / "a", "a file, not a folder"),
        (tmp_path, "it is a folder"),
        (tmp_path / ("x" * 300), "name is too long"),
    ):
        with pytest.raises(DataError, match=message):
            atomic_write_bytes(path, b"x")
    with pytest.raises(DataError, match="a file, not a folder"):
        make_folder(tmp_path / "file" / "folder")
    with pytest.raises(DataError, match="a file of this name"):
        make_folder(tmp_path / "file")
    assert make_folder(tmp_path / "a" / "b").is_dir()


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_reported(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(DataError, match="permission denied"):
        atomic_write_bytes(tmp_path / "a", b"x")


def test_second_holder_of_a_folder_fails_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with held_elsewhere("locked_folder", folder) as holder:
        with (
            pytest.raises(DataError, match=r"folder is in use by another process"),
            locked_folder(folder),
        ):
            pass
        holder.kill()
        holder.wait()
        with locked_folder(folder) as held:
            assert held == folder


def test_readers_share_a_folder_and_keep_writers_out(tmp_path: Path) -> None:
    with held_elsewhere("reading_folder", tmp_path):
        with reading_folder(tmp_path), reading_folder(tmp_path) as folder:
            assert folder == tmp_path
        with pytest.raises(DataError, match="in use"), locked_folder(tmp_path):
            pass
    with (
        held_elsewhere("locked_folder", tmp_path),
        pytest.raises(DataError, match="in use"),
        reading_folder(tmp_path),
    ):
        pass
    with locked_folder(tmp_path):
        pass
    with reading_folder(tmp_path / "none"):
        assert not (tmp_path / "none").exists()


def test_second_holder_of_an_output_fails_at_once_and_a_killed_one_leaves_it_free(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.st"
    with held_elsewhere("locked_output", path) as holder:
        with pytest.raises(DataError, match=r"a\.st is in use"), locked_output(path):
            pass
        with locked_output(tmp_path / "b.st"):
            pass
        holder.kill()
        holder.wait()
        assert len(list(tmp_path.iterdir())) == 1
        with locked_output(path) as held:
            atomic_write_bytes(held, b"whole")
    assert [p.name for p in tmp_path.iterdir()] == ["a.st"]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "it is a folder"),
        (tmp_path / "none" / "a.st", "its folder does not exist"),
    ):
        with pytest.raises(DataError, match=rf"cannot write .*{message}"), locked_output(path):
            raise AssertionError("the work began")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), locked_output(tmp_path / "a.st"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_output_lock_that_was_removed_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, taken = files._lock, []

    def lock_what_is_gone(descriptor: int, **options: bool) -> None:
        real(descriptor, **options)
        if not taken:
            (lock,) = tmp_path.iterdir()
            lock.unlink()
        taken.append(descriptor)

    monkeypatch.setattr(files, "_lock", lock_what_is_gone)
    with locked_output(tmp_path / "a.st"):
        monkeypatch.undo()
        with pytest.raises(DataError, match="in use"), locked_output(tmp_path / "a.st"):
            pass
    assert len(taken) == 2


def test_lock_ends_with_the_block_and_with_its_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked_folder(tmp_path):
        raise ZeroDivisionError
    with locked_folder(tmp_path):
        with pytest.raises(DataError, match="in use"), locked_folder(tmp_path):
            pass
        with pytest.raises(DataError, match="in use"), locked_folder(tmp_path):
            pass
    with locked_folder(tmp_path):
        pass


def test_lock_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    script = (
        "import os, signal, sys; from shareprefill import files;"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "files.atomic_write_bytes(sys.argv[1], b'new')"
    )
    target = tmp_path / "maps" / "a.bin"
    target.write_bytes(b"old")
    subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert len(list(target.parent.iterdir())) == 2
    with locked_folder(tmp_path):
        assert list(target.parent.iterdir()) == [target]
    assert target.read_bytes() == b"old"


KILLED = """
import os, signal, sys
from shareprefill import files
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.atomic_write_bytes(sys.argv[1], b"new")
"""


def test_the_next_write_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    target, other = tmp_path / "a.st", tmp_path / "b.st"
    for path in (target, other):
        subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    left = sorted(tmp_path.iterdir())
    assert len(left) == 2
    past = time.time() - 2
    for path in left:
        os.utime(path, (past, past))
    atomic_write_bytes(target, b"next")
    # Another path's leftover is its own next writer's.
    assert len(list(tmp_path.iterdir())) == 2
    atomic_write_bytes(other, b"next")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.st", "b.st"]


def test_a_writer_at_work_keeps_its_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, target = os.replace, tmp_path / "a.st"

    def replace_late(temporary: Path, path: Path) -> None:
        monkeypatch.undo()
        past = time.time() - 60
        os.utime(temporary, (past, past))
        atomic_write_bytes(target, b"between")
        with locked_folder(tmp_path):
            assert temporary.exists()
        real(temporary, path)

    monkeypatch.setattr(os, "replace", replace_late)
    atomic_write_bytes(target, b"late")
    assert target.read_bytes() == b"late"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "a.st"]


def test_lock_on_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(files, "_lock", fail)
    with pytest.raises(DataError, match="has no locks"), locked_folder(tmp_path):
        pass


def test_printable_is_one_short_line() -> None:
    assert printable("a/é b") == "a/é b"
    assert printable("a\x1b[2J\nb") == r"a\x1b[2J\nb"
    assert printable("\ud800") == r"\ud800"
    assert len(printable("x" * 999, 50)) == 50


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "folder/a\0b", ".", "", "/"])
def test_names_that_no_file_can_have(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="cannot write"):
        atomic_write_bytes(name, b"")
    with pytest.raises(DataError, match="cannot write"), locked_output(name):
        pass
    if name not in (".", "", "/"):  # folders
        with pytest.raises(DataError, match="no file can have this name"):
            make_folder(name)
        with reading_folder(name):  # its reader says that there is none
            pass
    assert list(tmp_path.iterdir()) == []
