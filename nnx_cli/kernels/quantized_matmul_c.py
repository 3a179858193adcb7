"""The matmul of a few rows with int8 weights that is written in C; quantized_matmul.c says how it computes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nnx_cli.system.c_library import load_threaded

SOURCE = Path(__file__).with_name("quantized_matmul.c")
SHARES = 4  # of a matrix, for every thread
LEAST_SHARE = 2**15  # bytes of a matrix that are worth another share


def c_matmul(codes: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    """Matmul of x, float32, up to 8 rows, with weights codes (N, K) int8 × scale (N,) float32.

    Raises RuntimeError where this machine does not have it.
    """
    found = load_threaded(SOURCE)
    if found is None:
        raise RuntimeError("there is no C compiler, or no OpenMP that it can use")
    multiply, parallel = found[0].multiply, found[1]
    multiply.argtypes = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 4, ctypes.c_uint, ctypes.c_void_p]
    codes, scale = codes.contiguous(), scale.contiguous()
    N, K = codes.shape

    def matmul(x: Tensor) -> Tensor:
        x, threads = x.contiguous(), torch.get_num_threads()
        y = x.new_empty(*x.shape[:-1], N)
        share = max(-(-N // (SHARES * threads)), LEAST_SHARE // K, 1)
        pointers = codes.data_ptr(), scale.data_ptr(), x.data_ptr(), y.data_ptr()
        if not multiply(*pointers, x.numel() // K, N, K, share, 1 if share >= N else threads, parallel):
            raise MemoryError("no memory for a row of numbers")
        return y

    return matmul
