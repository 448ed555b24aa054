"""Check binary images from grey levels: exact extremes, draws as in the formula, errors for invalid indices."""

from __future__ import annotations

import pytest
import torch
from cases import make_key

import wakesleep_ext as ws
from wakesleep_ext import reference

DTYPES = (None, torch.bool, torch.uint8, torch.float32, torch.float64, torch.bfloat16)


def _images(count: int, width: int, white: int, device: str) -> torch.Tensor:
    return torch.randint(white + 1, (count, width), device=device, dtype=torch.uint8)


@pytest.mark.parametrize("width", [1, 7, 64, 785, 3333])
@pytest.mark.parametrize("white", [1, 16, 255])
def test_binary_images_are_those_of_the_plain_form(width: int, white: int, device: str) -> None:
    grey, key = _images(6, width, white, device), make_key(device)
    for index in (None, torch.tensor([5, 0, 0, 3], device=device), torch.empty(0, dtype=torch.int64, device=device)):
        expected = reference.binarize(grey, white, index, key=key)
        for dtype in DTYPES:
            found = ws.binarize(grey, white, index, dtype=dtype, key=key)
            assert found.dtype == (dtype or torch.uint8)
            assert torch.equal(found.to(torch.uint8), expected)


def test_black_stays_off_and_white_is_on(device: str) -> None:
    for white in (1, 3, 255):
        grey = torch.tensor([[0, white]], dtype=torch.uint8, device=device).repeat(100_000, 1)
        assert ws.binarize(grey, white, key=make_key(device)).unique(dim=0).tolist() == [[0, 1]]


def test_grey_is_on_as_often_as_it_stands_for(device: str) -> None:
    count = 100_000
    levels = torch.arange(0, 256, 51, dtype=torch.uint8, device=device)
    means = ws.binarize(levels.repeat(count, 1), dtype=torch.float64, key=make_key(device)).mean(0)
    torch.testing.assert_close(means, levels / 255.0, rtol=0, atol=5 * 0.5 / count**0.5, check_dtype=False)


def test_rows_apart_in_memory(device: str) -> None:
    grey = _images(5, 40, 255, device)
    for view in (grey[::2, 3:20], grey.T):
        assert torch.equal(ws.binarize(view, key=make_key(device)), ws.binarize(view.clone(), key=make_key(device)))


def test_binary_images_follow_the_generator(device: str) -> None:
    grey = torch.full((10, 100), 128, dtype=torch.uint8, device=device)
    torch.manual_seed(4)
    first, second = (ws.binarize(grey) for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(first, ws.binarize(grey))
    assert not torch.equal(first, second)


def test_binarize_as_an_operator(device: str) -> None:
    grey, key = _images(6, 5, 255, device), make_key(device)
    for index in (None, torch.tensor([5, 0, 0, 3], device=device)):
        torch.library.opcheck(torch.ops.wakesleep_ext.binarize.default, (grey, key, 255, index, torch.float32))
    many = torch.vmap(lambda key: ws.binarize(grey, key=key))(torch.stack((key, key + 1)))
    assert torch.equal(many[1], ws.binarize(grey, key=key + 1))


GREY = torch.zeros(3, 4, dtype=torch.uint8)
REFUSED = [
    (lambda: ws.binarize(GREY.float()), TypeError, "binarize: expected grey to be uint8, got Float"),
    (lambda: ws.binarize(GREY[0]), ValueError, r"binarize: expected grey to have shape \[N, D\], got \[4\]"),
    (lambda: ws.binarize(GREY, 0), ValueError, "binarize: expected white in 1 .. 255, got 0"),
    (lambda: ws.binarize(GREY, 256), ValueError, "binarize: expected white in 1 .. 255, got 256"),
    (lambda: ws.binarize(GREY, index=torch.zeros(1)), TypeError, "binarize: expected index to be int64, got Float"),
    (lambda: ws.binarize(GREY, index=torch.tensor(0)), ValueError, r"expected index to have shape \[B\], got \[\]"),
    (lambda: ws.binarize(GREY, dtype=torch.int32), TypeError, "expected dtype to be bool, uint8 or floating, got Int"),
    (lambda: ws.binarize(GREY, index=torch.tensor([0, 3])), IndexError, r"index in 0 .. 2, the rows of grey, got 3"),
    (lambda: ws.binarize(GREY, index=torch.tensor([-1])), IndexError, r"index in 0 .. 2, the rows of grey, got -1"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[message[:60] for _, _, message in REFUSED])
def test_what_is_refused(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
