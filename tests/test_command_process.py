"""A command line as a process of its own: closed, full and narrow streams, Ctrl-C, and a user without a home."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRINTING = """
import os, select, sys
from engine.command import refuse, run

def main():
    if "wait" in sys.argv:  # until nobody reads the pipe
        nobody = select.poll()
        nobody.register(1, 0)
        nobody.poll(30_000)
    print("image " * 3000)
    print("a bar", file=sys.stderr)
    with open("file", "w") as file:
        os.write(1, b"")
        print(file.fileno(), file=file)
    return refuse("python -m engine.x", "steps: 0 is not valid") if "refuse" in sys.argv else 0

run("python -m engine.x", main)
"""


def shell(folder: Path, code: str, redirected: str, encoding="utf-8", **environment) -> subprocess.CompletedProcess:
    """Python code as a process in a folder, its streams redirected as the shell does."""
    (folder / "command.py").write_text(code, "utf-8")
    command = f"{sys.executable} command.py {redirected}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""} | environment
    return subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, encoding=encoding)


@pytest.mark.parametrize(
    ("redirected", "status", "says"),
    [
        (">&-", 0, "a bar\n"),
        ("2>&- >/dev/null", 0, ""),
        ("refuse 2>&- >/dev/null", 2, ""),
        ("<&- >&- 2>&-", 0, ""),
        (">/dev/full", 2, "python -m engine.x: standard output cannot be written (No space left on device)\n"),
        ("2>/dev/full >/dev/null", 0, ""),
        ("refuse 2>/dev/full >/dev/null", 2, ""),
        (">/dev/full 2>&1", 2, ""),
        ("wait | true; exit ${PIPESTATUS[0]}", 1, ""),
        ("wait 2>&1 | true; exit ${PIPESTATUS[0]}", 1, ""),
    ],
)
def test_streams_that_are_lost_cost_no_more_than_what_they_would_have_shown(tmp_path, redirected, status, says):
    done = shell(tmp_path, PRINTING, redirected)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr == says or (says == "" and done.stderr == "a bar\n")
    if (tmp_path / "file").exists():
        assert int((tmp_path / "file").read_text()) > 2, "a file must not become a standard stream"


def test_help_that_cannot_be_printed_shows_no_traceback(tmp_path):
    code = "from engine.command import Parser, run\nrun('x', lambda: Parser('x').parse_args(['--help']))"
    done = shell(tmp_path, code, ">/dev/full")
    assert (done.returncode, done.stderr) == (2, "x: standard output cannot be written (No space left on device)\n")


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", r"c\xf4te \u65e5\u672c \udcff"),
        ("latin-1", r"côte \u65e5\u672c \udcff"),
        ("utf-8", r"côte 日本 \udcff"),
    ],
)
def test_what_a_terminal_cannot_show_is_escaped(tmp_path, encoding, shown):
    code = "from engine.command import run\nrun('x', lambda: print('côte 日本 \\udcff'))"
    done = shell(tmp_path, code, "", encoding, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{shown}\n", "")


INTERRUPTED = """
import os, signal, sys
from engine.command import run

def main():
    import interrupted
    os.kill(os.getpid(), signal.SIGINT)
    return 0

run("python -m engine.x", main)
"""
INTERRUPTED_IMPORT = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:  # as C++ does, and destructors
    pass
"""


@pytest.mark.parametrize("imported", ["", INTERRUPTED_IMPORT], ids=["in main", "in an import that swallows it"])
def test_ctrl_c_ends_a_command_in_one_line(tmp_path, imported):
    (tmp_path / "interrupted.py").write_text(imported)
    code = INTERRUPTED if not imported else INTERRUPTED.replace("    os.kill(os.getpid(), signal.SIGINT)\n", "")
    done = shell(tmp_path, code, "")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "python -m engine.x: interrupted\n")


def test_ctrl_c_before_a_command_has_begun_ends_it_in_one_line(tmp_path):
    (tmp_path / "PIL.py").write_text(INTERRUPTED_IMPORT)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "engine.data", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "python -m engine.data: interrupted\n")


@pytest.mark.parametrize("ignored", [False, True])
def test_programs_and_nohup_keep_their_own_handling_of_interrupts(tmp_path, ignored):
    code = f"""
import signal
if {ignored}:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
before = signal.getsignal(signal.SIGINT)
import engine
assert signal.getsignal(signal.SIGINT) is before
from engine.command import run
run("x", lambda: int(signal.getsignal(signal.SIGINT) is not signal.SIG_IGN))
"""
    assert shell(tmp_path, code, "").returncode == (not ignored)


def test_a_user_without_a_home_can_run_what_looks_for_one(tmp_path):
    code = """
import os, pwd
def nobody(uid):
    raise KeyError(uid)
pwd.getpwuid = nobody
del os.environ["HOME"]
from engine.command import run
def main():
    from pathlib import Path
    print(Path("~/.ssh/config").expanduser())  # as gensim's smart_open does when it is imported
    return 0
run("x", main)
"""
    done = shell(tmp_path, code, "")
    assert (done.returncode, done.stdout, done.stderr) == (0, "/nonexistent/.ssh/config\n", "")


def test_interrupts_have_the_status_that_shells_give_them():
    from engine.interrupts import INTERRUPTED

    assert INTERRUPTED == 128 + signal.SIGINT
