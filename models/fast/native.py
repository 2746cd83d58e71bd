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
from array import array
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

REAL = {torch.float32: "float", torch.float64: "double"}
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
MALLOPT = {-3: 2**25, -1: 2**31 - 1}  # M_MMAP_THRESHOLD, at most so large, and M_TRIM_THRESHOLD
ARGUMENTS = {
    "depthwise": "pnnnnnpn",
    "depthwise_gradients": "pnnnnnpn",
    "mix": "pnpnnn",
    "products": "pnppnnn",
    "fold": "ppdppnpdppnpppnnn",
    "fold_gradients": "ppdppnppppppnnn",
    "blend": "pnpnpn",
    "dots": "pnpnpn",
}


def knows(dtype):
    """Whether native.c does the work for numbers of this type."""
    return _library(dtype) is not None


def depthwise(images, relus, kernels, convolutions):
    """Depthwise convolutions of images, (N, C, H, W) of one size: a list.

    relus: whether relu(image) is convolved, for each; kernels: tensors (C, 1, k, k), or (rows, C, 1, k, k), several;
    convolutions: tuples of the place of an image, that of kernels, their row and (stride, padding, dilation).
    """
    library = _library_for(images, kernels, convolutions)
    if library is None:
        return plain_depthwise(images, relus, kernels, convolutions)
    images = _channels_last(images)
    N, C, H, W = images[0].shape
    zs = [_empty(images[0], C, -(-H // stride), -(-W // stride)) for *_, (stride, _, _) in convolutions]
    table = _convolutions(convolutions, kernels, zs, [None] * len(kernels), max(H, W))
    of_images = _table((x.data_ptr(), 0, relu) for x, relu in zip(images, relus))
    _run(library.depthwise, of_images, len(images), N, H, W, C, table, len(zs))
    return zs


def depthwise_gradients(images, relus, kernels, convolutions, dzs, wants_images, wants_kernels):
    """Of `depthwise` [dimage], [dkernels] from the gradients of its outputs; None for what is not wanted."""
    library = _library_for(images, kernels, convolutions)
    if library is None:
        return plain_depthwise_gradients(images, relus, kernels, convolutions, dzs, wants_images, wants_kernels)
    images, dzs = _channels_last(images), _channels_last(dzs)
    N, C, H, W = images[0].shape
    dimages = [_empty(x, C, H, W) if wanted else None for x, wanted in zip(images, wants_images)]
    dkernels = [torch.zeros_like(weight) if wanted else None for weight, wanted in zip(kernels, wants_kernels)]
    table = _convolutions(convolutions, kernels, dzs, dkernels, max(H, W))
    of_images = _table((x.data_ptr(), _pointer(dx), relu) for x, dx, relu in zip(images, dimages, relus))
    _run(library.depthwise_gradients, of_images, len(images), N, H, W, C, table, len(dzs))
    return dimages, dkernels


def plain_depthwise(images, relus, kernels, convolutions):
    """`depthwise` by PyTorch, which can be differentiated."""
    activated = [x.relu() if relu else x for x, relu in zip(images, relus)]
    weights = [_row(kernels[place], row) for _, place, row, _ in convolutions]
    return [
        F.conv2d(activated[image], weight, None, *geometry, len(weight))
        for weight, (image, _, _, geometry) in zip(weights, convolutions)
    ]


def plain_depthwise_gradients(images, relus, kernels, convolutions, dzs, wants_images, wants_kernels):
    """`depthwise_gradients` by PyTorch, which can be differentiated."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [tensor.view_as(tensor).requires_grad_() for tensor in (*images, *kernels)]  # apart
        zs = plain_depthwise(inputs[: len(images)], relus, inputs[len(images) :], convolutions)
        wanted = [i for i, wants in enumerate((*wants_images, *wants_kernels)) if wants]
        found = torch.autograd.grad(
            zs, [inputs[i] for i in wanted], dzs, create_graph=create_graph, materialize_grads=True
        )
    grads = dict(zip(wanted, found))
    return [grads.get(i) for i in range(len(images))], [grads.get(len(images) + i) for i in range(len(kernels))]


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

    a, b: lists of images, all of one size. Returns (pairs, K) and (pairs, K, C). Without native.c products are summed
    as numbers of the images' type.
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
    _check_fold(sums, (count, K), grams, (count, K, K), M, scale)
    if bias is not None:
        _check([bias], 1, (edges, C), M.dtype)
    library = _library(M.dtype)
    if library is None:
        return _plain_fold(sums, grams, n, M, scale, bias, eps, edges)
    sums, grams, M, scale, bias = _contiguous(sums, grams, M, scale, bias)
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
    _check_fold(sums, (count, C), products, (count, C, K), M, scale)
    library = _library(M.dtype)
    if library is None:
        found = _plain_fold_gradients(sums, products, n, M, scale, kept)
        wanted = (wants_scale, wants_M, wants_z, wants_z, wants_z)
        return [small.to(M.dtype) if wants else None for small, wants in zip(found, wanted)]
    sums, products, M, scale = _contiguous(sums, products, M, scale)
    dscale = torch.empty_like(scale) if wants_scale else None
    dM = torch.empty_like(M) if wants_M else None
    A, D, shift = (M.new_empty(shape) if wants_z else None for shape in ((count, C, K), (count, K, K), (count, K)))
    _run(
        library.fold_gradients, sums.data_ptr(), products.data_ptr(), n, M.data_ptr(), _pointer(scale), _scales(scale),
        kept.data_ptr(), *map(_pointer, (dscale, dM, A, D, shift)), count, K, C,
    )  # fmt: skip
    return dscale, dM, A, D, shift


def _check_fold(sums, of_sums, products, of_products, M, scale):
    _check([sums], 1, of_sums, torch.float64)
    _check([products], 1, of_products, torch.float64)
    _check([M], 1, M.shape, M.dtype)
    if scale is not None:
        _check([scale], 1, (len(M), 1 if scale.shape[1:] == (1,) else M.shape[1]), M.dtype)


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
    M, (m, MS, inverse) = M.double(), kept
    factor = inverse if scale is None else inverse * scale
    R = products - sums.unsqueeze(-1) * m.mT
    v = (M * R).sum(-1)
    dscale = v * inverse if scale is None else (v * inverse).unflatten(1, (-1, scale.shape[1])).sum(1)
    c = (factor * inverse.square() * v / n).unsqueeze(-1)
    dM = factor.unsqueeze(-1) * R - n * c * MS
    A = factor.unsqueeze(-1) * M
    D = -M.mT @ (c * M)
    shift = -(D @ m + A.mT @ (sums.unsqueeze(-1) / n)).squeeze(-1)
    return dscale, dM, A, D, shift


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
    """native.c reads n tensors of this shape and type, in the CPU's memory."""
    if len(tensors) != n or any(
        tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu for tensor in tensors
    ):
        raise ValueError(f"there must be {n}, {tuple(shape)} each, of {dtype}, on the CPU")


def _matrix(image):
    """(N, C, H, W) as (pixels, C)."""
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def _channels_last(images):
    return [image.contiguous(memory_format=torch.channels_last) for image in images]


def _empty(x, C, H, W):
    """Images, channels-last. NumPy's memory lies at 16 bytes, which glibc's allocator finds again once it is free; of
    PyTorch's, at 64, it loses much to holes that are just too small."""
    return torch.from_numpy(np.empty((len(x), H, W, C), NUMPY[x.dtype]).transpose(0, 3, 1, 2))


def _row(kernels, row):
    """Of kernels (C, 1, k, k), or (rows, C, 1, k, k), a row, (C, 1, k, k)."""
    return kernels.view(-1, *kernels.shape[-4:])[row]


def _convolutions(convolutions, kernels, zs, dkernels, pixels):
    """native.c's structures of these; pixels: the longer side of the images."""
    rows = []
    for (image, place, row, (stride, _, dilation)), z in zip(convolutions, zs):
        weight, dweight = kernels[place], dkernels[place]
        side = weight.shape[-1]
        skipped = row * weight.shape[-4] * side * side * weight.element_size()
        middle = min(side, 2 * ((pixels - 1) // dilation) + 1)
        to_gradient = 0 if dweight is None else dweight.data_ptr() + skipped
        rows.append((weight.data_ptr() + skipped, z.data_ptr(), to_gradient, side, stride, dilation, middle, image, 0))
    return _table(rows)


def _contiguous(*tensors):
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def _scales(scale):
    return 1 if scale is None else scale.shape[1]


def _table(rows):
    """An array of one of native.c's structures, whose members are pointers and longs."""
    return array("l", itertools.chain.from_iterable(rows))


def _pointers(tensors):
    return _table([tensor.data_ptr()] for tensor in tensors)


def _pointer(tensor, place=0):
    """To the tensor, or from a place of its first dimension on; null if it is None."""
    return 0 if tensor is None else tensor.data_ptr() + (place and place * tensor.stride(0) * tensor.element_size())


def _run(function, *arguments):
    if function(*[given.buffer_info()[0] if type(given) is array else given for given in arguments]):
        raise MemoryError(f"no memory for {function.__name__}")


def _library_for(images, kernels, convolutions):
    """native.c for such images and convolutions; None for those that it doesn't know, or that PyTorch will refuse."""
    x = images[0]
    if 0 in x.shape[1:]:
        return None
    for _, place, _, (_, padding, dilation) in convolutions:
        weight = kernels[place]
        C, one, k, width = weight.shape[-4:]
        if (C, one, k) != (x.shape[1], 1, width) or k % 2 == 0 or padding != dilation * (k // 2):
            return None
        if not weight.is_contiguous() or (weight.dtype, weight.device) != (x.dtype, x.device):
            return None
    _check(images, len(images), x.shape, x.dtype)
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
