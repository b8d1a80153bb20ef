"""From a folder of captioned images to a checkpoint: `python -m engine.train --preset emoji --data DIR --out RUN`.

Trains the autoencoder (unless one is given), the word vectors and the denoiser, see `engine.training.stages`. The same
command again resumes an interrupted run. RUN/checkpoint is what `engine.sample --checkpoint` reads.

`torchrun --nproc-per-node N -m engine.train` and `accelerate launch -m engine.train` train in several processes.
"""

import argparse

from safetensors import SafetensorError

from engine.command import Parser, broken_package, name, path, refuse, run
from engine.errors import InputError
from engine.presets import PRESETS
from engine.training.options import DTYPES, TRACKERS, TrainOptions

COMMAND = "python -m engine.train"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(COMMAND, description=__doc__)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="emoji", help="what to train (default: %(default)s)")
    add("--data", type=path, required=True, metavar="DIR", help="images and captions.json, MS-COCO captions layout "
        "(captions.json alone for a model of text), or WebDataset's tar files, or a pattern")  # fmt: skip
    add("--known-images", type=path, action="append", default=[], metavar="DIR",
        help="a further data set, whose images are only known: described, never drawn; may be repeated")  # fmt: skip
    add("--split", type=name, default="train", help="of the data, as Karpathy's train+restval (default: %(default)s)")
    add("--out", type=path, required=True, metavar="RUN", help="folder of the run; an interrupted run is resumed")
    add("--autoencoder", type=name, metavar="DIR", help="a trained diffusers autoencoder: a folder or a hub id")
    add("--init", type=path, metavar="DIR",
        help="a checkpoint to start from, a folder or on the hub, or a U-ViT weights file")  # fmt: skip
    add("--init-heads", type=int, metavar="N", help="attention heads of the weights file (default: the preset's)")
    text = "train LoRA adapters of this rank on the checkpoint of --init, which go to RUN/adapter (extra [lora])"
    add("--lora", type=int, metavar="RANK", help=text)
    add("--lora-alpha", type=float, metavar="A", help="the adapters are scaled by A / RANK (default: A = RANK)")
    add("--steps", type=int, help="optimiser steps of the denoiser")
    add("--batch", type=int, help="samples per step of the denoiser")
    add("--learning-rate", type=float, help="of the denoiser")
    add("--accumulate", type=int, help="micro-batches per step of the denoiser")
    add("--autoencoder-steps", type=int, help="optimiser steps of the autoencoder")
    add("--autoencoder-learning-rate", type=float, help="of the autoencoder")
    add("--save-every", type=int, default=250, metavar="STEPS",
        help="save the state and sample images every N steps (default: %(default)s)")  # fmt: skip
    add("--evaluate-every", type=int, metavar="STEPS",
        help="score RUN/checkpoint on the data's test split every N steps, a multiple of --save-every")  # fmt: skip
    add("--evaluate-samples", type=int, metavar="N",
        help="then also draw N captions and describe N images, and score these as engine.evaluate does")  # fmt: skip
    add("--keep", type=int, default=1, metavar="K", help="saved states that are kept (default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile the denoiser: takes a minute, then steps are faster")
    add("--grad-checkpointing", action="store_true", help="compute blocks again in the backward pass: less memory")
    add("--fsdp", action="store_true", help="share weights and optimiser state among the processes: less memory")
    add("--log", choices=TRACKERS, help="report the denoiser's training there; tensorboard writes to RUN/log")
    add("--seed", type=int, default=0, help="32 bits, as gensim's generator (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", choices=DTYPES, default="auto", help="of the arithmetic; weights stay float32 (default: auto)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2: bad input, reported in one line)."""
    values = vars(_parse(arguments))
    try:
        options = TrainOptions(**values)
        from engine.training.stages import train  # late: --help and bad options answer without importing torch

        train(options)
    except (InputError, FloatingPointError, ModuleNotFoundError) as error:
        return refuse(COMMAND, error, values)
    except RuntimeError as error:
        from engine.compiled import compile_failure

        failure = compile_failure(error)
        if failure is error:
            raise
        return refuse(COMMAND, failure, values)
    except (OSError, SafetensorError) as error:  # a full disk, a folder that was removed
        resumes = OSError(f"{error}; fix this, then the same command resumes the run")
        return refuse(COMMAND, error if broken_package(error) else resumes)
    return 0


if __name__ == "__main__":
    run(COMMAND, main)
