"""The Python side of the operators: fake kernels, vmap rules and functorch support.

Kernels and first-order gradients are registered in C++. Importing this package registers the rest.
"""

from wakesleep_ext._registrations import fakes, functorch, vmap

__all__ = ["fakes", "functorch", "vmap"]
