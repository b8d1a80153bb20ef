"""Make a data set: `python -m engine.data emoji --out data/emoji`."""

import sys

from engine.command import Parser, path, refuse
from engine.data.emoji import FONT, NAMES, render_emoji


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (2: bad input, said in one line)."""
    parser = Parser("python -m engine.data", description="Make a data set.")
    emoji = parser.add_subparsers(dest="dataset", required=True).add_parser(
        "emoji", help="render Noto Color Emoji with its CLDR names and keywords"
    )
    emoji.add_argument("--out", type=path, required=True, help="folder to make")
    emoji.add_argument("--size", type=int, default=64, help="pixels of a picture's side (default: %(default)s)")
    emoji.add_argument("--font", type=path, default=FONT, help="colour font (default: %(default)s)")
    emoji.add_argument("--names", type=path, default=NAMES, help="CLDR's `common` folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        counts = render_emoji(options.out, options.size, options.font, options.names)
    except ValueError as error:
        return refuse(parser.prog, error, vars(options))
    except OSError as error:  # a full disk, a folder that was taken away
        return refuse(parser.prog, f"--out {options.out}: cannot be written ({error.strerror}); name another folder")
    print(f"{options.out}: {counts['training']} training pictures, {counts['test']} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
