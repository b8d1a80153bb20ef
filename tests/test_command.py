"""What the command lines share: refusals in one line, types of arguments, the check of an output folder."""

from pathlib import Path

import pytest

from engine.command import Parser, check_writable, path, refuse, run
from engine.errors import InputError, errors_named


def refused(capsys, error, options=()):
    """What `refuse` prints, without the command's name."""
    assert refuse("python -m engine.x", error, options) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith("\n") and captured.err.count("\n") == 1
    return captured.err.removeprefix("python -m engine.x: ").removesuffix("\n")


def test_an_argument_that_is_an_option_is_printed_as_one(capsys):
    error = InputError("step_cache", 0, "use 1 or more", "is out of range")
    assert refused(capsys, error, {"step_cache": 0}) == "--step-cache: 0 is out of range; use 1 or more"
    assert refused(capsys, error, {"steps": 1}) == "step_cache: 0 is out of range; use 1 or more"


def test_several_arguments_are_options_together_or_not_at_all(capsys):
    error = InputError("prompt, image", None, "give a mask", "leave nothing")
    assert refused(capsys, error, ["prompt", "image"]).startswith("--prompt, --image: None leave nothing")
    assert refused(capsys, error, ["prompt"]).startswith("prompt, image: None")


def test_messages_that_only_look_like_an_argument_are_left_alone(capsys):
    assert refused(capsys, ValueError("steps: are too many"), ["steps"]) == "steps: are too many"
    assert refused(capsys, "a message", ["a message"]) == "a message"


def test_errors_of_other_kinds_with_an_argument_are_printed_alike(capsys):
    class BackendError(ValueError):
        argument = "attention"

    error = BackendError("attention: 'x' is not known; use sdpa")
    assert refused(capsys, error, ["attention"]) == "--attention: 'x' is not known; use sdpa"


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029"], ids=ascii)
def test_whatever_breaks_lines_is_printed_on_one(capsys, line_break):
    message = refused(capsys, InputError("image", Path(f"two{line_break}lines.png"), "give a file"), ["image"])
    assert message == "--image: two lines.png is not valid; give a file"
    assert len(message.splitlines()) == 1


def test_the_error_of_a_file_becomes_that_of_the_option_naming_it(capsys):
    with pytest.raises(InputError) as error, errors_named("autoencoder"):
        raise InputError("checkpoint", Path("a/config.json"), "copy it again", "is damaged")
    assert refused(capsys, error.value, ["autoencoder"]) == "--autoencoder: a/config.json is damaged; copy it again"


@pytest.mark.parametrize(
    "arguments",
    [
        "--step 3",
        "--steps x",
        "--steps 1.0",
        "--out ",
        "--out \0",
        f"--steps {'9' * 5000}x",
        f"--{'x' * 5000}",
        f"--out \0{'x' * 5000}",
    ],
    ids=lambda line: ascii(line[:10]),
)
def test_bad_arguments_are_refused_in_one_line(capsys, arguments):
    parser = Parser("python -m engine.x")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=path)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(arguments.split(" "))
    error = capsys.readouterr().err
    assert error.startswith("python -m engine.x: ") and error.count("\n") == 1 and len(error) < 300


def test_a_parser_prints_the_first_line_of_a_docstring_or_none():
    assert "what it does\n" in Parser("x", "what it does\n\nat length").format_help()
    assert "at length" not in Parser("x", "what it does\n\nat length").format_help()
    assert Parser("x", None).format_help()  # python -OO has no docstrings


def test_places_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "grid.png").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    check_writable(tmp_path / "new" / "deep", ["grid.png"])
    for out, value in (
        (tmp_path / "file" / "below", tmp_path / "file"),
        (tmp_path, tmp_path / "grid.png"),
        (tmp_path / "loop", tmp_path / "loop"),
        (tmp_path / ("x" * 300), tmp_path / ("x" * 300)),
    ):
        with pytest.raises(InputError) as error:
            check_writable(out, ["grid.png"])
        assert (error.value.argument, error.value.value) == ("out", value) and "; give " in str(error.value)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # for root, every folder is writable
    with pytest.raises(InputError, match="cannot be written; give another folder"):
        check_writable(tmp_path)


@pytest.mark.parametrize("cause, line", [(None, ""), (OSError("full"), "c: out: 'x' is full; make room\n")])
def test_another_process_of_torchrun_prints_only_what_is_its_own(monkeypatch, capfd, cause, line):
    monkeypatch.setenv("LOCAL_RANK", "1")
    error = InputError("out", "x", "make room", "is full")
    error.__cause__ = cause
    assert refuse("c", error) == 2
    assert capfd.readouterr().err == line


@pytest.mark.parametrize(
    "line",
    [
        "raise ImportError('libx.so: cannot open')",
        "raise OSError('libx.so: undefined symbol')",
        "raise RuntimeError('no operator')",
        "raise ValueError('numpy.dtype size changed')",
        "[].absent",
        "from json import absent as libx",
        "import libx_absent",
    ],
)
@pytest.mark.parametrize("chained", [False, True])
def test_a_broken_package_is_named_in_one_line(tmp_path, monkeypatch, capfd, line, chained):
    (tmp_path / "brokenpackage.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)

    def main():
        try:
            import brokenpackage  # noqa: F401
        except Exception as error:
            if chained:  # as diffusers does
                raise RuntimeError("look up to see its traceback") from error
            raise

    with pytest.raises(SystemExit) as ended:
        run("python -m engine.x", main)
    printed = capfd.readouterr().err
    package = "json" if "json" in line else "libx_absent" if "libx_absent" in line else "brokenpackage"
    assert ended.value.code == 2 and printed.count("\n") == 1
    assert printed.startswith(f"python -m engine.x: the package {package} cannot be imported (")
    assert printed.endswith("; reinstall it, or uninstall it if nothing needs it\n") and "look up" not in printed


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run("python -m engine.x", lambda: 1 // 0)
