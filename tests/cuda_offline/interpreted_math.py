"""What Inductor's kernels call of CUDA's math library, for Triton's interpreter, which has no such library."""

from __future__ import annotations

import triton.language as tl


class libdevice:
    """Functions of blocks, in terms of those that the interpreter knows."""

    @staticmethod
    def rsqrt(x):
        return 1.0 / tl.sqrt(x)

    @staticmethod
    def sqrt(x):
        return tl.sqrt(x)

    @staticmethod
    def tanh(x):
        return 2 * (1 / (1 + tl.exp(-2 * x))) - 1

    @staticmethod
    def erf(x):
        return tl.erf(x)

    @staticmethod
    def exp(x):
        return tl.exp(x)

    @staticmethod
    def pow(x, y):
        return tl.exp(y * tl.log(x))

    @staticmethod
    def sin(x):
        return tl.sin(x)

    @staticmethod
    def cos(x):
        return tl.cos(x)

    @staticmethod
    def log(x):
        return tl.log(x)
