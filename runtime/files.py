"""Files and folders that are either complete or absent, their state, and checks of paths that flags
name.

Nothing here knows what the files contain, or what a run folder is.
"""

import os
import re
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import IO, Any

from runtime.errors import UserError

TEMPORARY_NAME = re.compile(r"\..+\.(\d+)\.tmp")  # .NAME.PID.tmp: two processes never share one


def user_cache() -> Path:
    """Return the folder for what can be made again, which need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dit-jax"


def describe_state(path: str | Path) -> str:
    """Describe a file by path, size and time of change, one of which differs once it is another;
    "" if there is none.
    """
    try:
        stat = os.stat(path)
    except (OSError, ValueError):  # a path with a zero byte is a ValueError
        return ""
    return f"{path}|{stat.st_size}|{stat.st_mtime_ns}"


@contextmanager
def atomic_file(path: Path, *, sync: bool = True) -> Generator[IO[bytes]]:
    """Open a file for writing that takes the name `path` only when all of it is written.

    Args:
        sync: wait until it is on disk too, so that a power cut cannot lose it; some milliseconds.

    Raises:
        OSError: the file cannot be written. `filename` names it; `path` is as it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno and not error.filename:  # a write to a full disk does not name the file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """Create a folder to write into that replaces `path` only when all of it is written.

    A crash during the replacement can leave no folder at `path`, but never a mix of old and new.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}-old.{os.getpid()}.tmp")
    _remove(new)  # left by an earlier process with the same id
    _remove(old)
    try:
        new.mkdir(parents=True)
        yield new
        if path.exists():
            path.replace(old)
        new.replace(path)
    finally:
        _remove(new)
        _remove(old)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left unfinished in the folder and its subfolders.

    Only the sole writer of the folder may call it. Files of processes that are alive stay.
    """
    for path in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):
        match = TEMPORARY_NAME.fullmatch(path.name)
        if match and not _is_other_live_process(int(match[1])):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_other_live_process(process_id: int) -> bool:
    if process_id == os.getpid():  # in a container the next process often gets the same id
        return False
    try:
        os.kill(process_id, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def check_distinct_paths(flags: Any, *, written: Sequence[str], read: Sequence[str] = ()) -> None:
    """Refuse flags that would overwrite a file that another flag reads or writes.

    Args:
        flags: a command's config.
        written: names of flags that are output paths or None.
        read: names of flags that are input paths or None.

    Raises:
        UserError: two flags name the same file, and at least one of them writes it.
    """
    given = [name for name in (*written, *read) if getattr(flags, name)]
    for first, second in combinations(given, 2):
        path = getattr(flags, first)
        if first in written and path.resolve() == getattr(flags, second).resolve():
            raise UserError(f"--{first} and --{second} name the same file: {path}")


@contextmanager
def report_unwritable(path: Path) -> Generator[None]:
    """Turn an OSError inside into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
