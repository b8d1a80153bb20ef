"""Networks whose features the Fréchet distance compares, each with a name that says which it is.

FID is the name of one of them alone: Inception v3 with the weights of the original FID. All take images of uint8
[B, 3, S, S] and give features [B, d] float32 on the CPU.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import interpolate

from engine.checkpoint import BUILT_IN
from engine.codecs.autoencoder import SavedAutoencoder
from engine.data.captioned import CaptionedImages
from engine.errors import InputError, errors_named
from engine.files import is_folder, load_tensors, save_tensors, unreadable
from engine.images import fit_image
from engine.metrics.frechet import Statistics

BATCH = 64
BUILT_IN_SIZE = 64  # pixels a side at which the built-in autoencoder was trained


@dataclass(frozen=True)
class FeatureNetwork:
    name: str  # of the distance: "FID", "FD(built-in autoencoder)", "FD(dinov2.pt)"
    digest: str  # of all that the features depend on but the images
    compute: Callable[[Tensor], Tensor]  # uint8 [B, 3, S, S] → [B, d] on any device
    device: torch.device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        features = self.compute(images.to(self.device))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            problem = f"gives {found} for images {tuple(images.shape)}"
            raise InputError("features", self.name, "give a network of features [B, d]", problem)
        return features.float().cpu()


def autoencoder_features(folder: Path | None, device: torch.device) -> FeatureNetwork:
    """What a diffusers autoencoder's encoder computes before its last convolution: each channel's mean and standard
    deviation over the positions, [B, 2·c]. They show blur, colours and content, hardly noise.

    folder  of any autoencoder of `engine.codecs.autoencoder`; None: that of the built-in model, which takes images at
            its 64 pixels. Others take them at their own size
    Raises InputError about "features".
    """
    source = BUILT_IN / "image" if folder is None else folder
    with errors_named("features"):
        saved = SavedAutoencoder.open(source)
        network = saved.build().to(device).eval()
    digest = _digest(*sorted(path for path in source.iterdir() if path.is_file()))
    last = [module for module in network.encoder.modules() if isinstance(module, torch.nn.Conv2d)][-1]

    def compute(images: Tensor) -> Tensor:
        pixels, found = images.float() / 127.5 - 1, []
        if folder is None:
            pixels = interpolate(pixels, (BUILT_IN_SIZE,) * 2, mode="bilinear", antialias=True)
        elif images.shape[-1] % saved.latents.factor:
            remedy = f"give an autoencoder whose factor, {saved.latents.factor}, divides the images' size"
            raise InputError("features", folder, remedy, f"cannot take images of {images.shape[-1]} pixels")
        hook = last.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
        try:
            network.encoder(pixels)
        finally:
            hook.remove()
        return torch.cat([found[0].mean((2, 3)), found[0].std((2, 3))], dim=1)  # [B, 2·c]

    name = "FD(built-in autoencoder)" if folder is None else f"FD({folder.name})"
    return FeatureNetwork(name, digest, compute, device)


def torchscript_features(file: Path, device: torch.device) -> FeatureNetwork:
    """A network saved by torch.jit, which takes uint8 [B, 3, S, S] and gives [B, d].

    One with an argument `return_features`, as NVIDIA's Inception, is called with True. Raises InputError about
    "features".
    """
    try:
        digest = _digest(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated as a whole; nothing else reads the files
            network = torch.jit.load(file, map_location=device).eval()
    except OSError as error:
        raise unreadable("features", file, error, "give a TorchScript file or a diffusers folder") from None
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        problem = f"is not a TorchScript file ({reason})"
        raise InputError("features", file, "save one with torch.jit, or give a diffusers folder", problem) from None
    settings = {"return_features": True} if "return_features" in str(network.forward.schema) else {}

    def compute(images: Tensor) -> Tensor:
        try:
            return network(images, **settings)
        except RuntimeError as error:
            problem = f"cannot take images {tuple(images.shape)} of uint8 ({str(error).splitlines()[-1][:200]})"
            raise InputError("features", file, "save one that does", problem) from None

    return FeatureNetwork(f"FD({file.name})", digest, compute, device)


def inception_features(weights: Path, device: torch.device) -> FeatureNetwork:
    """FID's network: torchmetrics' and torch-fidelity's Inception v3, with the resizing of the original in TensorFlow.

    weights  torch-fidelity's weights-inception-2015-12-05-6726825d.pth
    Raises InputError about "inception" where a package is missing, or the file is not that.
    """
    try:
        digest = _digest(weights)
        torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would unpickle anything
    except OSError as error:
        raise unreadable("inception", weights, error, "give torch-fidelity's file of weights") from None
    except Exception as error:  # pickle, zip and RuntimeError of all kinds
        problem = f"does not hold weights ({str(error).splitlines()[0][:200]})"
        raise InputError("inception", weights, "give torch-fidelity's file of weights", problem) from None
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights), antialias=False).to(device)
    except ImportError as error:
        remedy = "install the extra [evaluate], with the torchvision that fits your torch"
        raise InputError("inception", weights, remedy, f"needs a package that cannot be imported ({error})") from None
    except RuntimeError as error:
        problem = f"holds the weights of another network ({str(error).splitlines()[0][:200]})"
        raise InputError("inception", weights, "give torch-fidelity's file of weights", problem) from None
    return FeatureNetwork("FID", digest, lambda images: network(images).reshape(len(images), -1), device)


def feature_network(given: Path | None, device: torch.device) -> FeatureNetwork:
    """The network of a diffusers folder or a TorchScript file; None: the built-in autoencoder."""
    if given is None or is_folder(given, "features"):
        return autoencoder_features(given, device)
    return torchscript_features(given, device)


def reference_statistics(network: FeatureNetwork, data: CaptionedImages, size: int, cache: Path | None) -> Statistics:
    """Of the features of a data set's images, cropped and resized to the samples' size.

    cache  a folder of statistics by the contents of the images, the network and the size; None: there is none
    """
    readable = (item for item in data.items if item.path not in data.skipped)
    digests = [hashlib.sha256(item.read_bytes()).hexdigest() for item in readable]
    key = hashlib.sha256(json.dumps([1, network.digest, size, digests]).encode())
    file = cache / f"features-{key.hexdigest()[:32]}.safetensors" if cache else None
    if file:
        with suppress(OSError, SafetensorError, KeyError, ValueError):  # there is none, or a damaged one
            stored, described = load_tensors(file)
            return Statistics(int(described["count"]), stored["mean"], stored["covariance"])
    found = Statistics.of(features_of(network, (fit_image(image, size) for _, image in data.images())))
    if file:
        tensors = {"mean": found.mean, "covariance": found.covariance}
        with suppress(OSError):  # a full disk, a folder that cannot be written: the next run computes them again
            cache.mkdir(parents=True, exist_ok=True)
            save_tensors(file, tensors, {"count": str(found.count), "network": network.name, "size": str(size)})
    return found


def features_of(network: FeatureNetwork, images: Iterable[Tensor]) -> Iterator[Tensor]:
    """Features [b, d] of images uint8 [3, S, S], some at a time."""
    batch: list[Tensor] = []
    for image in images:
        batch.append(image)
        if len(batch) == BATCH:
            yield network(torch.stack(batch))
            batch = []
    if batch:
        yield network(torch.stack(batch))


def _digest(*files: Path) -> str:
    """Of the files' contents."""
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
