"""Draw and caption emoji with the built-in model.

    python examples/sample.py

writes three rows of four images with their captions into `examples.png`: four red hearts, four images whose caption
begins with "flag:", and four of which nothing was given.
"""

import argparse

from engine import Engine, Request
from engine.images import grid


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--num", type=int, default=4, help="samples of each request")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", default="examples.png")
    options = parser.parse_args(arguments)

    how = {"num": options.num, "steps": options.steps}
    with Engine.from_pretrained() as engine:
        results = engine.generate([Request("red heart", **how), Request("flag: _", **how), Request(seed=7, **how)])
    samples = [sample for result in results for sample in result.samples]
    for sample in samples:
        print(sample.seed, sample.text)
    grid([sample.image for sample in samples], [sample.text for sample in samples], columns=options.num).save(
        options.out
    )


if __name__ == "__main__":
    main()
