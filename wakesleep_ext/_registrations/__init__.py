"""Python registrations of the operators: fake kernels, and the vmap rule of `draw_key`.

Importing this package performs these registrations. Kernels, gradients and other vmap rules are registered in C++.
"""

from wakesleep_ext._registrations import fakes, vmap

__all__ = ["fakes", "vmap"]
