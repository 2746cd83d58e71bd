"""Calls the C code for the CPU, native.c. It is compiled when it is first needed, and kept in a cache folder.

It works on float32 and float64. Images are (N, C, H, W), and outputs are channels-last. Autograd does not record these
functions. Each checks its arguments before C reads them, and raises ValueError for tensors of another shape or type.
"""

import contextlib
import ctypes
import functools
import hashlib
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

REAL = {torch.float32: "float", torch.float64: "double"}
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
SOURCE = Path(__file__).with_name("native.c")
OPTIONS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC")
COMPILE_SECONDS = 120  # time limit of a call of the compiler
MALLOPT = {-3: 2**25, -1: 2**31 - 1}  # glibc's M_MMAP_THRESHOLD, with its largest value, and M_TRIM_THRESHOLD


def knows(dtype):
    """Whether native.c supports this dtype; False if it could not be compiled."""
    return _library(dtype) is not None


def can_read(x):
    """Whether x is an ordinary CPU tensor: not a fake tensor, and not traced by an exporter or a compiler."""
    is_plain = type(x) in (torch.Tensor, torch.nn.Parameter)
    return is_plain and x.is_cpu and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def depthwise(images, kernels, convolutions):
    """Depthwise convolutions of relu(image) of several images: a list of their outputs. The padding is `same`.

    images: (N, C, H, W), all of one size; kernels: tensors (C, 1, k, k), or (rows, C, 1, k, k) with several kernels;
    convolutions: tuples (index in images, index in kernels, row of that tensor, stride, dilation).
    """
    _, C, H, W = images[0].shape
    zs = [_empty(images[0], C, -(-H // stride), -(-W // stride)) for *_, stride, _ in convolutions]
    nothing = [None] * len(images), [None] * len(kernels)
    _call_depthwise("depthwise", images, kernels, convolutions, zs, *nothing)
    return zs


def depthwise_gradients(images, kernels, convolutions, dzs, wants_images, wants_kernels):
    """The gradients ([dimage], [dkernel]) of `depthwise`, from those of its outputs, dzs; None for those not wanted."""
    dimages = [_empty(x, *x.shape[1:]) if wanted else None for x, wanted in zip(images, wants_images)]
    dkernels = [torch.zeros_like(weight) if wanted else None for weight, wanted in zip(kernels, wants_kernels)]
    _call_depthwise("depthwise_gradients", images, kernels, convolutions, _channels_last(dzs), dimages, dkernels)
    return dimages, dkernels


def _call_depthwise(name, images, kernels, convolutions, zs, dimages, dkernels):
    N, C, H, W = images[0].shape
    _check(images, images[0].shape, images[0].dtype)
    for kernel in kernels:
        _check([kernel], (*kernel.shape[:-4], C, 1, kernel.shape[-1], kernel.shape[-1]), images[0].dtype)
    images, kernels = _channels_last(images), [kernel.contiguous() for kernel in kernels]
    rows = []
    for (image, index, row, stride, dilation), z in zip(convolutions, zs):
        weight, side = kernels[index], kernels[index].shape[-1]
        skipped = row * C * side * side * weight.element_size()
        gradient = 0 if dkernels[index] is None else dkernels[index].data_ptr() + skipped
        middle = min(side, 2 * ((max(H, W) - 1) // dilation) + 1)  # beyond it the kernel meets no pixels
        rows.append((weight.data_ptr() + skipped, z.data_ptr(), gradient, side, stride, dilation, middle, image, 0))
    image_table = _table((x.data_ptr(), _pointer(dx)) for x, dx in zip(images, dimages))
    _call(images[0].dtype, name, image_table, len(images), N, H, W, C, _table(rows), len(zs))


def mix(terms, bases=None, shifts=None):
    """For each of E edges, base + shift + the sum over terms of x A: a list of E images of C channels.

    terms: pairs of (list of E images x of K channels, matrices A (E, K, C)); bases: a list of E images, or None;
    shifts: (E, C), or None. All images have the same size.
    """
    (x, *_), A = terms[0]
    edges, _, C = A.shape
    for images, A in terms:
        _check(images, (len(x), A.shape[1], *x.shape[2:]), x.dtype)
        _check([A], (edges, A.shape[1], C), x.dtype)
    _check(bases or [], (len(x), C, *x.shape[2:]), x.dtype)
    ys = [_empty(x, C, *x.shape[2:]) for _ in range(edges)]
    terms = [(_channels_last(images), A.contiguous()) for images, A in terms]
    bases = bases and _channels_last(bases)
    shifts = shifts if shifts is None else shifts.contiguous()
    mixtures = _table(
        (y.data_ptr(), bases[e].data_ptr() if bases else 0, _pointer(shifts, e)) for e, y in enumerate(ys)
    )
    table = _table((images[e].data_ptr(), _pointer(A, e), A.shape[1]) for e in range(edges) for images, A in terms)
    _call(x.dtype, "mix", mixtures, edges, table, len(terms), x[:, 0].numel(), C)
    return ys


def products(a, b):
    """For each pair of images a[i], b[i]: the sums of a and of a b' over pixels, in float64.

    a, b: lists of images of K and of C channels, all of one size. Returns two tensors, (pairs, K) and (pairs, K, C).
    """
    _check(a, a[0].shape, a[0].dtype)
    _check(b, (len(a[0]), b[0].shape[1], *a[0].shape[2:]), a[0].dtype)
    a, b = _channels_last(a), _channels_last(b)
    K, C = a[0].shape[1], b[0].shape[1]
    sums, matrices = (torch.empty(shape, dtype=torch.float64) for shape in ((len(a), K), (len(a), K, C)))
    table = _table((left.data_ptr(), right.data_ptr()) for left, right in zip(a, b))
    _call(a[0].dtype, "products", table, len(a), sums.data_ptr(), matrices.data_ptr(), a[0][:, 0].numel(), K, C)
    return sums, matrices


def fold(sums, grams, n, M, scale, bias, eps, edges):
    """Write scale * BN(M z) as A' z + shift, for several products M z; see folded_bn.py.

    sums, grams: the sums of z and of z z' over n pixels, (products, K) and (products, K, K), in float64; M: (products,
    C, K); scale: (products, 1) or (products, C), or None; bias: (edges, C), or None. Returns A, (products, K, C);
    shifts, (edges, C): for edge e the bias plus the shifts of the products e, e + edges, ...; mean and unbiased
    variance of M z, (products, C) each; and moments, which `fold_gradients` takes.
    """
    count, C, K = M.shape
    _check([grams], (count, K, K), torch.float64)
    if scale is not None:
        _check([scale], (count, scale.shape[1]), M.dtype)
    if bias is not None:
        _check([bias], (edges, C), M.dtype)
    sums, grams, M, scale, bias = _contiguous(sums, grams, M, scale, bias)
    A, shifts, mean, var = (M.new_empty(shape) for shape in ((count, K, C), (edges, C), (count, C), (count, C)))
    moments = M.new_empty(count, K + C * K + C, dtype=torch.float64)
    before = sums.data_ptr(), grams.data_ptr(), n, M.data_ptr(), _pointer(scale), _scales(scale), _pointer(bias), eps
    outputs = A.data_ptr(), shifts.data_ptr(), edges, mean.data_ptr(), var.data_ptr(), moments.data_ptr()
    _call(M.dtype, "fold", *before, *outputs, count, K, C)
    return A, shifts, mean, var, moments


def fold_gradients(sums, products, n, M, scale, moments, wants_scale, wants_M, wants_z):
    """The gradients of `fold`: (dscale, dM, A, D, shift), None for those not wanted. dL/dz = A' g + D' z + shift.

    sums, products: the sums of g = dL/dy and of g z' over pixels, (products, C) and (products, C, K), in float64;
    moments: from `fold`. A: (products, C, K); D: (products, K, K); shift: (products, K).
    """
    count, C, K = M.shape
    sums, products, M, scale = _contiguous(sums, products, M, scale)
    dscale = torch.empty_like(scale) if wants_scale else None
    dM = torch.empty_like(M) if wants_M else None
    A, D, shift = (M.new_empty(shape) if wants_z else None for shape in ((count, C, K), (count, K, K), (count, K)))
    before = sums.data_ptr(), products.data_ptr(), n, M.data_ptr(), _pointer(scale), _scales(scale), moments.data_ptr()
    _call(M.dtype, "fold_gradients", *before, *map(_pointer, (dscale, dM, A, D, shift)), count, K, C)
    return dscale, dM, A, D, shift


def blend(images, weights):
    """E weighted sums of T images of one size, as a list. weights: (E, T)."""
    _check(images, images[0].shape, weights.dtype)
    images, weights = _channels_last(images), weights.contiguous()
    ys = [_empty(images[0], *images[0].shape[1:]) for _ in weights.unbind()]
    inputs = _pointers(images), len(images), weights.data_ptr()
    _call(weights.dtype, "blend", _pointers(ys), len(ys), *inputs, ys[0].numel())
    return ys


def dots(a, b):
    """The dot products of each of E images a with each of T images b, all of one size: (E, T), in float64."""
    _check(a + b, a[0].shape, a[0].dtype)
    a, b = _channels_last(a), _channels_last(b)
    sums = torch.empty(len(a), len(b), dtype=torch.float64)
    _call(a[0].dtype, "dots", _pointers(a), len(a), _pointers(b), len(b), sums.data_ptr(), a[0].numel())
    return sums


def _check(tensors, shape, dtype):
    """Raise ValueError unless all tensors have this shape and dtype and are on the CPU: C reads them unchecked."""
    if any(tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu for tensor in tensors):
        raise ValueError(f"tensors must be {tuple(shape)}, of {dtype}, on the CPU")


def _channels_last(images):
    return [image.contiguous(memory_format=torch.channels_last) for image in images]


def _empty(x, C, H, W):
    """Uninitialised channels-last images, with x's dtype and number of images.

    The memory is NumPy's, aligned to 16 bytes, which glibc's allocator reuses once it is freed. PyTorch aligns to 64
    bytes; then freed blocks are often slightly too small for the next tensor, and memory is wasted.
    """
    return torch.from_numpy(np.empty((len(x), H, W, C), NUMPY[x.dtype]).transpose(0, 3, 1, 2))


def _contiguous(*tensors):
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def _scales(scale):
    return 1 if scale is None else scale.shape[1]


def _table(rows):
    """An array of one of native.c's structures, whose members are pointers and longs."""
    return array("l", itertools.chain.from_iterable(rows))


def _pointers(tensors):
    return _table([tensor.data_ptr()] for tensor in tensors)


def _pointer(tensor, row=0):
    """The address of a tensor, or of a row of it; 0 (null) if it is None."""
    return 0 if tensor is None else tensor.data_ptr() + (row and row * tensor.stride(0) * tensor.element_size())


def _call(dtype, name, *arguments):
    function = getattr(_library(dtype), name)
    if function(*map(_c_value, arguments)):
        raise MemoryError(f"no memory for {name}")


def _c_value(value):
    """A double for a float; a long for a whole number, an address, and for an array, whose address is passed."""
    if type(value) is array:
        value = value.buffer_info()[0]
    return ctypes.c_double(value) if type(value) is float else ctypes.c_long(value)


@functools.cache
def _library(dtype):
    """native.c compiled for a dtype. If that fails it logs a warning and returns None."""
    if dtype not in REAL:
        return None
    compiler = os.environ.get("CC") or "cc"
    try:
        library = _compiled(shlex.split(compiler), REAL[dtype])
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        lines = str(getattr(error, "stderr", None) or error).strip().splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error" in line), lines[0])
        logging.getLogger("darts").warning(
            f"{SOURCE.name} was not compiled with {compiler!r} (a gcc with OpenMP is needed; CC names it), so steps on "
            f"the CPU take longer: {reason}"
        )
        return None
    _keep_freed_memory()
    return library


def _compiled(compiler, real):
    """Load native.c as compiled with this compiler for this processor; compile it first unless the cache folder has it.

    The file's name contains a hash of everything that it depends on. It gets that name once it is complete, so that
    several processes may compile it at the same time. If there is no safe cache folder, it is compiled into a temporary
    folder, for this process only.
    """
    command = [*compiler, *OPTIONS, f"-DREAL={real}"]
    # the compiler's version, and the processor's features that -march=native stands for
    driver = _run([*command, "-###", "-E", "-x", "c", os.devnull]).stderr.encode()
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), driver])).hexdigest()
    cache = _cache_folder()
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        path = Path(cache or scratch, f"native-{real}-{key[:32]}.so")
        if not path.is_file():
            compiled, library = Path(scratch, "native.o"), Path(scratch, "native.so")
            _run([*command, "-c", SOURCE, "-o", compiled])
            # not linked to an OpenMP library, so that it uses the one that PyTorch has loaded, with its threads
            _run([*compiler, "-shared", compiled, "-o", library])
            os.replace(library, path)
        return ctypes.CDLL(path)


def _run(words):
    """Run the compiler; raise SubprocessError if it fails or takes longer than `COMPILE_SECONDS`."""
    return subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=True
    )


def _cache_folder():
    """The cache folder for compiled code. None unless only this user can write to it."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "darts"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # it cannot be made, or the user has no home folder
        return None
    is_ours = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if is_ours and os.access(folder, os.W_OK) else None


def _keep_freed_memory():
    """Make glibc's allocator keep freed memory for the next allocations.

    Otherwise it returns memory to the system and gets it back page by page, which takes a tenth of the time of a step
    with --recompute. This setting is for the whole process.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # the C library is not glibc
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, size in MALLOPT.items():
            mallopt(parameter, size)
