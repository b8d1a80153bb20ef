"""Make a data set: `python -m engine.data emoji --out data/emoji`."""

from engine.command import Parser, path, refuse, run
from engine.data.emoji import FONT, NAMES, render_emoji
from engine.errors import InputError

COMMAND = "python -m engine.data"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2: bad input, reported in one line)."""
    parser = Parser(COMMAND, description="Make a data set.")
    emoji = parser.add_subparsers(dest="dataset", required=True).add_parser(
        "emoji", help="render Noto Color Emoji with its CLDR names and keywords"
    )
    emoji.add_argument("--out", type=path, required=True, help="folder to write")
    emoji.add_argument("--size", type=int, default=136, help="pixels per side (default: %(default)s)")
    emoji.add_argument("--font", type=path, default=FONT, help="colour font (default: %(default)s)")
    emoji.add_argument("--names", type=path, default=NAMES, help="CLDR's `common` folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        counts = render_emoji(options.out, options.size, options.font, options.names)
    except InputError as error:
        return refuse(parser.prog, error, vars(options))
    except OSError as error:  # a full disk, a folder that was removed
        problem = f"cannot be written ({error.strerror})"
        return refuse(parser.prog, InputError("out", options.out, "give another folder", problem), vars(options))
    print(f"{options.out}: {counts['training']} training images, {counts['test']} held out")
    return 0


if __name__ == "__main__":
    run(COMMAND, main)
