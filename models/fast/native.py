"""The C code for the CPU, native.c: compiled when it is first needed, kept in a cache folder, and called here.

It works on float32 and float64. Images are (N, C, H, W), and the outputs channels-last; nothing is recorded for
differentiation. What C reads is checked first: every function raises ValueError for tensors of another shape or type.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
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
COMPILE_SECONDS = 120  # at most
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
}  # p: a pointer, n: a long, d: a double


def knows(dtype):
    """Whether native.c does the work for numbers of this type; False where there is no C compiler."""
    return _library(dtype) is not None


def can_read(x):
    """Whether x lies in the CPU's memory: not where an exporter, compiler or fake tensor follows what is done to it."""
    is_plain = type(x) in (torch.Tensor, torch.nn.Parameter)
    return is_plain and x.is_cpu and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def depthwise(images, relus, kernels, convolutions):
    """Depthwise convolutions of images, (N, C, H, W) of one size: a list of their outputs.

    relus: whether relu(image) is convolved, for each; kernels: tensors (C, 1, k, k), or (rows, C, 1, k, k), several;
    convolutions: tuples of the index of an image, that of a tensor of kernels, a row of it, and (stride, padding,
    dilation).
    """
    _check_convolutions(images, kernels, convolutions)
    images = _channels_last(images)
    N, C, H, W = images[0].shape
    zs = [_empty(images[0], C, -(-H // stride), -(-W // stride)) for *_, (stride, _, _) in convolutions]
    table = _convolution_table(convolutions, kernels, zs, [None] * len(kernels), max(H, W))
    image_table = _table((x.data_ptr(), 0, relu) for x, relu in zip(images, relus))
    _call(images[0].dtype, "depthwise", image_table, len(images), N, H, W, C, table, len(zs))
    return zs


def depthwise_gradients(images, relus, kernels, convolutions, dzs, wants_images, wants_kernels):
    """Of `depthwise` [dimage], [dkernels] from the gradients of its outputs; None for what is not wanted."""
    _check_convolutions(images, kernels, convolutions)
    images, dzs = _channels_last(images), _channels_last(dzs)
    N, C, H, W = images[0].shape
    dimages = [_empty(x, C, H, W) if wanted else None for x, wanted in zip(images, wants_images)]
    dkernels = [torch.zeros_like(weight) if wanted else None for weight, wanted in zip(kernels, wants_kernels)]
    table = _convolution_table(convolutions, kernels, dzs, dkernels, max(H, W))
    image_table = _table((x.data_ptr(), _pointer(dx), relu) for x, dx, relu in zip(images, dimages, relus))
    _call(images[0].dtype, "depthwise_gradients", image_table, len(images), N, H, W, C, table, len(dzs))
    return dimages, dkernels


def mix(terms, bases=None, shifts=None):
    """For each of E edges base + shift + sum over terms of x A: a list of images of C channels.

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
    """For each pair of images, of K and C channels, the sums over their pixels of a, and of a b', in float64.

    a, b: lists of images, all of one size. Returns (pairs, K) and (pairs, K, C).
    """
    _check(a, len(a), a[0].shape, a[0].dtype)
    _check(b, len(a), (len(a[0]), b[0].shape[1], *a[0].shape[2:]), a[0].dtype)
    a, b = _channels_last(a), _channels_last(b)
    K, C = a[0].shape[1], b[0].shape[1]
    sums, matrices = (torch.empty(shape, dtype=torch.float64) for shape in ((len(a), K), (len(a), K, C)))
    table = _table((left.data_ptr(), right.data_ptr()) for left, right in zip(a, b))
    _call(a[0].dtype, "products", table, len(a), sums.data_ptr(), matrices.data_ptr(), a[0][:, 0].numel(), K, C)
    return sums, matrices


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
    sums, grams, M, scale, bias = _contiguous(sums, grams, M, scale, bias)
    A, shifts, mean, var = (M.new_empty(shape) for shape in ((count, K, C), (edges, C), (count, C), (count, C)))
    moments = M.new_empty(count, K + C * K + C, dtype=torch.float64)
    before = sums.data_ptr(), grams.data_ptr(), n, M.data_ptr(), _pointer(scale), _scales(scale), _pointer(bias), eps
    outputs = A.data_ptr(), shifts.data_ptr(), edges, mean.data_ptr(), var.data_ptr(), moments.data_ptr()
    _call(M.dtype, "fold", *before, *outputs, count, K, C)
    return A, shifts, mean, var, moments


def fold_gradients(sums, products, n, M, scale, moments, wants_scale, wants_M, wants_z):
    """Of `fold` the gradients of scale and M, and A, D and shift of z's, which is A' g + D' z + shift, None for what is
    not wanted.

    sums, products: (products, C) and (products, C, K), those of g = dL/dy and g z' over the pixels, in float64. A:
    (products, C, K); D: (products, K, K); shift: (products, K).
    """
    count, C, K = M.shape
    _check_fold(sums, (count, C), products, (count, C, K), M, scale)
    sums, products, M, scale = _contiguous(sums, products, M, scale)
    dscale = torch.empty_like(scale) if wants_scale else None
    dM = torch.empty_like(M) if wants_M else None
    A, D, shift = (M.new_empty(shape) if wants_z else None for shape in ((count, C, K), (count, K, K), (count, K)))
    before = sums.data_ptr(), products.data_ptr(), n, M.data_ptr(), _pointer(scale), _scales(scale), moments.data_ptr()
    _call(M.dtype, "fold_gradients", *before, *map(_pointer, (dscale, dM, A, D, shift)), count, K, C)
    return dscale, dM, A, D, shift


def blend(images, weights):
    """Weighted sums of T images of one size: by weights (E, T), a list of E images."""
    _check(images, weights.shape[1], images[0].shape, weights.dtype)
    images, weights = _channels_last(images), weights.contiguous()
    ys = [_empty(images[0], *images[0].shape[1:]) for _ in weights.unbind()]
    inputs = _pointers(images), len(images), weights.data_ptr()
    _call(weights.dtype, "blend", _pointers(ys), len(ys), *inputs, ys[0].numel())
    return ys


def dots(a, b):
    """The sums of the products of each image of a with each of b, all of one size: (E, T), in float64."""
    _check(a + b, len(a) + len(b), a[0].shape, a[0].dtype)
    a, b = _channels_last(a), _channels_last(b)
    sums = torch.empty(len(a), len(b), dtype=torch.float64)
    _call(a[0].dtype, "dots", _pointers(a), len(a), _pointers(b), len(b), sums.data_ptr(), a[0].numel())
    return sums


def _check(tensors, n, shape, dtype):
    """native.c reads n tensors of this shape and type, in the CPU's memory."""
    if len(tensors) != n or any(
        tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu for tensor in tensors
    ):
        raise ValueError(f"there must be {n}, {tuple(shape)} each, of {dtype}, on the CPU")


def _check_convolutions(images, kernels, convolutions):
    x = images[0]
    _check(images, len(images), x.shape, x.dtype)
    for _, index, _, (_, padding, dilation) in convolutions:
        kernel = kernels[index]
        k = kernel.shape[-1]
        if kernel.shape[-4:] != (x.shape[1], 1, k, k) or k % 2 == 0 or padding != dilation * (k // 2):
            raise ValueError("kernels must be (..., C, 1, k, k) with an odd k, and the padding dilation * (k // 2)")
        if not kernel.is_contiguous() or (kernel.dtype, kernel.device) != (x.dtype, x.device):
            raise ValueError("kernels must be contiguous, of the images' type, on the CPU")


def _check_fold(sums, sums_shape, products, products_shape, M, scale):
    _check([sums], 1, sums_shape, torch.float64)
    _check([products], 1, products_shape, torch.float64)
    _check([M], 1, M.shape, M.dtype)
    if scale is not None:
        _check([scale], 1, (len(M), 1 if scale.shape[1:] == (1,) else M.shape[1]), M.dtype)


def _channels_last(images):
    return [image.contiguous(memory_format=torch.channels_last) for image in images]


def _empty(x, C, H, W):
    """Images, channels-last. NumPy's memory lies at 16 bytes, which glibc's allocator finds again once it is free; of
    PyTorch's, at 64, it loses much to holes that are just too small."""
    return torch.from_numpy(np.empty((len(x), H, W, C), NUMPY[x.dtype]).transpose(0, 3, 1, 2))


def _convolution_table(convolutions, kernels, zs, dkernels, pixels):
    """native.c's structures of convolutions; pixels: the longer side of the images."""
    rows = []
    for (image, index, row, (stride, _, dilation)), z in zip(convolutions, zs):
        weight, dweight = kernels[index], dkernels[index]
        side = weight.shape[-1]
        skipped = row * weight.shape[-4] * side * side * weight.element_size()
        middle = min(side, 2 * ((pixels - 1) // dilation) + 1)
        gradient = 0 if dweight is None else dweight.data_ptr() + skipped
        rows.append((weight.data_ptr() + skipped, z.data_ptr(), gradient, side, stride, dilation, middle, image, 0))
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


def _pointer(tensor, row=0):
    """To the tensor, or to a row of it; null if it is None."""
    return 0 if tensor is None else tensor.data_ptr() + (row and row * tensor.stride(0) * tensor.element_size())


def _call(dtype, name, *arguments):
    function = getattr(_library(dtype), name)
    if function(*[value.buffer_info()[0] if type(value) is array else value for value in arguments]):
        raise MemoryError(f"no memory for {name}")


@functools.cache
def _library(dtype):
    """native.c for numbers of a type, or None, which is told in the log."""
    if dtype not in REAL:
        return None
    compiler = os.environ.get("CC") or "cc"
    try:
        library = _declared(_compiled(shlex.split(compiler), REAL[dtype]))
    except (AttributeError, OSError, ValueError, subprocess.SubprocessError) as error:
        lines = str(getattr(error, "stderr", None) or error).strip().splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error" in line), lines[0])
        logging.getLogger("darts").warning(
            f"no {SOURCE.name} by the C compiler {compiler!r} (a gcc with OpenMP is needed; CC names it), so that what "
            f"runs on the CPU takes longer: {reason}"
        )
        return None
    _keep_freed_memory()
    return library


def _compiled(compiler, real):
    """The library of native.c with this compiler on this processor, from the cache folder or compiled into it.

    Its name holds a hash of all that it depends on. It gets that name when it is complete, so that processes that
    compile it at the same time do not disturb each other. Without a folder that is the user's own it is for this
    process alone.
    """
    command = [*compiler, *OPTIONS, f"-DREAL={real}"]
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=COMPILE_SECONDS, check=False).stdout
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), repr(command).encode(), version, _processor()])).hexdigest()
    with contextlib.ExitStack() as stack:
        folder = _cache_folder() or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = folder / f"native-{real}-{key[:32]}.so"
        if not path.is_file():
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
            compiled, library = scratch / "native.o", scratch / "native.so"
            for words in ([*command, "-c", SOURCE, "-o", compiled], [*compiler, "-shared", compiled, "-o", library]):
                # linked without OpenMP's library, so that it takes the one that PyTorch has loaded, and its threads
                subprocess.run(words, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            os.replace(library, path)
        return ctypes.CDLL(path)


def _cache_folder():
    """The folder for compiled code, the user's alone; None where there cannot be one."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "darts"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # no home
        return None
    is_ours = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if is_ours and os.access(folder, os.W_OK) else None


def _processor():
    """What -march=native depends on: caches may be shared by machines. On Linux the processor's features."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))


def _keep_freed_memory():
    """Let glibc's allocator keep what is freed for what comes next: getting it from the system again, page by page,
    would take a tenth of a step with --recompute."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another allocator
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, size in MALLOPT.items():
            mallopt(parameter, size)


def _declared(library):
    """The library, its functions' arguments declared. Raises AttributeError where one is missing."""
    kinds = {"p": ctypes.c_void_p, "n": ctypes.c_long, "d": ctypes.c_double}
    for function, arguments in ARGUMENTS.items():
        getattr(library, function).argtypes = [kinds[kind] for kind in arguments]
    return library
