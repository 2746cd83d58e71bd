"""The C code for the CPU, native.c: compiled by each process that needs it, in about a second, and called here.

Everything has PyTorch operations to fall back on, where there is no C compiler or numbers are of another type than
float32 and float64. Images are (N, C, H, W), and the outputs channels-last; nothing is recorded for differentiation.
"""

import contextlib
import ctypes
import functools
import itertools
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
MALLOPT = {-3: 2**25, -1: 2**31 - 1}  # M_MMAP_THRESHOLD, at most so large, and M_TRIM_THRESHOLD
ARGUMENTS = {
    "depthwise": "pnnnnnpn",
    "depthwise_gradients": "ppnnnnnpn",
    "mix": "pnpnnn",
    "products": "pnppnnn",
    "fold": "ppdppnpdppnpppnnn",
    "fold_gradients": "ppdppnppppppnnn",
    "blend": "pnpnpn",
    "dots": "pnpnpn",
}


def depthwise(x, relu, convolutions):
    """Depthwise convolutions of x, or with `relu` of relu(x): a list.

    convolutions: pairs of a weight, (C, 1, k, k), and its (stride, padding, dilation).
    """
    library = _library_for(x, convolutions)
    if library is None:
        x = x.relu() if relu else x
        return [F.conv2d(x, weight, None, *geometry, len(weight)) for weight, geometry in convolutions]
    (x,) = _channels_last([x])
    N, C, H, W = x.shape
    zs = [_empty(x, C, -(-H // stride), -(-W // stride)) for _, (stride, _, _) in convolutions]
    table = _convolutions(convolutions, zs, [None] * len(zs), max(H, W))
    _run(library.depthwise, x.data_ptr(), N, H, W, C, relu, table, len(zs))
    return zs


def depthwise_gradients(x, relu, convolutions, dzs, wants_x, wants_weights):
    """Of `depthwise` (dx, [dweight]) from the gradients of its outputs; None for what is not wanted."""
    library = _library_for(x, convolutions)
    if library is None:
        return plain_depthwise_gradients(x, relu, convolutions, dzs, wants_x, wants_weights)
    x, *dzs = _channels_last([x, *dzs])
    N, C, H, W = x.shape
    dx = _empty(x, C, H, W) if wants_x else None
    dweights = [
        torch.zeros_like(weight) if wanted else None for (weight, _), wanted in zip(convolutions, wants_weights)
    ]
    table = _convolutions(convolutions, dzs, dweights, max(H, W))
    _run(library.depthwise_gradients, x.data_ptr(), _pointer(dx), N, H, W, C, relu, table, len(dzs))
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


def mix(terms, bases=None, shifts=None):
    """Of each of E edges base + shift + sum over terms of x A: a list of images of C channels.

    terms: pairs of a list of E images x of K channels and matrices A, (E, K, C); bases: a list of E images; shifts:
    (E, C); either may be None. All images are of one size.
    """
    (x, *_), A = terms[0]
    edges, _, C = A.shape
    for images, A in terms:
        _check(images, edges, (len(x), A.shape[1], *x.shape[2:]), x.dtype)
        _check([A], 1, (edges, A.shape[1], C), x.dtype)
    if bases:
        _check(bases, edges, (len(x), C, *x.shape[2:]), x.dtype)
    if shifts is not None:
        _check([shifts], 1, (edges, C), x.dtype)
    library = _library(x.dtype)
    if library is None:
        ys = [sum(_matrix(x) @ A for x, A in of_edge) for of_edge in zip(*[zip(*term) for term in terms])]
        ys = ys if shifts is None else [y + shift for y, shift in zip(ys, shifts)]
        ys = [y.unflatten(0, (len(x), *x.shape[2:])).permute(0, 3, 1, 2) for y in ys]
        return [base + y for base, y in zip(bases, ys)] if bases else ys
    ys = [_empty(x, C, *x.shape[2:]) for _ in range(edges)]
    terms = [(_channels_last(images), A.contiguous()) for images, A in terms]
    bases = bases and _channels_last(bases)
    shifts = shifts if shifts is None else shifts.contiguous()
    mixtures = _table(
        (y.data_ptr(), bases[e].data_ptr() if bases else 0, _pointer(shifts, e)) for e, y in enumerate(ys)
    )
    table = _table((images[e].data_ptr(), _pointer(A, e), A.shape[1]) for e in range(edges) for images, A in terms)
    _run(library.mix, mixtures, edges, table, len(terms), x[:, 0].numel(), C)
    return ys


def products(a, b):
    """Of each pair of images, of K and C channels, the sums over their pixels of a, and of a b', in float64.

    a, b: lists of images, all of one size. Returns (pairs, K) and (pairs, K, C).
    """
    _check(a, len(a), a[0].shape, a[0].dtype)
    _check(b, len(a), (len(a[0]), b[0].shape[1], *a[0].shape[2:]), a[0].dtype)
    library = _library(a[0].dtype)
    if library is None:
        a, b = map(_matrix, a), map(_matrix, b)
        found = [(left.sum(0, dtype=torch.float64), (left.mT @ right).double()) for left, right in zip(a, b)]
        return tuple(map(torch.stack, zip(*found)))
    a, b = _channels_last(a), _channels_last(b)
    K, C = a[0].shape[1], b[0].shape[1]
    sums, found = (torch.empty(shape, dtype=torch.float64) for shape in ((len(a), K), (len(a), K, C)))
    table = _table((left.data_ptr(), right.data_ptr()) for left, right in zip(a, b))
    _run(library.products, table, len(a), sums.data_ptr(), found.data_ptr(), a[0][:, 0].numel(), K, C)
    return sums, found


def fold(sums, grams, n, M, scale, bias, eps, edges):
    """BN(M z), times a scale, as y = A' z + shift, of some products of K with C channels; see folded_bn.py.

    sums, grams: (products, K) and (products, K, K), those of z and z z' over n pixels, in float64; M: (products, C, K);
    scale: (products, 1) or (products, C), or None; bias: (edges, C), or None. Returns A, (products, K, C); shifts,
    (edges, C), with the bias the sums over products e, e + edges, ...; mean and unbiased variance of M z, each
    (products, C); and what `fold_gradients` needs.
    """
    count, C, K = M.shape
    _check([sums], 1, (count, K), torch.float64)
    _check([grams], 1, (count, K, K), torch.float64)
    library = _library(M.dtype)
    if library is None:
        return _plain_fold(sums, grams, n, M, scale, bias, eps, edges)
    M, scale, bias = _contiguous(M, scale, bias)
    A, shifts, mean, var = (M.new_empty(shape) for shape in ((count, K, C), (edges, C), (count, C), (count, C)))
    kept = M.new_empty(count, K + C * K + C, dtype=torch.float64)
    _run(
        library.fold, sums.data_ptr(), grams.data_ptr(), n, M.data_ptr(), _pointer(scale), _scales(scale),
        _pointer(bias), eps, A.data_ptr(), shifts.data_ptr(), edges, mean.data_ptr(), var.data_ptr(), kept.data_ptr(),
        count, K, C,
    )  # fmt: skip
    return A, shifts, mean, var, kept


def fold_gradients(sums, products, n, M, scale, kept, wants_scale, wants_M, wants_z):
    """Of `fold` the gradients of scale and M, and A, D and shift of z's, which is A' g + D' z + shift, None for what is
    not wanted.

    sums, products: (products, C) and (products, C, K), those of g = dL/dy and g z' over the pixels, in float64. A:
    (products, C, K); D: (products, K, K); shift: (products, K).
    """
    count, C, K = M.shape
    _check([sums], 1, (count, C), torch.float64)
    _check([products], 1, (count, C, K), torch.float64)
    library = _library(M.dtype)
    if library is None:
        return _plain_fold_gradients(sums, products, n, M, scale, kept)
    M, scale = _contiguous(M, scale)
    dscale = torch.empty_like(scale) if wants_scale else None
    dM = torch.empty_like(M) if wants_M else None
    A, D, shift = (M.new_empty(shape) if wants_z else None for shape in ((count, C, K), (count, K, K), (count, K)))
    _run(
        library.fold_gradients, sums.data_ptr(), products.data_ptr(), n, M.data_ptr(), _pointer(scale), _scales(scale),
        kept.data_ptr(), *map(_pointer, (dscale, dM, A, D, shift)), count, K, C,
    )  # fmt: skip
    return dscale, dM, A, D, shift


def _plain_fold(sums, grams, n, M, scale, bias, eps, edges):
    dtype, M, m = M.dtype, M.double(), (sums / n).unsqueeze(-1)
    MS = M @ (grams / n - m * m.mT)
    mean, var = (M @ m).squeeze(-1), (MS * M).sum(-1).clamp(min=0)
    inverse = (var + eps).rsqrt()
    factor = inverse if scale is None else inverse * scale
    shifts = (-factor * mean).unflatten(0, (-1, edges)).sum(0)
    shifts = shifts if bias is None else shifts + bias
    A, unbiased = (factor.unsqueeze(-1) * M).mT, var * (n / (n - 1))
    return *(small.to(dtype) for small in (A, shifts, mean, unbiased)), (m, MS, inverse)


def _plain_fold_gradients(sums, products, n, M, scale, kept):
    dtype, M, (m, MS, inverse) = M.dtype, M.double(), kept
    factor = inverse if scale is None else inverse * scale
    R = products - sums.unsqueeze(-1) * m.mT
    v = (M * R).sum(-1)
    dscale = v * inverse if scale is None else (v * inverse).unflatten(1, (-1, scale.shape[1])).sum(1)
    c = (factor * inverse.square() * v / n).unsqueeze(-1)
    dM = factor.unsqueeze(-1) * R - n * c * MS
    A = factor.unsqueeze(-1) * M
    D = -M.mT @ (c * M)
    shift = -(D @ m + A.mT @ (sums.unsqueeze(-1) / n)).squeeze(-1)
    return [small.to(dtype) for small in (dscale, dM, A, D, shift)]


def blend(images, weights):
    """Weighted sums of T images of one size: by weights (E, T), a list of E images."""
    _check(images, weights.shape[1], images[0].shape, weights.dtype)
    library = _library(weights.dtype)
    N, C, H, W = images[0].shape
    if library is None:
        stacked = torch.stack([_matrix(image) for image in images])
        return [y.view(N, H, W, C).permute(0, 3, 1, 2) for y in torch.einsum("et,tpc->epc", weights, stacked)]
    images, weights = _channels_last(images), weights.contiguous()
    ys = [_empty(images[0], C, H, W) for _ in weights.unbind()]
    _run(library.blend, _pointers(ys), len(ys), _pointers(images), len(images), weights.data_ptr(), ys[0].numel())
    return ys


def dots(a, b):
    """The sums of the products of each image of a with each of b, all of one size: (E, T), in float64."""
    _check(a + b, len(a) + len(b), a[0].shape, a[0].dtype)
    library = _library(a[0].dtype)
    if library is None:
        return torch.stack([torch.stack([(left * right).sum(dtype=torch.float64) for right in b]) for left in a])
    a, b = _channels_last(a), _channels_last(b)
    found = torch.empty(len(a), len(b), dtype=torch.float64)
    _run(library.dots, _pointers(a), len(a), _pointers(b), len(b), found.data_ptr(), a[0].numel())
    return found


def _check(tensors, n, shape, dtype):
    """native.c reads n tensors of this shape and type."""
    if len(tensors) != n or any(tensor.shape != shape or tensor.dtype != dtype for tensor in tensors):
        raise ValueError(f"there must be {n}, {tuple(shape)} each, of {dtype}")


def _matrix(image):
    """(N, C, H, W) as (pixels, C)."""
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def _channels_last(images):
    return [image.contiguous(memory_format=torch.channels_last) for image in images]


def _empty(x, C, H, W):
    """Images, channels-last. NumPy's memory lies at 16 bytes, which glibc's allocator finds again once it is free; of
    PyTorch's, at 64, it loses much to holes that are just too small."""
    return torch.from_numpy(np.empty((len(x), H, W, C), NUMPY[x.dtype]).transpose(0, 3, 1, 2))


def _convolutions(convolutions, zs, dweights, pixels):
    return _table(
        (weight.data_ptr(), z.data_ptr(), _pointer(dweight), side, stride, dilation, middle)
        for (weight, (stride, _, dilation)), z, dweight in zip(convolutions, zs, dweights)
        for side in weight.shape[-1:]
        for middle in [min(side, 2 * ((pixels - 1) // dilation) + 1)]
    )


def _contiguous(*tensors):
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def _scales(scale):
    return 1 if scale is None else scale.shape[1]


def _table(rows):
    """An array of one of native.c's structures, whose members are pointers and longs."""
    numbers = list(itertools.chain.from_iterable(rows))
    return (ctypes.c_long * len(numbers))(*numbers)


def _pointers(tensors):
    return _table([tensor.data_ptr()] for tensor in tensors)


def _pointer(tensor, place=0):
    """To the tensor, or from a place of its first dimension on; null if it is None."""
    return 0 if tensor is None else tensor.data_ptr() + (place and place * tensor.stride(0) * tensor.element_size())


def _run(function, *arguments):
    if function(*arguments):
        raise MemoryError(f"no memory for {function.__name__}")


def _library_for(x, convolutions):
    """native.c for such images and convolutions; None for those that it doesn't know, or that PyTorch will refuse."""
    if 0 in x.shape[1:]:
        return None
    for weight, (_, padding, dilation) in convolutions:
        k = weight.shape[-1]
        if weight.shape != (x.shape[1], 1, k, k) or k % 2 == 0 or padding != dilation * (k // 2):
            return None
        if not weight.is_contiguous() or (weight.dtype, weight.device) != (x.dtype, x.device):
            return None
    return _library(x.dtype)


def _keep_freed_memory():
    """Let glibc's allocator keep what is freed for what comes next: getting it from the system again, page by page,
    would take a tenth of a step with --recompute."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another allocator
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, size in MALLOPT.items():
            mallopt(parameter, size)


def _declared(library):
    """The library, its functions' arguments declared: p for a pointer, n for a long, d for a double."""
    kinds = {"p": ctypes.c_void_p, "n": ctypes.c_long, "d": ctypes.c_double}
    for function, arguments in ARGUMENTS.items():
        getattr(library, function).argtypes = [kinds[kind] for kind in arguments]
    return library


@functools.cache
def _library(dtype):
    """native.c for numbers of a type, or None."""
    if dtype not in REAL:
        return None
    _keep_freed_memory()
    compiler = os.environ.get("CC") or "cc"
    source = Path(__file__).with_name("native.c")
    options = ["-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", f"-DREAL={REAL[dtype]}"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            compiled, library = Path(folder) / "native.o", Path(folder) / "native.so"
            for command in ([*options, "-c", source, "-o", compiled], ["-shared", compiled, "-o", library]):
                # linked without OpenMP's library, so that it takes the one that PyTorch has loaded, and its threads
                subprocess.run([*shlex.split(compiler), *command], check=True, capture_output=True, text=True)
            return _declared(ctypes.CDLL(library))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
        why = next((line for line in lines if "error" in line), lines[0])
        logging.getLogger("darts").warning(
            f"no {source.name} by the C compiler {compiler!r} (a gcc with OpenMP is needed; CC names it), so that what "
            f"runs on the CPU takes longer: {why}"
        )
        return None
