"""Check and binarise images, and load them from files: handwritten digits, IDX files such as MNIST's, `.npz` files.

Pixels are uint8 grey levels, or probabilities in float32. Training images are binarised again each time they are used,
x ~ Bernoulli(grey / white); the test set is binarised once. The sizes in a file's header are checked before memory is
allocated. A file is rejected if its header declares more pixels than the file can contain, or more than the limit.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import data as torch_data

from wakesleep_ext import ops, random
from wakesleep_ext._files import FileError
from wakesleep_ext.training.config import DIGITS as DIGITS  # re-exported
from wakesleep_ext.training.config import RunOptions

if TYPE_CHECKING:
    import numpy as np

MAX_BYTES = 4 * 2**30
"""Maximum size of an image set in memory, in bytes. A pixel takes one byte."""

BINARIZATION_SEED = 0
"""Seed of the draws that binarise a set once, such as the test set."""

_WHERE_MNIST_IS = (
    "does not exist. Download train-images-idx3-ubyte.gz and t10k-images-idx3-ubyte.gz, for example from "
    "https://ossci-datasets.s3.amazonaws.com/mnist/ or with torchvision.datasets.MNIST(folder, download=True). Then "
    "pass --data the folder"
)

_DIGITS_TEST = 360
_DEFLATE_MAX_RATIO = 1032  # the most bytes that one byte of a deflate stream can expand to
_READ_BYTES = 2**20


class DataError(FileError):
    """A data set cannot be read; the message names the file and the reason."""


@dataclass(frozen=True, eq=False)
class Images:
    """Grey images, one per row. :meth:`of` makes them from arrays, tensors and datasets."""

    grey: Tensor
    """Pixels `[N, D]` from 0 to `white`: uint8 grey levels, or float32 probabilities, for which `white` is 1."""
    white: int
    """The value at which a pixel is on with probability 1."""
    shape: tuple[int, int]
    """Height and width of an image; their product is D."""

    @classmethod
    def of(cls, pixels: Any, *, white: int | None = None, name: str = "pixels") -> Images:
        """Check the type, the shape and every value of the pixels, and store them without a copy where possible.

        Args:
            pixels: a tensor or a NumPy array, `[N, D]`, `[N, H, W]` or `[N, 1, H, W]`; or a map-style
                `torch.utils.data.Dataset`, whose items are images or tuples that begin with an image, such as (image,
                label). An image is a tensor, an array or a PIL image. Pixels may be

                - uint8: grey levels from 0 to `white`;
                - bool: binary images;
                - floating point from 0 to 1: the probability that a pixel is on. These are stored in float32. They are
                  not rounded to grey levels.
            white: the level of a white uint8 pixel, 255 by default.
            name: the name of the pixels in error messages.

        Raises:
            TypeError: the pixels have another type.
            ValueError: there are no images, or their shape or a value is invalid. The message says what is expected.
        """
        found = _stack(name, pixels) if isinstance(pixels, torch_data.Dataset) else _tensor(name, pixels)
        if found.dim() == 4 and found.shape[1] == 1:
            found = found.squeeze(1)
        if found.dim() not in (2, 3) or not found.numel():
            raise ValueError(
                f"expected {name} to be at least one image, [N, 1, H, W], [N, H, W] or [N, D], got {list(found.shape)}"
            )
        if found.dim() == 2:
            side = math.isqrt(found.shape[1])
            found = found.unflatten(1, (side if side * side == found.shape[1] else 1, -1))
        highest = (255 if white is None else white) if found.dtype == torch.uint8 else 1
        if white not in (None, highest) or not 1 <= highest <= 255:
            raise ValueError(f"expected white in 1 .. 255, and only with uint8 {name}, got {white}")
        low, high = (value.item() for value in (found.byte() if found.dtype == torch.bool else found).aminmax())
        if not 0 <= low <= high <= highest:  # also if they are NaN
            raise ValueError(f"expected {name} from 0 to {highest}, got values from {low:g} to {high:g}")
        if white is None and highest > 1 >= high:
            raise ValueError(
                f"every grey level in {name} is 0 or 1, but 0 to 255 was expected; if the images are binary, use bool "
                "pixels (in a file: a bool array in a .npz file)"
            )
        grey = found.flatten(1)
        return cls(grey.byte() if grey.dtype == torch.bool else grey, highest, (found.shape[1], found.shape[2]))

    def __len__(self) -> int:
        return len(self.grey)

    def to(self, device: torch.device | str) -> Images:
        return replace(self, grey=self.grey.to(device))

    def mean(self) -> Tensor:
        """Return the mean of each pixel in [0, 1], float64 `[D]`."""
        return self.grey.sum(0, dtype=torch.float64) / (len(self) * self.white)

    def binarize(self, key: Tensor, index: Tensor | None = None, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Draw binary pixels x ~ Bernoulli(grey / white), `[N, D]`.

        Args:
            key: random key of the draw, on the device of the images.
            index: int64 `[N]`, the indices of the images to binarise; all images by default.
            dtype: dtype of the pixels.
        """
        if self.grey.dtype == torch.uint8:
            return ops.binarize(self.grey, self.white, index, dtype=dtype, key=key)
        probabilities = self.grey if index is None else self.grey.index_select(0, index)
        return ops.bernoulli_sample(probabilities.logit(), dtype=dtype, key=key)

    def binarize_once(self) -> Tensor:
        """Draw binary pixels of all images with the fixed seed `BINARIZATION_SEED`, uint8 `[N, D]`."""
        return self.binarize(random.make_key(BINARIZATION_SEED, device=self.grey.device))


def _tensor(name: str, pixels: Any) -> Tensor:
    """Convert an array, a tensor or a PIL image to a uint8, bool or float32 tensor."""
    dtype = getattr(pixels, "dtype", type(pixels).__name__)
    if not isinstance(pixels, Tensor) and hasattr(pixels, "__array_interface__"):
        import numpy as np

        array = np.asarray(pixels)
        dtype = array.dtype
        if _holds_pixels(dtype):
            with np.errstate(over="ignore"):  # infinity is out of range
                array = array.astype(np.float32 if dtype.kind == "f" else dtype, copy=False)
            pixels = torch.from_numpy(np.require(array, requirements=("C", "W")))
    if isinstance(pixels, Tensor):
        pixels = pixels.detach().float() if pixels.is_floating_point() else pixels
        if pixels.dtype in (torch.uint8, torch.bool, torch.float32):
            return pixels
    raise TypeError(
        f"expected {name} to be uint8 (grey levels 0 to 255), bool or floating point (0 to 1), in a tensor, an array "
        f"or a map-style dataset, got {dtype}"
    )


def _holds_pixels(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "bf" or dtype == "uint8"


def _stack(name: str, dataset: torch_data.Dataset[Any]) -> Tensor:
    """Stack the images of a map-style dataset."""
    if isinstance(dataset, torch_data.IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(f"expected {name} to be a map-style dataset with a length, got {type(dataset).__name__}")
    images: list[Tensor] = []
    for number in range(len(dataset)):
        item = dataset[number]
        image = _tensor(f"{name}[{number}]", item[0] if isinstance(item, tuple) else item)
        if images and (image.shape, image.dtype) != (images[0].shape, images[0].dtype):
            raise ValueError(
                f"expected {name}[{number}] to be {images[0].dtype} {list(images[0].shape)} as {name}[0], "
                f"got {image.dtype} {list(image.shape)}"
            )
        images.append(image)
    return torch.stack(images) if images else torch.empty(0)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training images, and test images of the same shape.

    Raises:
        ValueError: the shapes differ.
    """

    name: str
    train: Images
    test: Images

    def __post_init__(self) -> None:
        if self.train.shape != self.test.shape:
            raise ValueError(f"training images have shape {self.train.shape}, but test images {self.test.shape}")

    def sha256(self) -> str:
        """Return the SHA-256 digest of all images, including their shape and white level."""
        digest = hashlib.sha256()
        for images in (self.train, self.test):
            digest.update(repr((len(images), images.shape, images.white)).encode())
            digest.update(images.grey.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def binary_test(self) -> Tensor:
        """Return the test set binarised with the fixed seed `BINARIZATION_SEED`, uint8 `[N, D]`."""
        return self.test.binarize_once()


def load(
    source: str | os.PathLike[str],
    *,
    train_array: str = RunOptions.train_array,
    test_array: str = RunOptions.test_array,
    max_bytes: int = MAX_BYTES,
) -> Dataset:
    """Load a data set.

    Args:
        source: one of

            - ``"digits"``, the 1,797 handwritten digits (8 x 8, 17 grey levels) in scikit-learn, shuffled with a fixed
              seed and split into 1,437 training and 360 test images;
            - a folder of IDX files named like MNIST's, ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte`` (or
              ``test-images…``). They may be gzipped, and their names may have a prefix, as in EMNIST. Files with
              ``idx2`` in their names hold flat images `[N, D]`. The folder may also be the root of a data set of
              torchvision, with the files in ``MNIST/raw``;
            - a ``.npz`` file with two arrays, `[N, H, W]` or `[N, D]`, of uint8 (grey levels 0 to 255), bool (binary
              pixels) or floating point (0 to 1), as in :meth:`Images.of`.
        train_array, test_array: the names of the arrays in the ``.npz`` file.
        max_bytes: maximum memory of an image set, in bytes; larger sets are rejected.

    Raises:
        DataError: the file or folder is missing, malformed or too large.
    """
    if source == DIGITS:
        return _load_digits()
    path = Path(source)
    if path.is_dir():
        folder = _find_folder(path)
        files = [_find_idx(folder, names) for names in _IDX_NAMES]
        train, test = (_images(file, "the file", _read_idx(file, (2, 3), max_bytes)) for file in files)
    elif path.suffix == ".npz" and path.is_file():
        names = (train_array, test_array)
        if not set(names) <= (held := _arrays(path)):
            wanted, got = " and ".join(names), ", ".join(sorted(held)) or "nothing"
            raise DataError(path, f"expected arrays {wanted} (--train-array, --test-array), got {got}")
        train, test = (_images(path, name, _read_array(path, name, max_bytes, _PIXELS)) for name in names)
    elif path.name.lower() == "mnist" and not path.exists():
        raise DataError(path, _WHERE_MNIST_IS)
    else:
        missing = "" if path.exists() else "; it does not exist"
        raise DataError(path, f"expected {DIGITS!r}, a folder of IDX files, or a .npz file{missing}")
    try:
        return Dataset(path.resolve().stem, train, test)
    except ValueError as error:
        raise DataError(path, str(error)) from error


def load_test_labels(
    source: str | os.PathLike[str], num_images: int, *, array: str = "y_test", max_bytes: int = MAX_BYTES
) -> Tensor | None:
    """Load the labels of the test images of a data set, such as the digits that they show.

    Args:
        source: as for :func:`load`. A folder of IDX files has labels if the name of a file differs from that of the
            test images in the words ``labels`` and ``idx1``, as in ``t10k-labels-idx1-ubyte``.
        num_images: N, the number of test images.
        array: the name of the array in the ``.npz`` file.
        max_bytes: maximum memory of the labels, in bytes; more are rejected.

    Returns:
        int64 `[N]`; None if the data set has no labels.

    Raises:
        DataError: the labels are malformed, too large, or not as many as the images.
    """
    if source == DIGITS:
        return _digits("target")[:_DIGITS_TEST]
    path, found = Path(source), None
    if path.is_dir():
        images = _find_idx(_find_folder(path), _IDX_NAMES[1])
        name = re.sub(r"images([-.])idx[23]", r"labels\1idx1", images.name.removesuffix(".gz"))
        for file in (images.with_name(name + suffix) for suffix in _SUFFIXES):
            if file.is_file():
                path, found = file, _read_idx(file, (1,), max_bytes)
    elif array in _arrays(path):
        found = torch.from_numpy(_read_array(path, array, max_bytes, _LABELS).astype("int64"))
    if found is not None and found.shape != (num_images,):
        raise DataError(path, f"expected {num_images} labels, one per test image, got shape {list(found.shape)}")
    return None if found is None else found.long()


def _digits(part: str) -> Tensor:
    """Return the images or the labels of scikit-learn's digits, shuffled: the test set, then the training set."""
    from sklearn.datasets import load_digits

    values = torch.from_numpy(load_digits()[part])
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]


def _load_digits() -> Dataset:
    images = Images.of(_digits("images").byte(), white=16)
    return Dataset(
        DIGITS,
        train=replace(images, grey=images.grey[_DIGITS_TEST:]),
        test=replace(images, grey=images.grey[:_DIGITS_TEST]),
    )


def _check_shape(path: Path, name: str, shape: tuple[int, ...], max_bytes: int, pixel_bytes: int = 1) -> None:
    """Reject sizes that are not positive, exceed the limit, or are too large for the file even if it is compressed."""
    declared = f"{name} declares sizes {list(shape)}"
    size = math.prod(shape) * pixel_bytes
    if not all(length > 0 for length in shape):
        raise DataError(path, f"{declared}, expected each to be positive")
    if size > max_bytes:
        raise DataError(path, f"{declared}, more than the limit of {max_bytes:,} bytes")
    if size > path.stat().st_size * _DEFLATE_MAX_RATIO:
        raise DataError(path, f"{declared}, more than a file of {path.stat().st_size:,} bytes can hold")


def _images(path: Path, name: str, pixels: Any) -> Images:
    try:
        return Images.of(pixels, name=name)
    except (TypeError, ValueError) as error:
        raise DataError(path, str(error)) from error


# IDX: two zero bytes, the type (8 is uint8), the number of dimensions, each size as a big-endian 32-bit integer, then
# the pixels (described on the MNIST page of Y. LeCun).

_IDX_NAMES = (("train-images",), ("t10k-images", "test-images"))
_SUFFIXES = ("", ".gz")
_IMAGE_FILES = "*-images[-.]idx[23]-ubyte*"


def _find_folder(root: Path) -> Path:
    """Return the folder of the IDX files: the given one, or <data set>/raw in it, where torchvision puts them."""
    if any(root.glob(_IMAGE_FILES)):
        return root
    found = sorted({file.parent for below in ("raw", "*/raw") for file in root.glob(f"{below}/{_IMAGE_FILES}")})
    if len(found) > 1:
        raise DataError(root, f"holds several data sets; pass one of {', '.join(map(str, found))}")
    return found[0] if found else root


def _find_idx(folder: Path, names: tuple[str, ...]) -> Path:
    for suffix in _SUFFIXES:
        found = [p for name in names for p in folder.glob(f"*{name}[-.]idx[23]-ubyte{suffix}")]
        if len(found) == 1:
            return found[0]
        if found:
            files = ", ".join(sorted(p.name for p in found))
            raise DataError(folder, f"expected exactly one {names[0]} file, found {files}")
    raise DataError(folder, f"no {names[0]}-idx3-ubyte or {names[0]}-idx3-ubyte.gz in this folder")


def _read_idx(path: Path, dims: Sequence[int], max_bytes: int) -> Tensor:
    """Read uint8 values of one of these numbers of dimensions."""
    headers = [bytes((0, 0, 8, number)) for number in dims]
    with _naming(path), _open(path) as file:
        header = file.read(4)
        if header not in headers:
            expected = " or ".join(header.hex(" ") for header in headers)
            got = header.hex(" ") or "an empty file"
            raise DataError(path, f"expected an IDX header of uint8 data ({expected}), got {got}")
        sizes = file.read(4 * header[-1])
        if len(sizes) < 4 * header[-1]:
            raise DataError(path, f"holds {len(header + sizes)} bytes, less than an IDX header")
        shape = struct.unpack(f">{header[-1]}I", sizes)
        _check_shape(path, "the header", shape, max_bytes)
        size = math.prod(shape)
        values = bytearray()
        while chunk := file.read(min(_READ_BYTES, size + 1 - len(values))):
            values += chunk
    if len(values) != size:
        held = "more" if len(values) > size else f"{len(values):,}"
        raise DataError(path, f"the header declares {size:,} values, the file holds {held}")
    return torch.frombuffer(values, dtype=torch.uint8).view(*shape)


# Errors that gzip, zipfile and NumPy raise for malformed files. NumPy parses the header of an array with Python's
# tokenizer and parser.
_UNREADABLE = (
    *(EOFError, MemoryError, OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error),
    *(RecursionError, SyntaxError, tokenize.TokenError),
)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Raise errors that a malformed file causes as DataErrors, which name the file."""
    try:
        yield
    except DataError:
        raise
    except _UNREADABLE as error:
        raise DataError(path, f"cannot be read: {error or type(error).__name__}") from error


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


class _Values(NamedTuple):
    """The values that an array in an .npz file may hold."""

    description: str
    includes: Callable[[np.dtype[Any]], bool]


_PIXELS = _Values("uint8 (grey levels 0 to 255), bool or floating point (0 to 1)", _holds_pixels)
_LABELS = _Values("integers", lambda dtype: dtype.kind in "biu")


def _arrays(path: Path) -> set[str]:
    """Return the names of the arrays in an .npz file."""
    with _naming(path), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _read_array(path: Path, name: str, max_bytes: int, values: _Values) -> np.ndarray[Any, Any]:
    from numpy.lib import format as npy

    with _naming(path), zipfile.ZipFile(path) as archive:
        member = f"{name}.npy"
        if archive.getinfo(member).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(path, f"{member} uses a compression method other than deflate")
        with archive.open(member) as file:
            # NumPy saves arrays of numbers in version 1.0; later versions allow headers of any length
            if npy.read_magic(file) != (1, 0):
                raise DataError(path, f"{name} is not in version 1.0 of the .npy format")
            shape, _, dtype = npy.read_array_header_1_0(file)
        if not values.includes(dtype):
            raise DataError(path, f"expected {name} to be {values.description}, got {dtype}")
        _check_shape(path, name, shape, max_bytes, dtype.itemsize)
        with archive.open(member) as file:
            array: np.ndarray[Any, Any] = npy.read_array(file, allow_pickle=False)
            if file.read(1):
                raise DataError(path, f"{name} holds more than the sizes it declares")
    return array
