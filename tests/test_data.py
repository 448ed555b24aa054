"""Read images, binarise them, and reject invalid files."""

import contextlib
import gzip
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from checkout import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from wakesleep_ext.random import make_key
from wakesleep_ext.training.data import DIGITS, DataError, Images, load, load_test_labels

MNIST = Path(os.environ.get("WAKESLEEP_MNIST") or ROOT / "../shared/data/mnist")

rng = np.random.default_rng(0)
TRAIN = rng.integers(256, size=(7, 3, 4), dtype=np.uint8)
TEST = rng.integers(256, size=(2, 3, 4), dtype=np.uint8)


def idx(pixels, header=None):
    header = header or (0, 0, 8, pixels.ndim, *pixels.shape)
    return struct.pack(f">4B{len(header) - 4}I", *header) + pixels.tobytes()


def write_idx(folder, *, train=None, test=None, compress=False):
    """Write a folder of two IDX files; `train` and `test` are bytes to write instead of TRAIN and TEST."""
    for name, content in (
        ("train-images-idx3-ubyte", idx(TRAIN) if train is None else train),
        ("t10k-images-idx3-ubyte", idx(TEST) if test is None else test),
    ):
        path = folder / (name + ".gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)
    return folder


def write_npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def npy(array=None, *, shape=None, descr="|u1", body=b""):
    """Return a .npy file of an array, or with a header that may claim anything."""
    file = io.BytesIO()
    if array is not None:
        np.save(file, array)
    else:
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(body)
    return file.getvalue()


def write_zip(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


class TestSources:
    def test_the_digits_need_no_file(self):
        digits = load(DIGITS)
        assert (len(digits.train), len(digits.test)) == (1437, 360)
        assert digits.train.shape == (8, 8)
        assert (digits.train.grey.dtype, digits.train.grey.shape[1]) == (torch.uint8, 64)
        assert digits.train.white == digits.train.grey.max() == 16

    def test_the_digits_are_split_once_and_for_all(self):
        from sklearn.datasets import load_digits

        first, second = load(DIGITS), load(DIGITS)
        assert torch.equal(first.test.grey, second.test.grey)
        together = torch.cat((first.train.grey, first.test.grey))
        pixels = torch.from_numpy(load_digits().data).to(torch.uint8)
        assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, pixels.tolist()))

    @pytest.mark.parametrize("compress", [False, True])
    def test_idx_files_are_read(self, tmp_path, compress):
        dataset = load(write_idx(tmp_path, compress=compress))
        assert torch.equal(dataset.train.grey, torch.from_numpy(TRAIN).flatten(1))
        assert torch.equal(dataset.test.grey, torch.from_numpy(TEST).flatten(1))
        assert (dataset.train.shape, dataset.train.white) == ((3, 4), 255)
        assert dataset.name == tmp_path.name

    @pytest.mark.parametrize(
        "names",
        [
            ("train-images.idx3-ubyte", "t10k-images.idx3-ubyte"),
            ("emnist-letters-train-images-idx3-ubyte", "emnist-letters-test-images-idx3-ubyte"),
        ],
    )
    def test_idx_files_may_be_named_as_mnists_relatives_are(self, tmp_path, names):
        for name, pixels in zip(names, (TRAIN, TEST), strict=True):
            (tmp_path / name).write_bytes(idx(pixels))
        assert len(load(tmp_path).test) == 2

    def test_idx_files_of_flat_images(self, tmp_path):
        for name, pixels in (("train-images-idx2-ubyte", TRAIN), ("t10k-images.idx2-ubyte", TEST)):
            (tmp_path / name).write_bytes(idx(pixels.reshape(len(pixels), 12)))
        dataset = load(tmp_path)
        assert dataset.train.shape == (1, 12)
        assert torch.equal(dataset.test.grey, torch.from_numpy(TEST).flatten(1))

    @pytest.mark.parametrize("above", ["", "MNIST"])
    def test_the_root_of_a_data_set_of_torchvision(self, tmp_path, above):
        raw = tmp_path / above / "raw"
        raw.mkdir(parents=True)
        write_idx(raw)
        write_idx(raw, compress=True)
        (raw / "train-labels-idx1-ubyte").write_bytes(bytes(8))
        assert torch.equal(load(tmp_path).train.grey, torch.from_numpy(TRAIN).flatten(1))

    @pytest.mark.skipif(not MNIST.is_dir(), reason="WAKESLEEP_MNIST names no folder")
    def test_mnist_itself(self):
        mnist = load(MNIST)
        assert mnist.train.grey.shape == (60_000, 784)
        assert mnist.test.grey.shape == (10_000, 784)
        assert mnist.train.mean().mean().item() == pytest.approx(0.1307, abs=1e-4)

    def test_npz_of_grey_levels(self, tmp_path):
        dataset = load(write_npz(tmp_path / "images.npz", x_train=TRAIN, x_test=TEST, y_test=[1, 2]))
        assert torch.equal(dataset.train.grey, torch.from_numpy(TRAIN).flatten(1))
        assert (dataset.test.shape, dataset.test.white) == ((3, 4), 255)
        assert dataset.name == "images"

    def test_npz_of_binary_pixels(self, tmp_path):
        x = TRAIN > 99
        dataset = load(write_npz(tmp_path / "images.npz", x_train=x, x_test=x))
        assert torch.equal(dataset.binary_test(), torch.from_numpy(x).flatten(1).to(torch.uint8))

    @pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2"])
    def test_npz_of_probabilities_by_any_names(self, tmp_path, dtype):
        pixels = (TRAIN / 255).astype(dtype)
        path = write_npz(tmp_path / "images.npz", train=pixels, held_out=pixels[:2])
        dataset = load(path, train_array="train", test_array="held_out")
        assert torch.equal(dataset.train.grey, torch.from_numpy(pixels.astype(np.float32)).flatten(1))
        assert len(dataset.test) == 2

    @pytest.mark.parametrize(("pixels", "shape"), [(9, (3, 3)), (12, (1, 12))])
    def test_npz_of_flat_images(self, tmp_path, pixels, shape):
        x = TRAIN.reshape(7, 12)[:, :pixels]
        dataset = load(write_npz(tmp_path / "images.npz", x_train=x, x_test=np.asfortranarray(x)))
        assert dataset.train.shape == shape
        assert torch.equal(dataset.test.grey, torch.from_numpy(x))


class TestLabels:
    def test_the_labels_of_the_digits_are_those_of_their_images(self):
        from sklearn.datasets import load_digits

        labels, held = load_test_labels(DIGITS, 360), load_digits()
        label_of = dict(zip(map(bytes, held.data.astype(np.uint8)), held.target, strict=True))  # no image occurs twice
        assert labels.tolist() == [label_of[image.numpy().tobytes()] for image in load(DIGITS).test.grey]

    @pytest.mark.parametrize("compress", [False, True])
    @pytest.mark.parametrize(
        ("images", "labels"),
        [
            ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
            ("t10k-images.idx2-ubyte", "t10k-labels.idx1-ubyte"),
            ("emnist-digits-test-images-idx3-ubyte", "emnist-digits-test-labels-idx1-ubyte"),
        ],
    )
    def test_idx_labels_stand_next_to_the_images(self, tmp_path, images, labels, compress):
        (tmp_path / images).write_bytes(idx(TEST))
        assert load_test_labels(tmp_path, 2) is None
        content = idx(np.array([7, 255], np.uint8))
        (tmp_path / (labels + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)
        assert load_test_labels(tmp_path, 2).tolist() == [7, 255]

    def test_npz_labels_may_have_any_name(self, tmp_path):
        path = write_npz(tmp_path / "images.npz", x_test=TEST, y_test=np.array([3, 4], ">i2"), of=[True, False])
        assert load_test_labels(path, 2).tolist() == [3, 4]
        assert load_test_labels(path, 2, array="of").tolist() == [1, 0]
        assert load_test_labels(path, 2, array="others") is None

    def test_other_files_are_no_labels(self, tmp_path):
        path = write_npz(tmp_path / "images.npz", y_test=[0.5])
        with pytest.raises(DataError, match=r"images\.npz: expected y_test to be integers, got float64"):
            load_test_labels(path, 2)
        path = write_npz(tmp_path / "images.npz", y_test=[[0, 1], [1, 0]])
        with pytest.raises(DataError, match=r"expected 2 labels, one per test image, got shape \[2, 2\]"):
            load_test_labels(path, 2)
        write_idx(tmp_path)
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(TEST))
        with pytest.raises(DataError, match=r"labels-idx1-ubyte: expected .* \(00 00 08 01\), got 00 00 08 03"):
            load_test_labels(tmp_path, 2)


class Items(torch.utils.data.Dataset):
    """A map-style dataset of the given items."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class TestImages:
    GREY = torch.from_numpy(TRAIN)
    SOURCES: ClassVar = {
        "tensor": GREY,
        "array": TRAIN,
        "read-only array": np.frombuffer(TRAIN.tobytes(), np.uint8).reshape(TRAIN.shape),
        "other strides": np.asfortranarray(TRAIN),
        "one channel": GREY.unsqueeze(1),
        "TensorDataset": torch.utils.data.TensorDataset(GREY, torch.arange(7)),
        "images alone": Items(list(GREY.unsqueeze(1))),
        "images and labels": Items([(image, 3) for image in TRAIN]),
    }

    @pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
    def test_pixels_may_come_from_anywhere(self, source):
        images = Images.of(source)
        assert torch.equal(images.grey, self.GREY.flatten(1))
        assert (images.shape, images.white) == ((3, 4), 255)

    def test_pictures_of_pillow(self):
        pillow = pytest.importorskip("PIL.Image")
        images = Images.of(Items([(pillow.fromarray(image), 0) for image in TRAIN]))
        assert torch.equal(images.grey, self.GREY.flatten(1))

    def test_binary_pixels(self):
        images = Images.of(self.GREY > 99)
        assert (images.grey.dtype, images.white) == (torch.uint8, 1)
        assert torch.equal(images.binarize(make_key(0)), (self.GREY > 99).flatten(1).byte())

    def test_probabilities_are_not_rounded_to_grey_levels(self):
        p = torch.tensor([0.0, 1e-3, 0.25, 0.5011, 1 - 1e-3, 1.0])
        count = 200_000
        images = Images.of(p.expand(count, -1))
        assert torch.equal(images.grey[0], p)
        torch.testing.assert_close(images.mean(), p.double())
        x = images.binarize(make_key(0))
        assert x.dtype == torch.uint8
        frequency = x.double().mean(0)
        assert (frequency[0], frequency[-1]) == (0, 1)
        assert ((frequency - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()
        index = torch.tensor([2, 0])
        assert torch.equal(images.binarize(make_key(1), index, torch.float32), images.binarize(make_key(1))[:2].float())

    NAN = torch.tensor([[0.5, torch.nan]])
    BAD: ClassVar = {
        "NaN": (NAN, ValueError, "expected pixels from 0 to 1, got values from nan"),
        "negative": (-GREY.float(), ValueError, "from 0 to 1, got values from -2"),
        "infinite": (np.full((2, 4), 1e300), ValueError, "from 0 to 1, got values from inf"),
        "no images": (GREY[:0], ValueError, r"expected pixels to be at least one image, .* got \[0, 3, 4\]"),
        "no pixels": (GREY[..., :0], ValueError, r"at least one image, .* got \[7, 3, 0\]"),
        "one row": (GREY[0, 0], ValueError, r"\[N, H, W\] or \[N, D\], got \[4\]"),
        "colour": (GREY.unsqueeze(1).expand(-1, 3, -1, -1), ValueError, r"got \[7, 3, 3, 4\]"),
        "binary": (GREY // 128, ValueError, "every grey level in pixels is 0 or 1, .* use bool pixels"),
        "int64": (GREY.long(), TypeError, "expected pixels to be uint8 .* got torch.int64"),
        "int16 array": (TRAIN.astype("i2"), TypeError, "expected pixels to be uint8 .* got int16"),
        "list": (GREY.tolist(), TypeError, "in a tensor, an array or a map-style dataset, got list"),
        "empty dataset": (Items([]), ValueError, r"at least one image, .* got \[0\]"),
        "dict items": (Items([{"image": GREY[0]}]), TypeError, r"expected pixels\[0\] to be uint8 .* got dict"),
        "sizes that differ": (Items([GREY[0], GREY[0, :2]]), ValueError, r"pixels\[1\] to be torch.uint8 \[3, 4\] as "),
        "a stream": (
            torch.utils.data.ChainDataset([]),
            TypeError,
            "map-style dataset with a length, got Chain",
        ),
    }

    @pytest.mark.parametrize(("pixels", "error", "message"), BAD.values(), ids=BAD)
    def test_other_pixels_are_refused(self, pixels, error, message):
        with pytest.raises(error, match=message):
            Images.of(pixels)

    @pytest.mark.parametrize(("pixels", "white"), [(GREY, 0), (GREY, 256), (GREY > 0, 16), (GREY / 255, 255)])
    def test_white_is_a_grey_level(self, pixels, white):
        with pytest.raises(ValueError, match=rf"expected white in 1 \.\. 255, and only with uint8 pixels, got {white}"):
            Images.of(pixels, white=white)

    def test_levels_above_white_are_refused(self):
        with pytest.raises(ValueError, match="expected levels from 0 to 16, got values from 0 to 2"):
            Images.of(self.GREY, white=16, name="levels")


class TestBinarisation:
    GREY = torch.tensor([[0, 1, 64, 128, 254, 255]], dtype=torch.uint8)

    def test_pixels_are_on_as_often_as_they_are_white(self):
        count = 200_000
        images = Images(self.GREY.expand(count, -1), white=255, shape=(2, 3))
        x = images.binarize(make_key(0))
        assert x.dtype == torch.uint8
        frequency, expected = x.double().mean(0), self.GREY[0].double() / 255
        assert frequency[0] == 0
        assert frequency[-1] == 1
        five_sigma = 5 * (expected * (1 - expected) / count).sqrt()
        assert ((frequency - expected).abs() <= five_sigma).all()
        torch.testing.assert_close(images.mean(), expected)

    def test_levels_count_from_the_white_of_the_data(self):
        images = Images(torch.tensor([[0, 8, 16]], dtype=torch.uint8), white=16, shape=(1, 3))
        assert images.mean().tolist() == [0, 0.5, 1]

    def test_each_key_binarises_anew(self):
        images = load(DIGITS).train
        assert torch.equal(images.binarize(make_key(1)), images.binarize(make_key(1)))
        assert not torch.equal(images.binarize(make_key(1)), images.binarize(make_key(2)))

    def test_a_batch_is_binarised_by_index(self):
        images = Images(torch.tensor([[0, 0], [255, 255], [0, 255]]).byte(), 255, (1, 2))
        assert images.binarize(make_key(0), torch.tensor([2, 1])).tolist() == [[0, 1], [1, 1]]

    def test_the_test_set_is_binarised_once_and_for_all(self):
        assert torch.equal(load(DIGITS).binary_test(), load(DIGITS).binary_test())


class Explosive:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


SIZE = 7 * 3 * 4

BAD_IDX = {
    "empty": (b"", "expected an IDX header .* got an empty file"),
    "half a header": (idx(TRAIN)[:9], "holds 9 bytes, less than an IDX header"),
    "labels": (idx(TRAIN, (0, 0, 8, 1, 7, 3, 4)), "got 00 00 08 01"),
    "floats": (idx(TRAIN, (0, 0, 13, 3, 7, 3, 4)), "got 00 00 0d 03"),
    "text": (b"<!DOCTYPE html><html>", "got 3c 21 44 4f"),
    "no images": (idx(TRAIN[:0]), "expected each to be positive"),
    "no columns": (idx(TRAIN[..., :0]), "expected each to be positive"),
    "truncated": (idx(TRAIN)[:-1], f"declares {SIZE} values, the file holds {SIZE - 1}"),
    "trailing": (idx(TRAIN) + b"!", f"declares {SIZE} values, the file holds more"),
    "too large": (idx(TRAIN, (0, 0, 8, 3, *[2**32 - 1] * 3)), "more than the limit of .* bytes"),
    "impossible": (idx(TRAIN, (0, 0, 8, 3, 2**20, 28, 28)), "more than a file of .* can hold"),
    "binary": (idx(TRAIN // 128), "every grey level in the file is 0 or 1, .* bool array in a .npz"),
}


class TestBadFiles:
    @pytest.mark.parametrize("compress", [False, True])
    @pytest.mark.parametrize(("content", "reason"), BAD_IDX.values(), ids=BAD_IDX)
    def test_idx(self, tmp_path, content, reason, compress):
        write_idx(tmp_path, train=content, compress=compress)
        name = "train-images-idx3-ubyte" + ".gz" * compress
        with pytest.raises(DataError, match=f"{name}: .*{reason}"):
            load(tmp_path)

    @pytest.mark.parametrize("keep", [0, 5, 30, -9, -1])
    def test_truncated_gzip(self, tmp_path, keep):
        write_idx(tmp_path, compress=True)
        path = tmp_path / "train-images-idx3-ubyte.gz"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(DataError, match=path.name):
            load(tmp_path)

    def test_gzip_with_a_wrong_checksum(self, tmp_path):
        write_idx(tmp_path, compress=True)
        path = tmp_path / "train-images-idx3-ubyte.gz"
        content = bytearray(path.read_bytes())
        content[-6] ^= 1
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{path.name}: cannot be read: CRC"):
            load(tmp_path)

    def test_no_such_source(self, tmp_path):
        with pytest.raises(DataError, match="nowhere: expected 'digits', a folder"):
            load(tmp_path / "nowhere")

    def test_a_folder_without_images(self, tmp_path):
        with pytest.raises(DataError, match="no train-images-idx3-ubyte or"):
            load(tmp_path)

    def test_mnist_is_not_downloaded_but_pointed_to(self, tmp_path):
        with pytest.raises(DataError, match=r"mnist: does not exist\. Download train-images-.* pass --data"):
            load(tmp_path / "mnist")

    def test_a_root_with_several_data_sets_of_torchvision(self, tmp_path):
        for name in ("MNIST", "KMNIST"):
            (tmp_path / name / "raw").mkdir(parents=True)
            write_idx(tmp_path / name / "raw")
        with pytest.raises(DataError, match=r"several data sets; pass one of .*/KMNIST/raw, .*/MNIST/raw"):
            load(tmp_path)

    def test_a_folder_with_several_data_sets(self, tmp_path):
        write_idx(tmp_path)
        (tmp_path / "emnist-train-images-idx3-ubyte").write_bytes(idx(TRAIN))
        with pytest.raises(DataError, match="expected exactly one train-images file, found emnist-"):
            load(tmp_path)

    def test_sizes_that_differ(self, tmp_path):
        write_idx(tmp_path, test=idx(TEST[:, :2]))
        with pytest.raises(DataError, match=r"training images have shape \(3, 4\), but test images \(2, 4\)"):
            load(tmp_path)

    @pytest.mark.parametrize(
        ("x_train", "reason"),
        [
            (npy(TRAIN.astype(int)), "expected x_train to be uint8 .* got int64"),
            (npy(TRAIN.astype("f4")), "expected x_train from 0 to 1, got values from 0 to 2"),
            (npy(shape=(2**29, 3), descr="<f8"), "more than the limit of .* bytes"),
            (npy(TRAIN[0, 0]), r"\[N, H, W\] or \[N, D\], got \[4\]"),
            (npy(TRAIN[:0]), "expected each to be positive"),
            (npy(TRAIN // 128), "every grey level in x_train is 0 or 1"),
            (b"", "cannot be read"),
            (b"PK\3\4 not an array", "cannot be read"),
            (npy(TRAIN)[:-1], "cannot be read"),
            (npy(TRAIN) + b"!", "x_train holds more than the sizes it declares"),
            (npy(shape=(-7, 3, 4)), "expected each to be positive"),
            (npy(shape=(2**40, 28, 28)), "more than the limit of .* bytes"),
            (npy(shape=(2**20, 28, 28)), "more than a file of .* can hold"),
            (npy(shape=(9, 9), descr="|O"), "expected x_train to be uint8"),
        ],
    )
    def test_npz(self, tmp_path, x_train, reason):
        path = write_zip(tmp_path / "images.npz", {"x_train.npy": x_train, "x_test.npy": npy(TEST)})
        with pytest.raises(DataError, match=f"images.npz: .*{reason}"):
            load(path)

    @pytest.mark.parametrize("held", ["x_train", ""])
    def test_npz_without_an_array(self, tmp_path, held):
        path = write_npz(tmp_path / "images.npz", **({held: TRAIN} if held else {}))
        with pytest.raises(DataError, match=f"expected arrays x_train and x_test .* got {held or 'nothing'}"):
            load(path)

    def test_npz_that_is_no_zip(self, tmp_path):
        (tmp_path / "images.npz").write_bytes(b"no zip at all")
        with pytest.raises(DataError, match=r"images\.npz: cannot be read"):
            load(tmp_path / "images.npz")

    def test_npz_compressed_beyond_what_deflate_can(self, tmp_path):
        members = {"x_train.npy": npy(TRAIN), "x_test.npy": npy(TEST)}
        path = write_zip(tmp_path / "images.npz", members, zipfile.ZIP_LZMA)
        with pytest.raises(DataError, match="a compression method other than deflate"):
            load(path)

    def test_nothing_is_ever_unpickled(self, tmp_path):
        trap = tmp_path / "sprung"
        bomb = np.array([Explosive(trap)], dtype=object)
        write_npz(tmp_path / "images.npz", x_train=bomb, x_test=bomb)
        with pytest.raises(DataError, match=r"expected x_train to be uint8 .* got object"):
            load(tmp_path / "images.npz")
        (tmp_path / "pickled.npz").write_bytes(pickle.dumps(Explosive(trap)))
        with pytest.raises(DataError, match="cannot be read"):
            load(tmp_path / "pickled.npz")
        assert not trap.exists()


class TestBombs:
    """Small files that would expand to much data are rejected before memory is allocated."""

    LARGE = 256 * 2**20

    def refuse(self, path, reason):
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match=reason):
                load(path)
            assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
        finally:
            tracemalloc.stop()

    def test_gzip_that_holds_more_than_it_declares(self, tmp_path):
        write_idx(tmp_path, train=idx(TRAIN) + bytes(self.LARGE), compress=True)
        self.refuse(tmp_path, "the file holds more")

    def test_gzip_that_declares_more_than_it_holds(self, tmp_path):
        padding = rng.bytes(2**20)  # so that the file could, by its size, hold what it declares
        content = idx(TRAIN, (0, 0, 8, 3, 2**20, 28, 28)) + padding
        write_idx(tmp_path, train=content, compress=True)
        self.refuse(tmp_path, "declares 822,083,584 values, the file holds")

    def test_gzip_of_more_than_is_read(self, tmp_path):
        header = idx(TRAIN[:0], (0, 0, 8, 3, 5, 2**15, 2**15))
        write_idx(tmp_path, train=header + bytes(self.LARGE), compress=True)
        self.refuse(tmp_path, "more than the limit of 4,294,967,296 bytes")

    def test_npz_that_holds_more_than_it_declares(self, tmp_path):
        content = npy(shape=(7, 3, 4), body=bytes(self.LARGE))
        self.refuse(write_zip(tmp_path / "images.npz", {"x_train.npy": content, "x_test.npy": npy(TEST)}), "holds more")

    def test_npz_header_that_never_ends(self, tmp_path):
        content = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b" " * self.LARGE
        path = write_zip(tmp_path / "images.npz", {"x_train.npy": content, "x_test.npy": npy(TEST)})
        self.refuse(path, "not in version 1.0")

    def test_limits_are_the_callers(self, tmp_path):
        write_idx(tmp_path)
        with pytest.raises(DataError, match="more than the limit of 83 bytes"):
            load(tmp_path, max_bytes=SIZE - 1)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_named_or_harmless(tmp_path_factory, data):
    """A damaged file is read or rejected, and never fails in another way."""
    folder = tmp_path_factory.mktemp("data")
    kind = data.draw(st.sampled_from(["idx", "gzip", "npz"]))
    if kind == "npz":
        source = path = write_npz(folder / "images.npz", x_train=TRAIN, x_test=TEST)
    else:
        source = write_idx(folder, compress=kind == "gzip")
        path = next(folder.glob("train*"))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(DataError):
        assert load(source).train.grey.dtype == torch.uint8
