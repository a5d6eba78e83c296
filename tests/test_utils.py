import argparse
import contextlib
import errno
import io
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from harness import utils
from harness.utils import LARGEST_INT, number, one_of, report_write_errors, write

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def files_end_at(size):
    """Let writing beyond so many bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("kind", "limits", "text", "value"),
    [
        (int, (), "-3", -3),
        (int, (0,), "0", 0),
        (int, (1, 1024), "1024", 1024),
        (int, (0,), str(LARGEST_INT), LARGEST_INT),
        (float, (), "-1e-4", -1e-4),
        (float, (0, 1), "1", 1.0),
    ],
)
def test_a_number_within_its_limits_is_taken(kind, limits, text, value):
    parsed = number(kind, *limits)(text)
    assert (parsed, type(parsed)) == (value, kind)


@pytest.mark.parametrize(
    ("kind", "limits", "text", "message"),
    [
        (int, (1,), "0", "must be a whole number of at least 1, not '0'"),
        (int, (1,), "2.5", "must be a whole number of at least 1, not '2.5'"),
        (int, (), "", "must be a whole number, not ''"),
        (int, (1, 1024), "1025", "must be a whole number from 1 to 1024, not '1025'"),
        (int, (1, 1024), "0", "must be a whole number of at least 1, not '0'"),
        (
            *(int, (0,), str(LARGEST_INT + 1)),
            f"must be a whole number from 0 to {LARGEST_INT}, not '{LARGEST_INT + 1}'",
        ),
        (int, (0,), "9" * 30, f"must be a whole number from 0 to {LARGEST_INT}, not '{'9' * 30}'"),
        (int, (0,), "9" * 9999, f"must be a whole number of at least 0, not '{'9' * 9999}'"),
        (float, (0, 1), "1.01", "must be a number from 0 to 1, not '1.01'"),
        (float, (0, 1), "nan", "must be a number from 0 to 1, not 'nan'"),
        (float, (0,), "inf", "must be a number of at least 0, not 'inf'"),
        (float, (), "-inf", "must be a number, not '-inf'"),
        (float, (0,), "fast", "must be a number of at least 0, not 'fast'"),
    ],
)
def test_any_other_number_is_refused_with_its_limits(kind, limits, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        number(kind, *limits)(text)
    assert str(refused.value) == message


def test_one_of_a_few_words_is_taken_and_any_other_refused():
    parse = one_of("constant", "linear")
    assert parse("linear") == "linear"
    with pytest.raises(argparse.ArgumentTypeError, match=r"'cosine' \(choose constant or linear\)"):
        parse("cosine")


def test_a_path_that_would_be_the_current_folder_by_mistake_is_refused():
    assert utils.nonempty_path("a b") == Path("a b")
    for text in "", " ":
        with pytest.raises(argparse.ArgumentTypeError, match="must not be empty"):
            utils.nonempty_path(text)


def test_bad_input_is_told_in_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        utils.fail(ValueError("this\n  and that"))
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "error: this and that\n")


@pytest.mark.parametrize(
    ("encoding", "written"), [("ascii", b"L?ffel ?\n"), ("utf-8", "Löffel ?\n".encode())]
)
def test_letters_that_the_terminal_lacks_are_replaced(encoding, written):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    utils.say("Löffel \udcff", terminal)  # the last is a byte of a file's name that is no letter
    assert terminal.buffer.getvalue() == written


def python(code, **environment):
    command = [sys.executable, "-c", code]
    environment = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=60)


def test_a_process_whose_terminal_knows_ascii_only_says_what_it_can():
    code = "from harness.utils import complain, say; say('L\\xf6ffel'); complain('L\\xf6ffel')"
    result = python(code, PYTHONIOENCODING="ascii", LANG="C")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"L?ffel\n", b"L?ffel\n")


def test_a_line_is_written_at_once_so_that_no_other_process_writes_into_it():
    code = "from harness.utils import complain, say; say('one'); complain('two')"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # keeps writes apart
    with ours, theirs:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        outputs = {"stdout": theirs, "stderr": theirs}
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, **outputs)
        ours.setblocking(False)
        assert [ours.recv(100) for _ in range(2)] == [b"one\n", b"two\n"]


def test_a_process_whose_terminal_has_gone_away_goes_on():
    code = (
        "import os; from harness.utils import complain, say; os.close(1); say('one'); say('two');"
        "complain('three'); print('four', flush=True); os._exit(7)"
    )
    result = python(code)
    assert (result.returncode, result.stdout, result.stderr) == (7, b"", b"three\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EAGAIN])
def test_a_log_that_takes_nothing_for_a_while_goes_on_when_it_does_again(number):
    class Log(io.StringIO):
        is_full = True

        def write(self, text):
            if self.is_full:
                raise OSError(number, os.strerror(number))
            return super().write(text)

    log = Log()
    with contextlib.redirect_stdout(log):
        utils.say("one")
        log.is_full = False
        utils.say("two")
    assert log.getvalue() == "two\n"


def test_a_process_without_a_terminal_goes_on(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    utils.say("nobody hears it")
    utils.complain("nor this")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "file"), "No space left on device"),
        (RuntimeError("first line\nsecond line"), "first line"),
        (KeyError(), "KeyError"),
    ],
)
def test_the_reason_of_an_exception_is_a_few_words(error, words):
    assert utils.reason(error) == words


def test_what_is_written_takes_the_old_files_place(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old and longer")
    write(b"new", path)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_whole_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with files_end_at(1000), pytest.raises(OSError, match="File too large"):
        write(bytes(5000), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("drive_can", [True, False])
def test_on_a_mac_writing_waits_for_the_drive_where_that_can(drive_can, tmp_path, monkeypatch):
    asked = []

    def ask(file, command):
        asked.append(command)
        if not drive_can:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(utils.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(utils.fcntl, "fcntl", ask)
    write(b"new", tmp_path / "file")
    assert asked == [51]
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_symbolic_link_is_followed_and_stays(tmp_path):
    disk, folder = tmp_path / "disk", tmp_path / "folder"
    disk.mkdir()
    folder.mkdir()
    link = folder / "file"
    link.symlink_to("../disk/other name")
    for data in b"made", b"replaced":
        write(data, link)
        assert os.readlink(link) == "../disk/other name"
        assert (disk / "other name").read_bytes() == data
    assert len(list(tmp_path.rglob("*"))) == 4


@pytest.mark.parametrize("error", [OSError(28, "disk full"), RuntimeError("disk full")])
def test_a_file_that_cannot_be_written_costs_a_line(error, capsys):
    with report_write_errors(Path("some/file")):
        raise error
    assert capsys.readouterr() == ("", "some/file not written: disk full\n")


def test_other_errors_than_those_of_writing_are_not_hidden():
    with pytest.raises(KeyError), report_write_errors(Path("some/file")):
        raise KeyError("a fault of the program")


def test_text_is_read_and_anything_else_is_refused(tmp_path):
    (tmp_path / "text").write_bytes("Löffel".encode())
    (tmp_path / "data").write_bytes(b"\xff\xfe\x00")
    assert utils.read_text(tmp_path / "text") == "Löffel"
    with pytest.raises(ValueError, match="data is not a text file"):
        utils.read_text(tmp_path / "data")
