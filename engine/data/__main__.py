"""Make a data set: `python -m engine.data emoji --out data/emoji`."""

import argparse
import sys
from pathlib import Path

from engine.data.emoji import FONT, NAMES, render_emoji


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (2: bad input, said in one line)."""
    parser = argparse.ArgumentParser(prog="python -m engine.data", description="Make a data set.")
    emoji = parser.add_subparsers(dest="dataset", required=True).add_parser(
        "emoji", help="render Noto Color Emoji with its CLDR names and keywords"
    )
    emoji.add_argument("--out", type=Path, required=True, help="folder to make")
    emoji.add_argument("--size", type=int, default=64, help="pixels of a picture's side (default: %(default)s)")
    emoji.add_argument("--font", type=Path, default=FONT, help="colour font (default: %(default)s)")
    emoji.add_argument("--names", type=Path, default=NAMES, help="CLDR's `common` folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        counts = render_emoji(options.out, options.size, options.font, options.names)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {counts['training']} training pictures, {counts['test']} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
