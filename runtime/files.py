"""runtime.files."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import IO, Any

from runtime.errors import UserError

TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")  # .NAME.PID.tmp: two processes never share one


def tidy(run_dir: Path) -> None:
    """Remove what `atomic` had not finished in the folder or its subfolders when its process was
    killed. Call it as the only writer.
    """
    for path in (*run_dir.glob(".*.tmp"), *run_dir.glob("*/.*.tmp")):
        found = TEMPORARY.fullmatch(path.name)
        if found and not _is_alive(int(found[1])):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    """Whether that is another process: one that draws pictures, perhaps."""
    if process == os.getpid():  # in a container the next process often has the same number
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the name `path` only when all of it is on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno and not error.filename:  # a write into a full disk does not tell where
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `path` only when all of it is written, and the
    place of what had that name. A crash just then can leave neither, but never a mix of both.
    """
    new, old = (path.with_name(f".{path.name}{s}.{os.getpid()}.tmp") for s in ("", "-old"))
    for rest in (new, old):  # of a process that had our number
        _remove(rest)
    try:
        new.mkdir(parents=True)
        yield new
        if path.exists():
            path.replace(old)
        new.replace(path)
    finally:
        for rest in (new, old):
            _remove(rest)


def check_distinct_paths(flags: Any, *, written: Sequence[str], read: Sequence[str] = ()) -> None:
    """Raises UserError if a file that is written by one flag is another's too, and would be lost.

    Args:
        flags: a command's settings, of which these are paths or None.
    """
    names = [name for name in (*written, *read) if getattr(flags, name)]
    for one, other in combinations(names, 2):
        path = getattr(flags, one)
        if one in written and path.resolve() == getattr(flags, other).resolve():
            raise UserError(f"--{one} and --{other} name the same file: {path}")


@contextmanager
def report_unwritable(path: Path) -> Iterator[None]:
    """Turns what the system says of a path into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
