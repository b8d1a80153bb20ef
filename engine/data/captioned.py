"""`CaptionedImages`: a data set of images with captions, whose images are files or members of tar files.

Real data sets list files that were never downloaded, truncated images, and images without captions. What cannot be used
is left out, counted and named; only a data set without any usable image is an error.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

from PIL import Image
from torch import Tensor

from engine.errors import InputError, shown
from engine.files import unreadable
from engine.images import fit_image, images_up_to_the_limit, open_image


@dataclass(frozen=True, slots=True)
class Member:
    """Where a file lies in a tar file that is not compressed."""

    tar: Path
    offset: int  # in bytes, like the next one
    size: int

    def read_bytes(self) -> bytes:
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """One image of a data set and its captions."""

    image_id: str  # the data set's own, as text; that of a member of a tar file has the tar file's name before it
    path: Path  # of the file, or TAR/NAME
    captions: tuple[str, ...]  # at least one
    member: Member | None = None  # of a tar file
    only_known: bool = False  # training never draws it

    def source(self) -> Path | BytesIO:
        """What `open_image` takes. Raises InputError about `image` for a tar file that cannot be read."""
        try:
            return self.path if self.member is None else BytesIO(self.member.read_bytes())
        except OSError as error:
            raise unreadable("image", self.path, error, "restore the tar file") from None

    def read_bytes(self) -> bytes:
        """The file's content. Raises OSError."""
        return (self.path if self.member is None else self.member).read_bytes()

    def size_and_time(self) -> list[int]:
        """Size in bytes, and time in ns when it or its tar file was modified. Raises OSError."""
        status = os.stat(self.path if self.member is None else self.member.tar)
        return [status.st_size if self.member is None else self.member.size, status.st_mtime_ns]


@dataclass(frozen=True)
class CaptionedImages:
    """The usable images of a data set, and the reasons why the others are not usable."""

    items: tuple[CaptionedImage, ...]
    skipped: dict[Path, str] = field(default_factory=dict)  # reasons by file; `images` adds damaged ones
    ignored: dict[str, list[int]] = field(default_factory=dict)  # other entries of a captions file, by reason

    def images(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[CaptionedImage, Image.Image]]:
        """Pairs of `items[start:stop]` and their images, as `open_image` gives them; damaged ones go to `skipped`."""
        for item in self.items[start:stop]:
            try:
                with images_up_to_the_limit():
                    image = open_image(item.source())
            except InputError as error:
                self.skipped[item.path] = f"damaged: {error.problem}"
                continue
            yield item, image

    def read(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[CaptionedImage, Tensor]]:
        """The same with images of uint8 [3, size, size], see `engine.images.fit_image`."""
        for item, image in self.images(start, stop):
            yield item, fit_image(image, size)

    def with_known(self, others: "CaptionedImages", name: str) -> "CaptionedImages":
        """This data set, followed by the images of another one as `only_known`; `name` is put before their ids.

        Raises InputError about "dataset" if an id is then there twice.
        """
        known = [replace(item, image_id=f"{name}/{item.image_id}", only_known=True) for item in others.items]
        if twice := {item.image_id for item in self.items} & {item.image_id for item in known}:
            raise InputError("dataset", min(twice), "give the image another id", "is the id of two images")
        reasons = [*dict.fromkeys((*self.ignored, *others.ignored))]
        ignored = {reason: [*self.ignored.get(reason, ()), *others.ignored.get(reason, ())] for reason in reasons}
        return CaptionedImages((*self.items, *known), self.skipped | others.skipped, ignored)

    def summary(self) -> str:
        """One line for a log: how many images are usable, and how much is left out for which reason."""
        usable = sum(item.path not in self.skipped for item in self.items)
        names: dict[str, list[str]] = {}
        for path, reason in self.skipped.items():
            names.setdefault(reason.split(":")[0], []).append(path.name)
        # `shown` escapes and cuts names; without its quotes.
        skipped = [f"{len(files)} {reason} ({shown(files[0])[1:-1]} first)" for reason, files in names.items()]
        ignored = [f"{len(i)} {reason} ({reason.split()[0]}[{i[0]}] first)" for reason, i in self.ignored.items()]
        parts = [f"{usable} usable images", f"skipped {', '.join(skipped)}", f"ignored {', '.join(ignored)}"]
        return "; ".join(part for part, some in zip(parts, (True, skipped, ignored), strict=True) if some)


def leaves_folder(name: str) -> bool:
    """Whether the name of a file in a folder, with slashes of either kind, is that of one outside."""
    plain = os.path.normpath(name.replace("\\", "/"))
    return os.path.isabs(plain) or plain.split("/")[0] == ".."
