"""Train a model on a folder of images whose names are their captions, such as `red heart.png` and `blue heart.png`.

    python examples/train_on_folder.py my-images --out runs/mine

trains an autoencoder, word vectors and the denoiser, writes sample sheets on the way, and `runs/mine/checkpoint`, which
`python -m engine.sample --checkpoint` and `Engine.from_pretrained` read; then it makes a sample. With the default
preset it takes hours on two CPU cores; the same command resumes it. Needs the extra `[train]`.
"""

import argparse
import json
from pathlib import Path

from engine import Engine, Request
from engine.training.options import TrainOptions
from engine.training.stages import train

IMAGES = {".png", ".jpg", ".jpeg", ".webp"}


def write_captions(images: Path, folder: Path) -> None:
    """A data set in MS-COCO captions layout: `captions.json` beside a link to the images."""
    files = sorted(file for file in images.iterdir() if file.suffix.lower() in IMAGES)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "images").exists():
        (folder / "images").symlink_to(images.resolve())
    listed = [{"id": i, "file_name": file.name} for i, file in enumerate(files)]
    captions = [{"image_id": i, "caption": file.stem} for i, file in enumerate(files)]
    (folder / "captions.json").write_text(json.dumps({"images": listed, "annotations": captions}))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/mine"))
    parser.add_argument("--preset", default="emoji")
    parser.add_argument("--steps", type=int, help="of the denoiser; default: the preset's")
    options = parser.parse_args(arguments)

    write_captions(options.images, options.out / "data")
    train(TrainOptions(data=options.out / "data", out=options.out, preset=options.preset, steps=options.steps))
    with Engine.from_pretrained(options.out / "checkpoint") as engine:
        sample = engine.generate(Request())
    sample.image.save(options.out / "sample.png")
    print(f"{options.out / 'sample.png'}: {sample.text}")


if __name__ == "__main__":
    main()
