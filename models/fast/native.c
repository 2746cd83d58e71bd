/* What cells compute on the CPU from channels-last images: depthwise convolutions, products with small matrices and
   their BN, and weighted sums, each with what its gradient needs. native.py compiles this file, with REAL as float or
   double, and calls its functions.

   Images are (N, H, W, C) in memory. Functions return 0, or 1 if there is no memory. The threads are PyTorch's. */

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__ /* bytes of a vector; number of sums of products that are held in registers */
enum { BYTES = 64, MANY = 16 };
#else
enum { BYTES = 32, MANY = 12 };
#endif
enum { LANES = BYTES / sizeof(REAL), PAIR = 2 * LANES };
typedef REAL vector __attribute__((vector_size(BYTES)));
typedef __typeof__((vector){0} < (vector){0}) mask;
#define INLINE static inline __attribute__((always_inline)) /* so that constant arguments are constants inside */

static long min(long a, long b) { return a < b ? a : b; }
static long max(long a, long b) { return a > b ? a : b; }
static long up(long a, long b) { return (a + b - 1) / b; } /* a / b, rounded up */

static vector *zeros(size_t vectors) {
    void *memory = NULL;
    size_t size = (vectors + 1) * sizeof(vector);
    return posix_memalign(&memory, 64, size) ? NULL : memset(memory, 0, size);
}

/* Copy some numbers of a vector; with the usual numbers of channels these are all lanes, a half or a quarter. */
INLINE void copy(void *to, const void *from, long lanes) {
    if (lanes == LANES) memcpy(to, from, BYTES);
    else if (lanes == LANES / 2) memcpy(to, from, BYTES / 2);
    else if (lanes == LANES / 4) memcpy(to, from, BYTES / 4);
    else for (long l = 0; l < lanes; l++) ((REAL *)to)[l] = ((const REAL *)from)[l];
}
/* Read some channels of a pixel into a vector, with zeros in its other lanes; and write them back. */
INLINE vector get(const REAL *from, long lanes) {
    vector v = {0};
    copy(&v, from, lanes);
    return v;
}
INLINE void put(REAL *to, vector v, long lanes) { copy(to, &v, lanes); }
INLINE vector where(vector v, mask m) { return (vector)((mask)v & m); }


/* Depthwise convolutions of relu(x). Kernels are square with an odd side k; the padding is 'same', dilation * (k / 2).

   Only the middle of a kernel is used, as far as it meets pixels: if a large kernel meets few pixels, the rest of it
   reads only zeros. Channels are processed in blocks of as many as a vector has lanes. A block's pixels are copied to a
   plane: vectors with a border of zeros. All convolutions of an image read the same planes, so that the image is read
   from memory once.

   A function takes several batches of images, (N, H, W, C) each. */

struct batch {
    const REAL *x;
    REAL *dx; /* null if it is not wanted */
};

struct convolution {
    const REAL *weight; /* (C, side, side) */
    REAL *z;            /* the output, or its gradient: (N, up(H, stride), up(W, stride), C) */
    REAL *dweight;      /* (C, side, side); null if it is not wanted */
    long side, stride, dilation;
    long k; /* the side of the kernel's middle, outside of which it meets no pixels */
    long batch, at; /* the index of its batch; the offset of its packed kernel, which `sizes_of` sets */
};

struct sizes {
    long border, width; /* zeros on each side of a plane; pixels in a row */
    long inside, plane; /* offset of the first pixel in a plane; vectors in a plane */
    long blocks, taps;  /* blocks in an image; taps of all kernels */
};
static struct sizes sizes_of(struct convolution *all, long count, long H, long W, long C) {
    struct sizes s = {0};
    for (struct convolution *f = all; f < all + count; f++) {
        s.border = max(s.border, f->dilation * (f->k / 2));
        f->at = s.taps * up(C, LANES);
        s.taps += f->k * f->k;
    }
    s.width = W + 2 * s.border;
    s.inside = s.border * s.width + s.border;
    s.plane = (H + 2 * s.border) * s.width;
    s.blocks = up(C, LANES);
    return s;
}

/* Fill the inside of a plane: every stride-th pixel of every stride-th row from an image, or relu of it, zeros
   between. */
static void fill(vector *inside, long width, const REAL *image, long C, long lanes, long H, long W, long stride,
                 int relu) {
    for (long y = 0; y < H; y++, inside += width) {
        if (stride > 1) memset(inside, 0, W * sizeof(vector));
        for (long x = 0; x < W && y % stride == 0; x += stride, image += C) {
            vector v = get(image, lanes);
            inside[x] = relu ? where(v, ~(v < 0)) : v; /* like PyTorch's ReLU, it lets nan pass */
        }
    }
}

/* The offset in the weight of tap t of a kernel's middle, for a channel. */
static long place(const struct convolution *f, long c, long t) {
    long skipped = (f->side - f->k) / 2;
    return (c * f->side + skipped + t / f->k) * f->side + skipped + t % f->k;
}

/* Copy the kernels of all convolutions, block by block, to vectors; rotated by 180 degrees for the gradient of x. */
static void pack_kernels(vector *to, const struct convolution *all, long count, long C, int turned) {
    for (const struct convolution *f = all; f < all + count; f++)
        for (long c = 0, taps = f->k * f->k; c < C; c += LANES)
            for (long t = 0; t < taps; t++, to++) {
                long at = place(f, c, turned ? taps - 1 - t : t);
                for (long l = 0; l < min(LANES, C - c); l++) (*to)[l] = f->weight[at + l * f->side * f->side];
            }
}

/* out (+)= sum over taps of kernel * in[x * stride + tap], for n pixels x in a row. `in` is at the first tap of the
   first pixel; the pixels of `out` are `step` numbers apart. */
INLINE void convolve_some(REAL *out, long step, long lanes, int add, const vector *in, long width,
                          const vector *kernel, long k, long stride, long dilation, int n) {
    vector sums[8];
    for (int x = 0; x < n; x++) sums[x] = add ? get(out + x * step, lanes) : (vector){0};
    for (long i = 0; i < k; i++)
        for (long j = 0; j < k; j++) {
            const vector *at = in + i * dilation * width + j * dilation;
            for (int x = 0; x < n; x++) sums[x] += kernel[i * k + j] * at[x * stride];
        }
    for (int x = 0; x < n; x++) put(out + x * step, sums[x], lanes);
}
INLINE void convolve(REAL *out, long step, long lanes, int add, const vector *in, long width, const vector *kernel,
                     long k, long stride, long dilation, long n) {
    long x = 0;
#define SOME(lanes, stride, pixels) \
    for (; x + pixels <= n; x += pixels) \
        convolve_some(out + x * step, step, lanes, add, in + x * stride, width, kernel, k, stride, dilation, pixels)
    if (lanes == LANES && stride == 1) SOME(LANES, 1, 8);
    if (lanes == LANES) SOME(LANES, stride, 4);
    if (stride == 1) SOME(lanes, 1, 8);
    SOME(lanes, stride, 4);
    if (lanes == LANES && stride == 1) SOME(LANES, 1, 2);
    SOME(lanes, stride, 1);
#undef SOME
}

/* out[i, j] += sum over `rows` rows of n pixels of dz * in at tap (i, j), for some rows and columns of taps. */
INLINE void correlate_some(vector *out, const vector *in, const vector *dz, long width, long k, long stride,
                           long dilation, long rows, long n, int tap_rows, int tap_columns) {
    vector sums[25] = {0};
    for (long y = 0; y < rows; y++, in += stride * width, dz += stride * width)
        for (long x = 0; x < n; x++)
            for (int i = 0; i < tap_rows; i++)
                for (int j = 0; j < tap_columns; j++)
                    sums[i * tap_columns + j] += dz[x * stride] * in[x * stride + i * dilation * width + j * dilation];
    for (int i = 0; i < tap_rows; i++)
        for (int j = 0; j < tap_columns; j++) out[i * k + j] += sums[i * tap_columns + j];
}
static void correlate(vector *out, const vector *in, const vector *dz, long width, long k, long stride, long dilation,
                      long rows, long n) {
#define SOME(j, tap_rows, tap_columns) \
    correlate_some(out + j, in + j * dilation, dz, width, k, stride, dilation, rows, n, tap_rows, tap_columns)
    if (k == 3) { SOME(0, 3, 3); return; }
    if (k == 5 && MANY > 12) { SOME(0, 5, 5); return; }
    for (long i = 0; i < k; i++, in += dilation * width, out += k)
        if (k == 5) SOME(0, 1, 5);
        else for (long j = 0; j < k; j++) SOME(j, 1, 1);
#undef SOME
}

/* Compute every z. */
int depthwise(const struct batch *batches, long n_batches, long N, long H, long W, long C, struct convolution *all,
              long count) {
    const struct sizes s = sizes_of(all, count, H, W, C);
    vector *kernels = zeros(s.blocks * s.taps + omp_get_max_threads() * s.blocks * s.plane);
    if (!kernels) return 1;
    pack_kernels(kernels, all, count, C, 0);
#pragma omp parallel for schedule(static)
    for (long unit = 0; unit < n_batches * N; unit++) {
        const struct batch *batch = batches + unit / N;
        long n = unit % N;
        vector *planes = kernels + s.blocks * (s.taps + omp_get_thread_num() * s.plane);
        for (long b = 0; b < s.blocks; b++)
            fill(planes + b * s.plane + s.inside, s.width, batch->x + n * H * W * C + b * LANES, C,
                 min(LANES, C - b * LANES), H, W, 1, 1);
        for (const struct convolution *f = all; f < all + count; f++) {
            if (f->batch != batch - batches) continue;
            long rows = up(H, f->stride), columns = up(W, f->stride), first = s.border - f->dilation * (f->k / 2);
            for (long y = 0; y < rows; y++)
                for (long b = 0; b < s.blocks; b++)
                    convolve(f->z + (n * rows + y) * columns * C + b * LANES, C, min(LANES, C - b * LANES), 0,
                             planes + b * s.plane + (first + y * f->stride) * s.width + first, s.width,
                             kernels + f->at + b * f->k * f->k, f->k, f->stride, f->dilation, columns);
        }
    }
    free(kernels);
    return 0;
}

/* From the gradients z compute every dx, and add to every dweight, which must be zeros before. */
int depthwise_gradients(const struct batch *batches, long n_batches, long N, long H, long W, long C,
                        struct convolution *all, long count) {
    const struct sizes s = sizes_of(all, count, H, W, C);
    enum { TAPS = 64, DOUBLES = sizeof(double) / sizeof(REAL) };
    long each = (s.blocks + 1) * s.plane + s.blocks * H * W, of_all = s.blocks * s.taps;
    long summed = 0; /* vectors of the dweights of an image; 0 if none is wanted */
    for (const struct convolution *f = all; f < all + count; f++)
        if (f->dweight) summed = of_all;
    vector *kernels = zeros(of_all + summed * (N + DOUBLES) + omp_get_max_threads() * each);
    vector *dweights = kernels + of_all, *threads = dweights + summed * N;
    if (!kernels) return 1;
    pack_kernels(kernels, all, count, C, 1);
#pragma omp parallel for schedule(static)
    for (long unit = 0; unit < n_batches * N; unit++) {
        const struct batch *batch = batches + unit / N;
        long n = unit % N;
        vector *planes = threads + each * omp_get_thread_num(), *dz = planes + s.blocks * s.plane, *sums = dz + s.plane;
        for (long b = 0; b < s.blocks; b++)
            fill(planes + b * s.plane + s.inside, s.width, batch->x + n * H * W * C + b * LANES, C,
                 min(LANES, C - b * LANES), H, W, 1, 1);
        memset(sums, 0, s.blocks * H * W * sizeof(vector));
        for (const struct convolution *f = all; f < all + count; f++) {
            if (f->batch != batch - batches) continue;
            long rows = up(H, f->stride), columns = up(W, f->stride), first = s.border - f->dilation * (f->k / 2);
            long at_once = max(1, 64 / columns); /* rows: few enough to be summed in REAL */
            for (long b = 0; b < s.blocks; b++) {
                long kernel = f->at + b * f->k * f->k;
                fill(dz + s.inside, s.width, f->z + n * rows * columns * C + b * LANES, C, min(LANES, C - b * LANES), H,
                     W, f->stride, 0);
                for (long y = 0; y < rows && f->dweight; y += at_once)
                    correlate(dweights + n * of_all + kernel,
                              planes + b * s.plane + (first + y * f->stride) * s.width + first,
                              dz + s.inside + y * f->stride * s.width, s.width, f->k, f->stride, f->dilation,
                              min(at_once, rows - y), columns);
                for (long y = 0; y < H && batch->dx; y++) /* dz convolved with the rotated kernel, see depthwise.py */
                    convolve((REAL *)(sums + (b * H + y) * W), LANES, LANES, 1, dz + (first + y) * s.width + first,
                             s.width, kernels + kernel, f->k, 1, f->dilation, W);
            }
        }
        for (long i = 0; i < H * W && batch->dx; i++)
            for (long b = 0; b < s.blocks; b++) {
                long at = (n * H * W + i) * C + b * LANES, lanes = min(LANES, C - b * LANES);
                vector v = sums[b * H * W + i];
                put(batch->dx + at, where(v, ~(get(batch->x + at, lanes) <= 0)), lanes);
            }
    }
    double *totals = (double *)(threads + omp_get_max_threads() * each); /* over all images, tap by tap */
#pragma omp parallel for schedule(static)
    for (long from = 0; from < summed; from += TAPS)
        for (long n = 0; n < N; n++)
            for (long i = from; i < min(summed, from + TAPS); i++)
                for (long l = 0; l < LANES; l++) totals[i * LANES + l] += dweights[n * of_all + i][l];
    for (const struct convolution *f = all; f < all + count; f++)
        for (long c = 0, taps = f->k * f->k; c < C && f->dweight; c++)
            for (long t = 0; t < taps; t++)
                f->dweight[place(f, c, t)] += totals[(f->at + c / LANES * taps + t) * LANES + c % LANES];
    free(kernels);
    return 0;
}


/* Products of images, as matrices of P pixels, with small matrices. MANY vectors are summed in registers at a time:
   that many rows of one vector, or half as many rows of a pair of vectors. */

struct term {
    const REAL *x, *A; /* (P, K), (K, C) */
    long K;
};

/* out[p, .] = base[p, .] + shift + sum over terms of x[p, .] A, for n pixels p and a vector or a pair. */
INLINE void mix_some(REAL *out, const REAL *base, const vector *packed, long C, long lanes, const struct term *terms,
                     long count, long pixel, int vectors, int n) {
    vector sums[MANY][2];
#define LANES_OF(v) (lanes == vectors * LANES ? LANES : min(LANES, lanes - (v) * LANES))
    for (int p = 0; p < n; p++)
        for (int v = 0; v < vectors; v++) {
            sums[p][v] = packed[v];
            if (base) sums[p][v] += get(base + p * C + v * LANES, LANES_OF(v));
        }
    packed += vectors;
    for (const struct term *t = terms; t < terms + count; t++) {
        const REAL *x = t->x + pixel * t->K;
        for (long k = 0; k < t->K; k++, packed += vectors)
            for (int p = 0; p < n; p++)
                for (int v = 0; v < vectors; v++) sums[p][v] += x[p * t->K + k] * packed[v];
    }
    for (int p = 0; p < n; p++)
        for (int v = 0; v < vectors; v++) put(out + p * C + v * LANES, sums[p][v], LANES_OF(v));
#undef LANES_OF
}

struct mixture {
    REAL *out; /* (P, C) */
    const REAL *base, *shift; /* (P, C) and (C), or null */
};

/* out = base + shift + sum over terms of x A, for `count` mixtures. terms: n for the first mixture, n for the second,
   ..., with the same K in each mixture. */
int mix(struct mixture *all, long count, struct term *terms, long n, long P, long C) {
    enum { AT_ONCE = 96 };
    long rows = 1, chunks = up(P, AT_ONCE);
    for (long i = 0; i < n; i++) rows += terms[i].K;
    long size = up(C, LANES) * rows;
    vector *packed = zeros(count * size); /* for each mixture, and each vector or pair, the shift and all matrices */
    if (!packed) return 1;
    for (long i = 0; i < count; i++)
        for (long j = 0; j < C; j += PAIR) {
            REAL *to = (REAL *)(packed + i * size) + j * rows;
            long lanes = min(PAIR, C - j), step = lanes > LANES ? PAIR : LANES;
            if (all[i].shift) memcpy(to, all[i].shift + j, lanes * sizeof(REAL));
            for (const struct term *t = terms + i * n; t < terms + (i + 1) * n; t++)
                for (long k = 0; k < t->K; k++) memcpy(to += step, t->A + k * C + j, lanes * sizeof(REAL));
        }
#pragma omp parallel for schedule(static)
    for (long unit = 0; unit < count * chunks; unit++) {
        const struct mixture m = all[unit / chunks];
        const struct term *its = terms + unit / chunks * n;
        long from = unit % chunks * AT_ONCE, until = min(P, from + AT_ONCE);
        for (long j = 0; j < C; j += PAIR) {
            const vector *matrices = packed + unit / chunks * size + j / LANES * rows;
            long p = from, lanes = min(PAIR, C - j);
#define SOME(lanes, vectors, pixels) \
    for (; p + pixels <= until; p += pixels) \
        mix_some(m.out + p * C + j, m.base ? m.base + p * C + j : NULL, matrices, C, lanes, its, n, p, vectors, pixels)
            if (lanes == PAIR) SOME(PAIR, 2, MANY / 2);
            else if (lanes == LANES) SOME(LANES, 1, MANY);
            else if (lanes < LANES) SOME(lanes, 1, MANY);
            if (lanes > LANES) SOME(lanes, 2, 1);
            else SOME(lanes, 1, 1);
#undef SOME
        }
    }
    free(packed);
    return 0;
}

/* total[i, .] += the sum over n pixels of a[., i] b[., .], for some columns i of a and a vector or a pair of b. */
INLINE void products_some(double *total, long C, long lanes, const REAL *a, long K, const REAL *b, long step, long n,
                          int vectors, int columns) {
    vector sums[MANY][2] = {0};
    for (long p = 0; p < n; p++) {
        const REAL *pixel = b + p * step;
        vector right[2] = {get(pixel, LANES), get(pixel + (vectors - 1) * LANES, LANES)};
        for (int i = 0; i < columns; i++)
            for (int v = 0; v < vectors; v++) sums[i][v] += a[p * K + i] * right[v];
    }
    for (int i = 0; i < columns; i++)
        for (long c = 0; c < lanes; c++) total[i * C + c] += ((REAL *)sums[i])[c];
}

struct pair {
    const REAL *a, *b; /* (P, K), (P, C) */
};

/* total, (K, C) and then (K), += a' b and the sum of a, over n pixels. b has `wide` numbers a pixel: whole vectors. */
static void add_products(double *total, const REAL *a, const REAL *b, long n, long K, long C, long wide) {
    for (long j = 0; j < C; j += PAIR) {
        long i = 0;
#define SOME(vectors, columns) \
    for (; i + columns <= K; i += columns) \
        products_some(total + i * C + j, C, min(vectors * LANES, C - j), a + i, K, b + j, wide, n, vectors, columns)
        if (wide - j > LANES) { SOME(2, MANY / 2); SOME(2, 4); SOME(2, 1); }
        else { SOME(1, MANY); SOME(1, 4); SOME(1, 1); }
#undef SOME
    }
    for (long i = 0; i < K; i += LANES) {
        vector sum = {0};
        for (long p = 0; p < n; p++) sum += get(a + p * K + i, min(LANES, K - i));
        for (long l = 0; l < min(LANES, K - i); l++) total[K * C + i + l] += sum[l];
    }
}

/* For each of `count` pairs the sum over the pixels of a, (K), and the product a' b, (K, C). Chunks of pixels are
   summed in REAL; the chunks of a block, and then the blocks, in double. */
int products(struct pair *all, long count, double *sums, double *products, long P, long K, long C) {
    enum { CHUNK = 128, BLOCKS = 8 };
    long wide = up(C, LANES) * LANES, size = K * (C + 1), blocks = min(BLOCKS, up(P, CHUNK));
    double *totals = calloc(max(1, count * blocks * size), sizeof(double));
    vector *copies = zeros(wide == C ? 0 : omp_get_max_threads() * CHUNK * wide / LANES); /* of b, as whole vectors */
    int failed = !totals || !copies;
#pragma omp parallel for schedule(static) if (!failed)
    for (long unit = 0; unit < (failed ? 0 : count * blocks); unit++) {
        const struct pair *pair = all + unit / blocks;
        long chunks = up(P, CHUNK), block = unit % blocks;
        for (long from = chunks * block / blocks * CHUNK; from < min(P, chunks * (block + 1) / blocks * CHUNK);
             from += CHUNK) {
            const REAL *b = pair->b + from * C;
            long n = min(CHUNK, P - from);
            if (wide != C) {
                REAL *copy = (REAL *)copies + omp_get_thread_num() * CHUNK * wide;
                for (long p = 0; p < n; p++) memcpy(copy + p * wide, b + p * C, C * sizeof(REAL));
                b = copy;
            }
            add_products(totals + unit * size, pair->a + from * K, b, n, K, C, wide);
        }
    }
    for (long i = 0; i < (failed ? 0 : count * size); i++) {
        double total = 0;
        for (long block = 0; block < blocks; block++) total += totals[(i / size * blocks + block) * size + i % size];
        *(i % size < K * C ? products + i / size * K * C + i % size : sums + i / size * K + i % size - K * C) = total;
    }
    free(totals);
    free(copies);
    return failed;
}


/* BN of products u = M z, with K channels of z and C of u, times a scale, written as one product: folded_bn.py has the
   mathematics. It is computed in double, for `count` products of the same sizes. */

/* to[.] += sum over rows of a[k * step] X[k, .], of n numbers each */
INLINE void add_rows(double *restrict to, const double *restrict a, long step, const double *restrict X, long rows,
                     long n) {
    long k = 0;
    for (; k + 4 <= rows; k += 4, X += 4 * n) {
        const double a0 = a[k * step], a1 = a[(k + 1) * step], a2 = a[(k + 2) * step], a3 = a[(k + 3) * step];
        for (long j = 0; j < n; j++) to[j] += a0 * X[j] + a1 * X[n + j] + a2 * X[2 * n + j] + a3 * X[3 * n + j];
    }
    for (; k < rows; k++, X += n)
        for (long j = 0; j < n; j++) to[j] += a[k * step] * X[j];
}
INLINE double dot(const double *restrict a, const double *restrict b, long n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

struct moments { /* what the gradient of a product needs */
    double *mean, *MS, *inverse; /* of z (K); M times its covariance (C, K); 1 / the standard deviation of u (C) */
};
INLINE struct moments moments_of(double *all, long product, long K, long C) {
    double *first = all + product * (K + C * K + C);
    return (struct moments){first, first + K, first + K + C * K};
}

/* From the sums of z (K) and of z z' (K, K) over n pixels compute A (K, C) and shift (C), so that A' z + shift is
   BN(M z) times the scale: `scales` numbers, one or one for each channel; null for 1. shifts: (edges, C); that of edge
   e is the sum of the shifts of products e, e + edges, ..., and of the bias, (edges, C) or null. mean, var: of u,
   unbiased, (C). moments: what fold_gradients reads. */
int fold(const double *sums, const double *grams, double n, const REAL *M, const REAL *scale, long scales,
         const REAL *bias, double eps, REAL *A, REAL *shifts, long edges, REAL *mean, REAL *var, double *moments,
         long count, long K, long C) {
    double *covariances = malloc(max(1, count * (K * K + C) + omp_get_max_threads() * K) * sizeof(double));
    double *shift = covariances + count * K * K, *rows = shift + count * C;
    if (!covariances) return 1;
#pragma omp parallel for schedule(static) if (count * K > 64)
    for (long u = 0; u < count * K; u++) {
        const struct moments z = moments_of(moments, u / K, K, C);
        const double *of_product = sums + u / K * K, mean_k = sums[u] / n;
        z.mean[u % K] = mean_k;
        for (long j = 0; j < K; j++) covariances[u * K + j] = grams[u * K + j] / n - mean_k * (of_product[j] / n);
    }
#pragma omp parallel for schedule(static) if (count * C > 64)
    for (long u = 0; u < count * C; u++) {
        long p = u / C, i = u % C;
        const struct moments z = moments_of(moments, p, K, C);
        double *row = rows + omp_get_thread_num() * K, *MS = z.MS + i * K;
        for (long k = 0; k < K; k++) row[k] = M[u * K + k], MS[k] = 0;
        add_rows(MS, row, 1, covariances + p * K * K, K, K);
        double mean_u = dot(row, z.mean, K), var_u = dot(MS, row, K);
        var_u = var_u < 0 ? 0 : var_u; /* nan stays */
        z.inverse[i] = 1 / sqrt(var_u + eps);
        double factor = z.inverse[i] * (scale ? scale[p * scales + i % scales] : 1);
        for (long k = 0; k < K; k++) A[(p * K + k) * C + i] = factor * row[k];
        shift[u] = -factor * mean_u;
        mean[u] = mean_u;
        var[u] = var_u * n / (n - 1);
    }
    for (long e = 0; e < edges * C; e++) {
        double sum = bias ? bias[e] : 0;
        for (long at = e; at < count * C; at += edges * C) sum += shift[at];
        shifts[e] = sum;
    }
    free(covariances);
    return 0;
}

/* From the sums over n pixels of g = dL/dy (C) and of g z' (C, K) compute the gradients of M and of the scale, and
   that of z as A' g + D' z + shift, with A (C, K), D (K, K), shift (K). What is not wanted is null; A, D and shift are
   wanted together or not at all. */
int fold_gradients(const double *sums, const double *products, double n, const REAL *M, const REAL *scale, long scales,
                   double *moments, REAL *dscale, REAL *dM, REAL *A, REAL *D, REAL *shift, long count, long K, long C) {
    long room = 2 * C * K + 2 * K + 2 * C;
    double *rooms = malloc(max(1, omp_get_max_threads() * room) * sizeof(double));
    if (!rooms) return 1;
#pragma omp parallel for schedule(static) if (count > 1)
    for (long p = 0; p < count; p++) {
        const struct moments z = moments_of(moments, p, K, C);
        double *matrix = rooms + omp_get_thread_num() * room, *cM = matrix + C * K, *R = cM + C * K, *row = R + K;
        double *means = row + K /* means of the gradient of u */, *of_scale = means + C;
        for (long i = 0; i < C; i++) {
            double *m = matrix + i * K, sum = sums[p * C + i];
            for (long k = 0; k < K; k++) {
                m[k] = M[(p * C + i) * K + k];
                R[k] = products[(p * C + i) * K + k] - sum * z.mean[k];
            }
            double v = dot(m, R, K), factor = z.inverse[i] * (scale ? scale[p * scales + i % scales] : 1);
            double c = factor * z.inverse[i] * z.inverse[i] * v / n;
            for (long k = 0; dM && k < K; k++) dM[(p * C + i) * K + k] = factor * R[k] - n * c * z.MS[i * K + k];
            for (long k = 0; A && k < K; k++) A[(p * C + i) * K + k] = factor * m[k], cM[i * K + k] = -c * m[k];
            means[i] = factor * sum / n;
            of_scale[i] = v * z.inverse[i];
        }
        for (long s = 0; dscale && s < scales; s++) {
            double sum = 0;
            for (long i = s; i < C; i += scales) sum += of_scale[i];
            dscale[p * scales + s] = sum;
        }
        for (long k = 0; A && k < K; k++) {
            double sum = 0;
            for (long j = 0; j < K; j++) row[j] = 0;
            add_rows(row, cM + k, K, matrix, C, K);
            for (long j = 0; j < K; j++) D[(p * K + k) * K + j] = row[j];
            for (long i = 0; i < C; i++) sum += means[i] * matrix[i * K + k];
            shift[p * K + k] = -dot(row, z.mean, K) - sum;
        }
    }
    free(rooms);
    return 0;
}


/* Weighted sums of images, here of `size` numbers each. */

enum { AT_A_TIME = 1024 };

/* outs[e] = sum over the n images of w[e, t] images[t], for `count` outs. */
int blend(REAL **outs, long count, REAL **images, long n, const REAL *w, long size) {
#pragma omp parallel for schedule(static) if (size > AT_A_TIME)
    for (long from = 0; from < size; from += AT_A_TIME)
        for (long e = 0; e < count; e++)
            for (long i = from, until = min(size, from + AT_A_TIME); i < until; i += LANES) {
                vector sum = {0};
                for (long t = 0; t < n; t++) sum += w[e * n + t] * get(images[t] + i, min(LANES, until - i));
                put(outs[e] + i, sum, min(LANES, until - i));
            }
    return 0;
}

/* w[e, t] = the sum of the products of a[e] and b[t], for `count` images a and n images b. Pieces are summed in REAL;
   the pieces of a block, and then the blocks, in double. */
int dots(REAL **a, long count, REAL **b, long n, double *w, long size) {
    enum { BLOCKS = 64 };
    long pieces = up(size, AT_A_TIME), blocks = min(BLOCKS, pieces);
    double *totals = calloc(max(1, blocks * count * n), sizeof(double));
    if (!totals) return 1;
#pragma omp parallel for schedule(static)
    for (long block = 0; block < blocks; block++)
        for (long piece = pieces * block / blocks; piece < pieces * (block + 1) / blocks; piece++)
            for (long e = 0; e < count; e++)
                for (long t = 0; t < n; t++) {
                    vector sum = {0};
                    for (long i = piece * AT_A_TIME, until = min(size, i + AT_A_TIME); i < until; i += LANES)
                        sum += get(a[e] + i, min(LANES, until - i)) * get(b[t] + i, min(LANES, until - i));
                    for (long l = 0; l < LANES; l++) totals[(block * count + e) * n + t] += sum[l];
                }
    for (long i = 0; i < count * n; i++) {
        w[i] = 0;
        for (long block = 0; block < blocks; block++) w[i] += totals[block * count * n + i];
    }
    free(totals);
    return 0;
}
