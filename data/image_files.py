"""The image files of a folder: which files of a tree are images, and which are left out.

Nothing is decoded. Training and evaluation look at the same files.
"""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data.images import SIGNATURE
from runtime.errors import UserError

# fmt: off
# Pillow does not open the HEIC of phones nor JPEG XL: such an image is a bad row, and not left out.
IMAGE_SUFFIXES = frozenset((
    ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".jxl", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
))
# fmt: on


@dataclass(frozen=True)
class Listing:
    """The files of a tree by kind, as paths relative to `root`, sorted."""

    root: Path
    images: list[str]
    others: list[str]
    n_hidden: int


def list_files(root: Path) -> Listing:
    """List a tree, following links. Hidden files and folders are only counted.

    Raises:
        UserError: a folder cannot be read, or a link leads nowhere and has no image's name, so that
            it may have been a folder of images.
    """
    found: list[str] = []
    others: list[str] = []
    n_hidden = 0

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read folder '{error.filename}': {error.strerror}")

    above: dict[str, frozenset[str]] = {}  # real paths of the folders that a folder lies in
    for folder, folders, files in os.walk(root, followlinks=True, onerror=fail):
        real, outer = os.path.realpath(folder), above.pop(folder, frozenset())
        if real in outer:  # a link to a folder above
            folders.clear()
            continue
        above |= {os.path.join(folder, name): outer | {real} for name in folders}
        visible = [name for name in folders if not _is_hidden(name)]
        n_hidden += len(folders) - len(visible)
        folders[:] = sorted(visible)
        prefix = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for name in files:
            path = str(prefix / name)
            if _is_hidden(name):
                n_hidden += 1
            elif os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES or _is_image(root / path):
                found.append(path)
            elif not (root / path).exists():
                raise UserError(f"'{root / path}' is a link to what is not there: remove it")
            else:
                others.append(path)
    return Listing(root, sorted(found), sorted(others), n_hidden)


def _is_hidden(name: str) -> bool:
    """Return whether a file or folder is a system's own: a Mac's `._x`, thumbnails, `__MACOSX`."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def _is_image(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return bool(SIGNATURE.match(file.read(16)))
    except OSError:  # not to be read: it has no image's suffix either
        return False
