"""Load grey images and binarise them: handwritten digits, IDX files such as MNIST's, and `.npz` files.

Pixels are stored as uint8 grey levels. Training images are binarised again each time they are used, x ~ Bernoulli(grey
/ white); the test set is binarised once. The sizes in a file's header are checked before memory is allocated. A file is
rejected if its header declares more pixels than the file can contain, or more than the limit.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from wakesleep_ext import ops, random
from wakesleep_ext._files import FileError
from wakesleep_ext.training.config import DIGITS as DIGITS  # re-exported

MAX_BYTES = 4 * 2**30
"""Maximum size of an image set in memory, in bytes. A pixel takes one byte."""

TEST_BINARIZATION_SEED = 0
"""Seed for the binarisation of the test set."""

_DIGITS_TEST = 360
_DEFLATE_MAX_RATIO = 1032  # the most bytes that one byte of a deflate stream can expand to
_READ_BYTES = 2**20


class DataError(FileError):
    """A data set cannot be read; the message names the file and the reason."""


@dataclass(frozen=True, eq=False)
class Images:
    """Grey images, one per row."""

    grey: Tensor
    """Grey levels, uint8 `[N, D]`, from 0 to `white`."""
    white: int
    """The grey level at which a pixel is on with probability 1."""
    shape: tuple[int, int]
    """Height and width of an image; their product is D."""

    def __len__(self) -> int:
        return len(self.grey)

    def to(self, device: torch.device | str) -> Images:
        return replace(self, grey=self.grey.to(device))

    def mean(self) -> Tensor:
        """Return the mean of each pixel in [0, 1], float64 `[D]`."""
        return self.grey.sum(0, dtype=torch.int64).double() / (len(self) * self.white)

    def binarize(self, key: Tensor, index: Tensor | None = None, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Draw binary pixels x ~ Bernoulli(grey / white), `[N, D]`.

        Args:
            key: random key of the draw, on the device of the images.
            index: int64 `[N]`, the indices of the images to binarise; all images by default.
            dtype: dtype of the pixels.
        """
        return ops.binarize(self.grey, self.white, index, dtype=dtype, key=key)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training images, and test images of the same shape."""

    name: str
    train: Images
    test: Images

    def sha256(self) -> str:
        """Return the SHA-256 digest of all images, including their shape and white level."""
        digest = hashlib.sha256()
        for images in (self.train, self.test):
            digest.update(repr((len(images), images.shape, images.white)).encode())
            digest.update(images.grey.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def binary_test(self) -> Tensor:
        """Return the test set binarised with the fixed seed `TEST_BINARIZATION_SEED`, uint8 `[N, D]`."""
        device = self.test.grey.device
        return self.test.binarize(random.make_key(TEST_BINARIZATION_SEED, device=device))


def load(source: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Dataset:
    """Load a data set.

    Args:
        source: one of

            - ``"digits"``, the 1,797 handwritten digits (8 x 8, 17 grey levels) in scikit-learn, shuffled with a fixed
              seed and split into 1,437 training and 360 test images;
            - a folder of IDX files named like MNIST's, ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte`` (or
              ``test-images…``), which may be gzipped, and whose names may have a prefix, as in EMNIST;
            - a ``.npz`` file with arrays ``x_train`` and ``x_test``, `[N, H, W]` or `[N, D]`, of uint8 (grey levels 0
              to 255) or bool (binary pixels).
        max_bytes: maximum memory of an image set, in bytes; larger sets are rejected.

    Raises:
        DataError: the file or folder is missing, malformed or too large.
    """
    if source == DIGITS:
        return _load_digits()
    path = Path(source)
    if path.is_dir():
        train, test = (_read_idx(_find_idx(path, names), max_bytes) for names in _IDX_NAMES)
    elif path.suffix == ".npz" and path.is_file():
        train, test = (_read_npz(path, name, max_bytes) for name in ("x_train", "x_test"))
    else:
        missing = "" if path.exists() else "; it does not exist"
        raise DataError(path, f"expected {DIGITS!r}, a folder of IDX files, or a .npz file{missing}")
    if train.shape != test.shape:
        raise DataError(path, f"training images have shape {train.shape}, but test images {test.shape}")
    return Dataset(path.resolve().stem, train, test)


def _load_digits() -> Dataset:
    from sklearn.datasets import load_digits

    pixels = torch.from_numpy(load_digits().images).to(torch.uint8)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    images = Images(pixels.flatten(1)[order], white=16, shape=(8, 8))
    return Dataset(
        DIGITS,
        train=replace(images, grey=images.grey[_DIGITS_TEST:]),
        test=replace(images, grey=images.grey[:_DIGITS_TEST]),
    )


def _check_shape(path: Path, name: str, shape: tuple[int, ...], max_bytes: int) -> None:
    """Reject sizes that are not positive, exceed the limit, or are too large for the file even if it is compressed."""
    declared = f"{name} declares sizes {list(shape)}"
    if not all(size > 0 for size in shape):
        raise DataError(path, f"{declared}, expected each to be positive")
    if math.prod(shape) > max_bytes:
        raise DataError(path, f"{declared}, more than the limit of {max_bytes:,} bytes")
    if math.prod(shape) > path.stat().st_size * _DEFLATE_MAX_RATIO:
        raise DataError(path, f"{declared}, more than a file of {path.stat().st_size:,} bytes can hold")


def _grey_images(path: Path, name: str, pixels: Tensor) -> Images:
    """Build images from uint8 levels 0 to 255, `[N, H, W]`."""
    if pixels.max() <= 1:
        raise DataError(
            path,
            f"every grey level in {name} is 0 or 1, but 0 to 255 was expected; if the images are binary, store them as "
            "a bool array in a .npz file",
        )
    return Images(pixels.flatten(1), white=255, shape=(pixels.shape[1], pixels.shape[2]))


# IDX: two zero bytes, the type (8 is uint8), the number of dimensions, each size as a big-endian 32-bit integer, then
# the pixels (described on the MNIST page of Y. LeCun).

_IDX_NAMES = (("train-images",), ("t10k-images", "test-images"))
_IDX_HEADER = struct.Struct(">HBB3I")


def _find_idx(folder: Path, names: tuple[str, ...]) -> Path:
    for suffix in ("", ".gz"):
        found = [p for name in names for p in folder.glob(f"*{name}[-.]idx3-ubyte{suffix}")]
        if len(found) == 1:
            return found[0]
        if found:
            files = ", ".join(sorted(p.name for p in found))
            raise DataError(folder, f"expected exactly one {names[0]} file, found {files}")
    raise DataError(folder, f"no {names[0]}-idx3-ubyte or {names[0]}-idx3-ubyte.gz in this folder")


def _read_idx(path: Path, max_bytes: int) -> Images:
    try:
        with _open(path) as file:
            header = file.read(_IDX_HEADER.size)
            if len(header) < _IDX_HEADER.size:
                raise DataError(path, f"holds {len(header)} bytes, less than an IDX header")
            zeros, dtype, dims, *shape = _IDX_HEADER.unpack(header)
            if (zeros, dtype, dims) != (0, 8, 3):
                raise DataError(
                    path,
                    f"expected an IDX header of three-dimensional uint8 data (00 00 08 03), got {header[:4].hex(' ')}",
                )
            _check_shape(path, "the header", tuple(shape), max_bytes)
            size = math.prod(shape)
            pixels = bytearray()
            while chunk := file.read(min(_READ_BYTES, size + 1 - len(pixels))):
                pixels += chunk
    except DataError:
        raise
    except _UNREADABLE as error:
        raise DataError(path, f"cannot be read: {error or type(error).__name__}") from error
    if len(pixels) != size:
        held = "more" if len(pixels) > size else f"{len(pixels):,}"
        raise DataError(path, f"the header declares {size:,} pixels, the file holds {held}")
    return _grey_images(path, "the file", torch.frombuffer(pixels, dtype=torch.uint8).view(*shape))


# Errors that gzip, zipfile and NumPy raise for malformed files. NumPy parses the header of an array with Python's
# tokenizer and parser.
_UNREADABLE = (
    *(EOFError, MemoryError, OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error),
    *(RecursionError, SyntaxError, tokenize.TokenError),
)


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _read_npz(path: Path, name: str, max_bytes: int) -> Images:
    import numpy as np
    from numpy.lib import format as npy

    try:
        with zipfile.ZipFile(path) as archive:
            member = f"{name}.npy"
            if member not in archive.namelist():
                names = ", ".join(archive.namelist()) or "nothing"
                raise DataError(path, f"expected arrays x_train and x_test, got {names}")
            if archive.getinfo(member).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(path, f"{member} uses a compression method other than deflate")
            with archive.open(member) as file:
                # NumPy saves arrays of pixels in version 1.0; later versions allow headers of any length
                if npy.read_magic(file) != (1, 0):
                    raise DataError(path, f"{name} is not in version 1.0 of the .npy format")
                shape, _, dtype = npy.read_array_header_1_0(file)
            if dtype not in (np.dtype(np.uint8), np.dtype(np.bool_)):
                raise DataError(
                    path,
                    f"expected {name} to be uint8 (grey levels 0 to 255) or bool, got {dtype}",
                )
            if len(shape) not in (2, 3):
                raise DataError(path, f"expected {name} to have shape [N, H, W] or [N, D], got {list(shape)}")
            _check_shape(path, name, shape, max_bytes)
            with archive.open(member) as file:
                pixels = torch.from_numpy(npy.read_array(file, allow_pickle=False))
                if file.read(1):
                    raise DataError(path, f"{name} holds more than the sizes it declares")
    except DataError:
        raise
    except _UNREADABLE as error:
        raise DataError(path, f"cannot be read: {error or type(error).__name__}") from error
    if pixels.dim() == 2:
        side = math.isqrt(pixels.shape[1])
        rows = side if side * side == pixels.shape[1] else 1
        pixels = pixels.unflatten(1, (rows, -1))
    if pixels.dtype == torch.bool:
        shape = (pixels.shape[1], pixels.shape[2])
        return Images(pixels.flatten(1).to(torch.uint8), white=1, shape=shape)
    return _grey_images(path, name, pixels)
