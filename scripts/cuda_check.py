"""Check that the installed package was built with CUDA and every operator has a CUDA kernel. Needs no GPU."""

from __future__ import annotations

import sys

import torch

import wakesleep_ext
from wakesleep_ext import _C, _build


def main() -> int:
    print(f"wakesleep_ext {wakesleep_ext.__version__}, torch {torch.__version__}, {_C.build_config()}")
    print(f"CUDA {_build.CUDA_VERSION}, compiled for {_build.CUDA_ARCHITECTURES}")
    names = sorted(
        schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("wakesleep_ext::")
    )
    missing = []
    for name in names:
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"):
            print(f"{name:55} composed of other operators")
            continue
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
        print(f"{name:55} {'CUDA' if has_kernel else 'no CUDA kernel'}")
        if not has_kernel:
            missing.append(name)
    if not names or missing or _build.CUDA_VERSION is None or _C.build_config()["cuda"] is None:
        print("wakesleep_ext: the CUDA build is incomplete", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
