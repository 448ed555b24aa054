"""Python registrations of the operators: fake kernels, vmap rules and functorch support.

Importing this package performs these registrations. Kernels and first-order gradients are registered in C++.
"""

from wakesleep_ext._registrations import fakes, functorch, vmap

__all__ = ["fakes", "functorch", "vmap"]
