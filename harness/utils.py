"""What every file may need: one-line messages, types of options, files that are always whole."""

import argparse
import contextlib
import errno
import fcntl
import itertools
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn, TextIO

LARGEST_INT = 2**63 - 1  # of 64 bits
ALLOW_MORE_FILES = ": allow more, as with ulimit -n 1024"  # after "Too many open files"


def say(message: str, file: TextIO | None = None) -> None:
    """Write the line at once, with "?" for letters that the terminal lacks.

    It is one call of `write`, as `print` may make two, between which another process can write.
    """
    file = file or sys.stdout
    if file is None:  # closed before Python started
        return
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        file.write(message.encode(encoding, "replace").decode(encoding) + "\n")
        file.flush()
    except (OSError, ValueError) as error:  # which is no reason to die
        is_closed = isinstance(error, ValueError)
        if not (is_closed or error.errno in (errno.EPIPE, errno.EIO, errno.EBADF)):
            return  # a full disk, say, where the next line may find space again
        name = "stderr" if file is sys.stderr else "stdout"
        setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for good


def complain(message: object) -> None:
    """Say in one line on stderr what went wrong, where the run goes on."""
    say(" ".join(str(message).split()), sys.stderr)


def fail(message: object) -> NoReturn:
    """Say in one line what is wrong with the input, and exit with status 2."""
    complain(f"error: {message}")
    sys.exit(2)


def reason(error: BaseException) -> str:
    """Return what an exception says, in a few words."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Report an error in the block, which writes to `path` (a full disk, say), and go on."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError, ValueError) as error:
        complain(f"{path} not written: {reason(error)}")


@contextlib.contextmanager
def name_in_write_errors(path: Path) -> Iterator[None]:
    """Give an `OSError` in the block, which writes to `path`, a message that says so."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {path}: {reason(error)}") from error


def write_traceback(path: Path) -> None:
    """Write the traceback of the error that is being handled; if that fails, say so."""
    with report_write_errors(path):
        path.write_text(traceback.format_exc(), encoding="utf-8", errors="replace")


def _wait_for_the_disk(file: BinaryIO) -> None:
    try:
        fcntl.fcntl(file, fcntl.F_FULLFSYNC)  # on a Mac fsync would not wait for the drive
    except (AttributeError, OSError):
        os.fsync(file)


def write(data: bytes, path: Path) -> None:
    """Write beside `path` and rename, so that there always is a whole file; raise `OSError`."""
    path = Path(os.path.realpath(path))  # what a symbolic link points to
    beside = path.with_name(path.name + ".new")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            _wait_for_the_disk(file)
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def set_aside(path: Path) -> None:
    """Rename a file that would be overwritten, to the first free of PATH.bak, PATH.2.bak ..."""
    suffixes = itertools.chain([".bak"], (f".{n}.bak" for n in itertools.count(2)))
    backups = (path.with_name(path.name + suffix) for suffix in suffixes)
    backup = next(backup for backup in backups if not os.path.lexists(backup))
    with report_write_errors(backup):
        path.rename(backup)
        complain(f"{path} is now {backup.name}")


def number(
    kind: type, low: float = -math.inf, high: float | None = None
) -> Callable[[str], int | float]:
    """Return an argparse type for a finite int (of 64 bits) or float in [low, high]."""
    highest = (LARGEST_INT if kind is int else math.inf) if high is None else high

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= highest and abs(value) != math.inf:
            return value
        limits = f" of at least {low}" if low > -math.inf else ""
        if highest < value < math.inf or (kind is float and high is not None):
            limits = f" from {low} to {highest}"
        whole = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(f"must be a {whole}number{limits}, not '{text}'")

    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    """Return an argparse type for one of a few words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(
                f"invalid choice: '{text}' (choose {' or '.join(choices)})"
            )
        return text

    return parse


def nonempty_text(text: str) -> str:
    """Return an argparse argument that names a file; an empty one would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def nonempty_path(text: str) -> Path:
    """Convert an argparse argument to a path."""
    return Path(nonempty_text(text))


def run_folder(text: str) -> Path:
    """Convert an argparse argument to a run's folder, which its checkpoint stands for, too."""
    path = nonempty_path(text)
    return path.parent if path.name == "checkpoint.pt" and path.is_file() else path


def is_writable(path: Path) -> bool:
    """Return whether a file can be written there."""
    try:
        path.stat()
    except FileNotFoundError:
        return os.path.isdir(path.parent) and os.access(path.parent, os.W_OK | os.X_OK)
    except OSError:  # the name is too long, or a folder above is closed, or is none
        return False
    return os.access(path, os.W_OK)


def read_text(path: Path) -> str:
    """Return a text file's contents; raise `OSError`, or `ValueError` if it is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file") from None
