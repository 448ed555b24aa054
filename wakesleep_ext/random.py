"""Keys, which determine the random numbers of the sampling ops.

Every draw is a pure function of its arguments and a *key*, an int64 tensor ``[seed, offset]`` on the same device.
Element i of the result uses word ``i % 4`` of block ``i // 4`` of Philox4x32-10 (Salmon et al. 2011) with that key. So
the same key gives the same draw, up to rounding, for any number of threads, vector width, device and dtype.

If you pass no key, the sampling op draws one from torch's generator, so ``torch.manual_seed`` works as usual. The op
reads the generator exactly once, for a draw of any size. Pass the same key twice to get the same noise twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["draw_key", "make_key", "philox", "philox_words", "standard_normals", "uniforms"]

_WORD = 0xFFFFFFFF
_HIGH_WORDS, _LOW_WORDS = 1, 2


def draw_key(like: Tensor | torch.device | str = "cpu", generator: torch.Generator | None = None) -> Tensor:
    """Draw a key, int64 ``[2]``, from ``generator``, or from the default generator of the device.

    Args:
        like: the device of the key, or any tensor on it.
        generator: a generator on that device. Under ``torch.compile``, torch cannot trace explicit generators; pass a
            key to the sampling op instead.
    """
    if not isinstance(like, Tensor):
        like = torch.empty(0, device=like)
    return torch.ops.wakesleep_ext.draw_key.default(like, generator=generator)


def make_key(seed: int, offset: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Return the key ``[seed, offset]``.

    The seed is any 64-bit integer. The offset, in [0, 2**60), distinguishes draws that share a seed.
    """
    if not 0 <= offset < 2**60:
        raise ValueError(f"make_key: expected offset in [0, 2**60), got {offset}")
    signed_seed = (seed + 2**63) % 2**64 - 2**63
    return torch.tensor([signed_seed, offset], dtype=torch.int64, device=device)


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, ...]:
    """Compute Philox4x32-10 in plain torch, for a counter of four words and a key of two words.

    Words are 32-bit integers, stored as int64.
    """
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def philox_words(key: Tensor, count: int, stream: int = _HIGH_WORDS) -> Tensor:
    """Return the first ``count`` 32-bit words for a key, int64 ``[count]``, in the layout of csrc/kernels/philox.h."""
    blocks = torch.arange(-(-count // 4), device=key.device)
    seed, offset = key.unbind()
    counter = (blocks & _WORD, blocks >> 32, offset & _WORD, ((offset >> 32) & 0x0FFFFFFF) | (stream << 28))
    words = philox(*counter, seed & _WORD, (seed >> 32) & _WORD)
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten()[:count]


def uniforms(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Compute, in plain torch, the uniform draws in (0, 1] that ``bernoulli_sample`` compares with probabilities."""
    high, low = _words(key, shape)
    if dtype == torch.float64:
        u = high.double() * 2.0**-32 + (low.double() * 2.0**-64 + 2.0**-65)
    else:
        u = high.float() * 2.0**-32 + 2.0**-33
    return u[: math.prod(shape)].reshape(tuple(shape))


def standard_normals(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Compute the noise eps ~ N(0, I) of ``gaussian_rsample`` in plain torch, by the Box-Muller transform (1958)."""
    high, low = _words(key, shape)
    u = uniforms(key, high.shape, dtype)[0::2]
    turn = high.double() * 2.0**-32
    if dtype == torch.float64:
        turn = turn + low.double() * 2.0**-64
    angle = 2 * math.pi * turn[1::2]
    radius = (-2 * u.double().log()).sqrt()
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return pairs.flatten()[: math.prod(shape)].to(dtype).reshape(tuple(shape))


def _words(key: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    count = -(-math.prod(shape) // 4) * 4  # round up to whole blocks
    return philox_words(key, count, _HIGH_WORDS), philox_words(key, count, _LOW_WORDS)


def _multiply(constant: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low word of the 64-bit product of two words. No intermediate result exceeds 63 bits."""
    low = constant * (value & 0xFFFF)
    high = constant * (value >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
