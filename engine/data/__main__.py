"""Make a data set: `python -m engine.data emoji --out data/emoji`, `text --from FILE --out data/texts`."""

import argparse

from engine.command import Parser, path, refuse, run
from engine.data.emoji import FONT, NAMES, render_emoji
from engine.data.texts import write_texts
from engine.errors import InputError

COMMAND = "python -m engine.data"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2: bad input, reported in one line)."""
    parser = Parser(COMMAND, description="Make a data set.")
    datasets = parser.add_subparsers(dest="dataset", required=True)
    emoji = datasets.add_parser("emoji", help="render Noto Color Emoji, or others, with CLDR names and keywords")
    emoji.add_argument("--out", type=path, required=True, help="folder to write")
    emoji.add_argument("--size", type=int, default=136, help="pixels per side (default: %(default)s)")
    emoji.add_argument("--font", type=path, default=FONT, help="colour font (default: %(default)s)")
    emoji.add_argument("--icons", type=path, metavar="FILE", help="draw the emoji of an icon set instead: the "
        "icons.json of an npm package @iconify-json/… (needs the extra [train])")  # fmt: skip
    emoji.add_argument("--names", type=path, default=NAMES, help="CLDR's `common` folder (default: %(default)s)")
    text = datasets.add_parser("text", help="texts to train a model of text on, from a file with one a line")
    text.add_argument("--from", type=path, required=True, metavar="FILE",
        help="one text a line in UTF-8, or a .json of MS-COCO captions, those of an image joined")  # fmt: skip
    text.add_argument("--out", type=path, required=True, help="folder to write")
    text.add_argument("--words", type=int, default=64, help="of a text at most; longer ones are cut (default: "
        "%(default)s)")  # fmt: skip
    text.add_argument("--captions", type=int, default=5, help="of an image that are joined (default: %(default)s)")
    text.add_argument("--held-out", type=float, default=0.05, help="fraction of the texts that is not for training "
        "(default: %(default)s)")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        print(_make(options))
    except InputError as error:
        return refuse(parser.prog, error, vars(options))
    except OSError as error:  # a full disk, a folder that was removed
        problem = f"cannot be written ({error.strerror})"
        return refuse(parser.prog, InputError("out", options.out, "give another folder", problem), vars(options))
    return 0


def _make(options: argparse.Namespace) -> str:
    """Writes the data set; returns a line about it."""
    if options.dataset == "emoji":
        counts = render_emoji(options.out, options.size, options.font, options.names, options.icons)
        return f"{options.out}: {counts['training']} training images, {counts['test']} held out"
    source = getattr(options, "from")
    counts = write_texts(source, options.out, options.words, options.captions, options.held_out)
    left = f"; {counts['cut']} cut to {options.words} words, {counts['empty']} without a word left out"
    return f"{options.out}: {counts['training']} training texts, {counts['test']} held out{left}"


if __name__ == "__main__":
    run(COMMAND, main)
