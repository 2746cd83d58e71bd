"""The C code for the CPU, native.c: compiled by each process that needs it, in about a second, and called here.

Everything has PyTorch operations to fall back on, where there is no C compiler or numbers are of another type than
float32 and float64. Images are (N, C, H, W), and the outputs channels-last; nothing is recorded for differentiation.
"""

import ctypes
import functools
import logging
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

REAL = {torch.float32: "float", torch.float64: "double"}
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def depthwise(x, relu, convolutions):
    """Depthwise convolutions of x, or with `relu` of relu(x): a list.

    convolutions: pairs of a weight, (C, 1, k, k), and its (stride, padding, dilation).
    """
    library = _library_for(x, convolutions)
    if library is None:
        x = x.relu() if relu else x
        return [F.conv2d(x, weight, None, *geometry, len(weight)) for weight, geometry in convolutions]
    x = _channels_last(x)
    N, C, H, W = x.shape
    zs = [_empty(x, C, -(-H // stride), -(-W // stride)) for _, (stride, _, _) in convolutions]
    table = _table(convolutions, zs, [None] * len(zs))
    _run(library.depthwise, x, N, H, W, C, int(relu), table, len(table))
    return zs


def depthwise_gradients(x, relu, convolutions, dzs, wants_x, wants_weights):
    """Of `depthwise` (dx, [dweight]) from the gradients of its outputs; None for what is not wanted."""
    library = _library_for(x, convolutions)
    if library is None:
        return plain_depthwise_gradients(x, relu, convolutions, dzs, wants_x, wants_weights)
    x, dzs = _channels_last(x), [_channels_last(dz) for dz in dzs]
    N, C, H, W = x.shape
    dx = _empty(x, C, H, W) if wants_x else None
    dweights = [
        torch.empty_like(weight) if wanted else None for (weight, _), wanted in zip(convolutions, wants_weights)
    ]
    table = _table(convolutions, dzs, dweights)
    _run(library.depthwise_gradients, x, dx, N, H, W, C, int(relu), table, len(table))
    return dx, dweights


def plain_depthwise_gradients(x, relu, convolutions, dzs, wants_x, wants_weights):
    """`depthwise_gradients` by PyTorch, which can be differentiated."""
    activated, dx, dweights = x.relu() if relu else x, None, []
    for (weight, (stride, padding, dilation)), dz, wants_weight in zip(convolutions, dzs, wants_weights):
        part, dweight, _ = torch.ops.aten.convolution_backward(
            dz, activated, weight, None, [stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], len(weight),
            [wants_x, wants_weight, False],
        )  # fmt: skip
        dx = part if dx is None else dx + part
        dweights.append(dweight)
    return torch.ops.aten.threshold_backward(dx, x, 0) if relu and wants_x else dx, dweights


def mix(terms, base=None, shift=None):
    """base + shift + sum over terms of x A, images of C channels.

    terms: pairs of images x of K channels and A, (K, C); base: images; shift: (C,); either may be None.
    """
    x = terms[0][0]
    library, C = _library(x.dtype), terms[0][1].shape[1]
    if any((image.shape[1], C, x.dtype) != (*A.shape, A.dtype) or image.dtype != x.dtype for image, A in terms):
        raise ValueError(f"matrices must be (channels, {C}) of {x.dtype}")
    if library is None:
        y = sum(_matrix(x) @ A for x, A in terms)
        y = y if shift is None else y + shift
        y = y.unflatten(0, (len(x), *x.shape[2:])).permute(0, 3, 1, 2)
        return y if base is None else base + y
    out = _empty(x, C, *x.shape[2:])
    terms = [(_channels_last(x), A.contiguous()) for x, A in terms]
    table = (_Term * len(terms))(*[(x.data_ptr(), A.data_ptr(), len(A)) for x, A in terms])
    base, shift = None if base is None else _channels_last(base), None if shift is None else shift.contiguous()
    _run(library.mix, out, base, shift, out.numel() // C, C, table, len(table))
    return out


def products(a, b):
    """Sums over the pixels of images a and b, of K and C channels, in float64: of a, (K,), and of a b', (K, C)."""
    library = _library(a.dtype)
    if library is None:
        a, b = _matrix(a), _matrix(b)
        return a.sum(0, dtype=torch.float64), (a.mT @ b).double()
    a, b = _channels_last(a), _channels_last(b)
    K, C = a.shape[1], b.shape[1]
    found, product = (torch.empty(shape, dtype=torch.float64) for shape in ((K,), (K, C)))
    _run(library.products, a, b, found, product, a.numel() // K, K, C)
    return found, product


def _matrix(image):
    """(N, C, H, W) as (pixels, C)."""
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def _channels_last(image):
    return image.contiguous(memory_format=torch.channels_last)


def _empty(x, C, H, W):
    """Images, channels-last. NumPy's memory lies at 16 bytes, which glibc's allocator finds again once it is free; of
    PyTorch's, at 64, it loses much to holes that are just too small."""
    return torch.from_numpy(np.empty((len(x), H, W, C), NUMPY[x.dtype])).permute(0, 3, 1, 2)


class _Convolution(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "z", "dweight")] + [
        (name, ctypes.c_long) for name in ("k", "stride", "dilation")
    ]


class _Term(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("A", ctypes.c_void_p), ("K", ctypes.c_long)]


def _table(convolutions, zs, dweights):
    rows = [
        (weight.data_ptr(), z.data_ptr(), dweight if dweight is None else dweight.data_ptr(), weight.shape[-1], *ways)
        for (weight, (stride, _, dilation)), z, dweight in zip(convolutions, zs, dweights)
        for ways in [(stride, dilation)]
    ]
    return (_Convolution * len(rows))(*rows)


def _run(function, *arguments):
    if function(*map(_argument, arguments)):
        raise MemoryError(f"no memory for {function.__name__}")


def _argument(value):
    if value is None or isinstance(value, torch.Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    return ctypes.c_long(value) if isinstance(value, int) else value


def _library_for(x, convolutions):
    """native.c for such images and convolutions; None for those that it doesn't know, or that PyTorch will refuse."""
    for weight, (_, padding, dilation) in convolutions:
        k = weight.shape[-1]
        if weight.shape != (x.shape[1], 1, k, k) or k % 2 == 0 or padding != dilation * (k // 2):
            return None
        if not weight.is_contiguous() or (weight.dtype, weight.device) != (x.dtype, x.device):
            return None
    return _library(x.dtype)


@functools.cache
def _library(dtype):
    """native.c for numbers of a type, or None."""
    if dtype not in REAL:
        return None
    compiler = os.environ.get("CC") or "cc"
    source = Path(__file__).with_name("native.c")
    options = ["-O3", "-march=native", "-fopenmp", "-fPIC", f"-DREAL={REAL[dtype]}"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            compiled, library = Path(folder) / "native.o", Path(folder) / "native.so"
            for command in ([*options, "-c", source, "-o", compiled], ["-shared", compiled, "-o", library]):
                # linked without OpenMP's library, so that it takes the one that PyTorch has loaded, and its threads
                subprocess.run([*shlex.split(compiler), *command], check=True, capture_output=True, text=True)
            return ctypes.CDLL(library)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
        why = next((line for line in lines if "error" in line), lines[0])
        logging.getLogger("darts").warning(
            f"no {source.name} by the C compiler {compiler!r} (a gcc with OpenMP is needed; CC names it), so that what "
            f"runs on the CPU takes longer: {why}"
        )
        return None
