"""Check exp, log, cosine, sine and tanh of the kernels against extended precision, in ulps."""

from __future__ import annotations

import ctypes
import subprocess
import sysconfig
from typing import Any

import numpy as np
import pytest
from cases import thorough
from checkout import ROOT

KERNELS = ROOT / "csrc" / "kernels"

pytestmark = pytest.mark.xdist_group("elementary functions")

SOURCE = """
#include "elementary.h"
using namespace wakesleep;
template <typename T>
void all(const T* x, const typename Format<T>::Int* turn, T* e, T* l, T* t, T* c, T* s, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    e[i] = wakesleep::exp(x[i]);
    l[i] = log_of_normal(std::abs(x[i]));
    t[i] = wakesleep::tanh(x[i]);
    const auto direction = cos_sin_of_turn<T>(turn[i]);
    c[i] = direction.first;
    s[i] = direction.second;
  }
}
extern "C" void all_float(const float* x, const int32_t* turn, float* e, float* l, float* t, float* c, float* s,
                          int64_t n) {
  all<float>(x, turn, e, l, t, c, s, n);
}
extern "C" void all_double(const double* x, const int64_t* turn, double* e, double* l, double* t, double* c, double* s,
                           int64_t n) {
  all<double>(x, turn, e, l, t, c, s, n);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("elementary")
    (folder / "elementary.cpp").write_text(SOURCE)
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    flags = ["-O3", "-std=c++20", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    output = folder / "elementary.so"
    subprocess.run([compiler, *flags, f"-I{KERNELS}", str(folder / "elementary.cpp"), "-o", str(output)], check=True)
    return ctypes.CDLL(str(output))


def _evaluate(library: ctypes.CDLL, x: Any, turn: Any) -> tuple[Any, ...]:
    outputs = [np.empty_like(x) for _ in range(5)]
    function = library.all_float if x.dtype == np.float32 else library.all_double
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (x, turn, *outputs)]
    function(*pointers, ctypes.c_int64(x.size))
    return tuple(outputs)


def _ulps(got: Any, exact: Any) -> Any:
    spacing = np.spacing(np.maximum(np.abs(exact).astype(got.dtype), np.finfo(got.dtype).tiny))
    return np.abs(got.astype(np.longdouble) - exact) / spacing


@pytest.mark.parametrize("count", [100_000, thorough(2_000_000)])
@pytest.mark.parametrize(
    ("dtype", "integer"), [(np.float32, np.int32), (np.float64, np.int64)], ids=["float32", "float64"]
)
def test_within_two_ulps(library: ctypes.CDLL, dtype: type, integer: type, count: int) -> None:
    generator = np.random.default_rng(1)
    ends = (-87.3, 88.3) if dtype == np.float32 else (-708.3, 709.4)
    x = np.concatenate([
        generator.uniform(*ends, count), generator.normal(size=count), generator.uniform(0.5, 2, count),
        generator.normal(size=count) * 2.0 ** generator.integers(-40, 1, count)
    ]).astype(dtype)  # fmt: skip
    info = np.iinfo(integer)
    turn = generator.integers(info.min, info.max, x.size, dtype=integer, endpoint=True)
    exponential, logarithm, tangent, cosine, sine = _evaluate(library, x, turn)
    wide = x.astype(np.longdouble)
    assert _ulps(exponential, np.exp(wide)).max() < 1.6
    assert _ulps(logarithm[x != 0], np.log(np.abs(wide[x != 0]))).max() < 1.6
    assert _ulps(tangent, np.tanh(wide)).max() < 2.5
    bits = 8 * np.dtype(integer).itemsize
    angle = 2 * np.arccos(np.longdouble(-1)) * (turn.astype(np.longdouble) / np.longdouble(2) ** bits)
    larger = np.maximum(np.abs(np.cos(angle)), np.abs(np.sin(angle))).astype(dtype)
    for got, exact in ((cosine, np.cos(angle)), (sine, np.sin(angle))):
        assert (np.abs(got.astype(np.longdouble) - exact) / np.spacing(larger)).max() < 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ends_of_the_exponential(library: ctypes.CDLL, dtype: type) -> None:
    """Subnormal results become 0, and results in the topmost half power of two become inf. All others are accurate."""
    info = np.finfo(dtype)
    top = np.log(2) * (info.maxexp - 0.5)
    magnitudes = np.concatenate([[top + 1e-3, info.maxexp, info.max], np.logspace(2, np.log10(info.max) - 1, 1000)])
    magnitudes = magnitudes[magnitudes > top]
    finite = np.array([0, -0.0, -80, top - 1e-3, np.log(info.tiny) + 1e-3], dtype=dtype)
    x = np.concatenate([[np.inf, -np.inf, np.nan, -np.nan], magnitudes, -magnitudes, finite]).astype(dtype)
    turn = np.zeros(x.size, dtype=np.int32 if dtype == np.float32 else np.int64)
    ends = [np.inf, 0, np.nan, np.nan, *[np.inf] * magnitudes.size, *[0] * magnitudes.size]
    expected = np.concatenate([np.array(ends, dtype=dtype), np.exp(finite.astype(np.longdouble)).astype(dtype)])
    np.testing.assert_allclose(_evaluate(library, x, turn)[0], expected, rtol=4 * info.eps, atol=info.tiny)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ends_of_the_tangent(library: ctypes.CDLL, dtype: type) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 0, -0.0, 1e4, -1e4, 9.5, -25, np.finfo(dtype).max, 1e-30], dtype=dtype)
    turn = np.zeros(x.size, dtype=np.int32 if dtype == np.float32 else np.int64)
    tangent = _evaluate(library, x, turn)[2]
    np.testing.assert_allclose(tangent, np.tanh(x), rtol=4 * np.finfo(dtype).eps)
    assert np.signbit(tangent[4])


def test_quarter_turns(library: ctypes.CDLL) -> None:
    turn = np.array([0, 2**30, -(2**31), -(2**30)], dtype=np.int32)
    _, _, _, cosine, sine = _evaluate(library, np.ones(4, dtype=np.float32), turn)
    np.testing.assert_array_equal(cosine, [1, 0, -1, 0])
    np.testing.assert_array_equal(sine, [0, 1, 0, -1])
