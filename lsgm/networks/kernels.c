/* Kernels for training on CPUs. Feature maps are float32 and channels-last: `rows` pixels of `channels` numbers.
 *
 * Vectors are GCC's and Clang's extension, of the widest kind that the processor has.
 */
#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef double dvec __attribute__((vector_size(8 * LANES)));
typedef vec vec_unaligned __attribute__((aligned(4)));
typedef dvec dvec_unaligned __attribute__((aligned(8)));

static inline vec load(const float *p) { return *(const vec_unaligned *)p; }
static inline void store(float *p, vec v) { *(vec_unaligned *)p = v; }
static inline vec all(float value) { return value - (vec){0}; }
static inline vec choose(ivec condition, vec yes, vec no) {
    return (vec)((condition & (ivec)yes) | (~condition & (ivec)no));
}

/* Below this many numbers a second thread costs more than it saves. */
enum { WORTH_A_THREAD = 16384 };

/* ---- swish ---------------------------------------------------------------------------------------------------- */

/* e^x to 2 ulp for x in [-87, 88], which others are clamped to: 2^n e^r with |r| <= log(2) / 2. */
static inline vec exponential(vec x) {
    x = choose(x < -87.0f, all(-87.0f), x); /* NaN stays NaN */
    x = choose(x > 88.0f, all(88.0f), x);
    const vec magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number, held in the low bits */
    vec shifted = x * 1.44269504f + magic;
    vec n = shifted - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}

static inline vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

/* ---- batch norm, with swish or without ------------------------------------------------------------------------- */

/* Rows of few channels are taken together, so that `width` is a multiple of the lanes. */
typedef struct {
    int64_t rows, width, repeats;
} shape;

static shape tiled(int64_t rows, int64_t channels) {
    int64_t repeats = 1;
    while (channels * repeats % LANES || (channels * repeats < 4 * LANES && rows % (2 * repeats) == 0)) repeats *= 2;
    return (shape){rows / repeats, channels * repeats, repeats};
}

static void first_and_last(int64_t rows, int64_t *first, int64_t *last) {
    int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    *first = rows * thread / threads;
    *last = rows * (thread + 1) / threads;
}

/* Rows whose float32 sums go into a float64 sum: what the fastest cache holds, at most 64. */
static int64_t block(shape s) {
    int64_t rows = 4096 / s.width;
    return rows < 4 ? 4 : rows > 64 ? 64 : rows;
}

/* Mean and biased variance of each channel. Blocks of rows have their own means and sums of squared deviations, which
 * are joined in float64 (Chan, Golub, LeVeque 1983): no cancellation, whatever the mean. */
void batch_norm_statistics(const float *x, int64_t rows, int64_t channels, float *mean, float *variance) {
    shape s = tiled(rows, channels);
    int threads = omp_get_max_threads();
    double *sums = calloc(threads * (2 * s.width + 1), sizeof(double));
#pragma omp parallel num_threads(threads) if (rows * channels > WORTH_A_THREAD)
    {
        double *mine = sums + omp_get_thread_num() * (2 * s.width + 1), *m = mine + 1, *m2 = m + s.width;
        int64_t first, last;
        first_and_last(s.rows, &first, &last);
        for (int64_t row = first, step = block(s); row < last; row += step) {
            int64_t n = last - row < step ? last - row : step;
            double before = mine[0], share = n / (before + n);
            for (int64_t c = 0; c < s.width; c += LANES) {
                const float *p = x + row * s.width + c;
                vec a = {0}, b = {0}, even = {0}, odd = {0};
                for (int64_t i = 0; i + 1 < n; i += 2) {
                    a += load(p + i * s.width);
                    b += load(p + (i + 1) * s.width);
                }
                if (n % 2) a += load(p + (n - 1) * s.width);
                vec center = (a + b) / (float)n;
                for (int64_t i = 0; i + 1 < n; i += 2) {
                    vec d = load(p + i * s.width) - center, e = load(p + (i + 1) * s.width) - center;
                    even += d * d;
                    odd += e * e;
                }
                if (n % 2) {
                    vec d = load(p + (n - 1) * s.width) - center;
                    even += d * d;
                }
                even += odd;
                dvec_unaligned *of_m = (dvec_unaligned *)(m + c), *of_m2 = (dvec_unaligned *)(m2 + c);
                dvec delta = __builtin_convertvector(center, dvec) - *of_m;
                *of_m += delta * share;
                *of_m2 += __builtin_convertvector(even, dvec) + delta * delta * (before * share);
            }
            mine[0] += n;
        }
    }
    for (int64_t c = 0; c < channels; c++) {
        double n = 0, m = 0, m2 = 0;
        for (int t = 0; t < threads; t++)
            for (int64_t r = 0; r < s.repeats; r++) {
                const double *of = sums + t * (2 * s.width + 1);
                double count = of[0], delta = of[1 + r * channels + c] - m;
                if (count == 0) continue;
                n += count;
                m += delta * count / n;
                m2 += of[1 + s.width + r * channels + c] + delta * delta * (n - count) * count / n;
            }
        mean[c] = m;
        variance[c] = m2 / n;
    }
    free(sums);
}

/* Vectors of a channel each, repeated to the width of the tiled rows. */
static float *factors(shape s, int count) {
    return aligned_alloc(64, (sizeof(float) * count * s.width + 63) / 64 * 64);
}

/* y = gamma (x - mean) / sqrt(variance + eps) + beta, or its swish. */
void batch_norm_forward(const float *x, int64_t rows, int64_t channels, const float *mean, const float *variance,
                        const float *gamma, const float *beta, float eps, int64_t swish, float *y) {
    shape s = tiled(rows, channels);
    float *scale = factors(s, 2), *shift = scale + s.width;
    for (int64_t i = 0; i < s.width; i++) {
        int64_t c = i % channels;
        scale[i] = gamma[c] / sqrtf(variance[c] + eps);
        shift[i] = beta[c] - mean[c] * scale[i];
    }
#pragma omp parallel if (rows * channels > WORTH_A_THREAD)
    {
        int64_t first, last;
        first_and_last(s.rows, &first, &last);
        for (int64_t row = first; row < last; row++)
            for (int64_t c = 0, i = row * s.width; c < s.width; c += LANES, i += LANES) {
                vec z = load(x + i) * load(scale + c) + load(shift + c);
                store(y + i, swish ? z * sigmoid(z) : z);
            }
    }
    free(scale);
}

/* The gradient with respect to z = gamma x_hat + beta, from that with respect to y = z or swish(z). */
static inline vec gradient_of_z(vec dy, vec x_hat, vec gamma, vec beta, int64_t swish) {
    if (!swish) return dy;
    vec z = gamma * x_hat + beta, s = sigmoid(z);
    return dy * (s + z * s * (1.0f - s));
}

static float *backward_factors(shape s, int64_t channels, const float *mean, const float *variance,
                               const float *gamma, const float *beta, float eps) {
    float *f = factors(s, 4);
    for (int64_t i = 0; i < s.width; i++) {
        int64_t c = i % channels;
        f[i] = 1.0f / sqrtf(variance[c] + eps);
        f[s.width + i] = -mean[c] * f[i];
        f[2 * s.width + i] = gamma[c];
        f[3 * s.width + i] = beta[c];
    }
    return f;
}

/* Sums over the rows: those of dz are beta's gradient, those of dz x_hat gamma's. With swish dz is kept in `dz`. */
void batch_norm_backward_sums(const float *x, const float *dy, int64_t rows, int64_t channels, const float *mean,
                              const float *variance, const float *gamma, const float *beta, float eps, int64_t swish,
                              float *dz, float *d_beta_and_gamma) {
    shape s = tiled(rows, channels);
    float *f = backward_factors(s, channels, mean, variance, gamma, beta, eps);
    int threads = omp_get_max_threads();
    double *sums = calloc(2 * threads * s.width, sizeof(double));
#pragma omp parallel num_threads(threads) if (rows * channels > WORTH_A_THREAD)
    {
        double *of_dz = sums + 2 * s.width * omp_get_thread_num(), *of_product = of_dz + s.width;
        int64_t first, last;
        first_and_last(s.rows, &first, &last);
        for (int64_t row = first, step = block(s); row < last; row += step) {
            int64_t n = last - row < step ? last - row : step;
            for (int64_t c = 0; c < s.width; c += LANES) {
                vec r = load(f + c), shift = load(f + s.width + c), g = load(f + 2 * s.width + c);
                vec b = load(f + 3 * s.width + c), a = {0}, p = {0};
                for (int64_t i = row * s.width + c, end = i + n * s.width; i < end; i += s.width) {
                    vec x_hat = load(x + i) * r + shift, d = gradient_of_z(load(dy + i), x_hat, g, b, swish);
                    if (swish) store(dz + i, d);
                    a += d;
                    p += d * x_hat;
                }
                *(dvec_unaligned *)(of_dz + c) += __builtin_convertvector(a, dvec);
                *(dvec_unaligned *)(of_product + c) += __builtin_convertvector(p, dvec);
            }
        }
    }
    for (int64_t c = 0; c < channels; c++) {
        double a = 0, p = 0;
        for (int t = 0; t < threads; t++)
            for (int64_t i = c; i < s.width; i += channels) {
                a += sums[2 * t * s.width + i];
                p += sums[(2 * t + 1) * s.width + i];
            }
        d_beta_and_gamma[c] = a;
        d_beta_and_gamma[channels + c] = p;
    }
    free(sums);
    free(f);
}

/* dx = gamma / sqrt(variance + eps) (dz - mean(dz) - x_hat mean(dz x_hat)); the means are over the whole batch. `dx`
 * may be `dz`. */
void batch_norm_backward(const float *x, const float *dz, int64_t rows, int64_t channels, const float *mean,
                         const float *variance, const float *gamma, float eps, const float *means, float *dx) {
    shape s = tiled(rows, channels);
    const float *mean_dz = means, *mean_product = means + channels;
    float *f = factors(s, 3), *slope = f + s.width, *shift = slope + s.width;
    for (int64_t i = 0; i < s.width; i++) { /* dx = f dz + slope x + shift */
        int64_t c = i % channels;
        float r = 1.0f / sqrtf(variance[c] + eps);
        f[i] = gamma[c] * r;
        slope[i] = -f[i] * r * mean_product[c];
        shift[i] = -f[i] * mean_dz[c] - slope[i] * mean[c];
    }
#pragma omp parallel if (rows * channels > WORTH_A_THREAD)
    {
        int64_t first, last;
        first_and_last(s.rows, &first, &last);
        for (int64_t row = first; row < last; row++)
            for (int64_t c = 0, i = row * s.width; c < s.width; c += LANES, i += LANES)
                store(dx + i, load(dz + i) * load(f + c) + load(x + i) * load(slope + c) + load(shift + c));
    }
    free(f);
}

/* ---- depthwise 5x5 convolution, zero padding 2 ------------------------------------------------------------------ */

enum { TILE = 8 }; /* output pixels whose sums stay in registers */

/* Adds to `tile` pixels of an output row, from column `start`, what one input row gives through one row of weights. */
static inline void row_of_taps(const float *x, int64_t columns, int64_t channels, const float *weight, int64_t start,
                               vec sums[TILE]) {
    vec w0 = load(weight), w1 = load(weight + channels), w2 = load(weight + 2 * channels);
    vec w3 = load(weight + 3 * channels), w4 = load(weight + 4 * channels);
    const vec w[5] = {w0, w1, w2, w3, w4};
#pragma GCC unroll 12
    for (int k = 0; k < TILE + 4; k++) {
        int64_t column = start + k - 2;
        if (column < 0 || column >= columns) continue;
        vec value = load(x + column * channels);
#pragma GCC unroll 5
        for (int j = 0; j < 5; j++)
            if (k - j >= 0 && k - j < TILE) sums[k - j] += value * w[j];
    }
}

/* y[b, h, w, c] = sum over i, j of weight[i, j, c] x[b, h + i - 2, w + j - 2, c]. */
void depthwise_forward(const float *x, const float *weight, int64_t batch, int64_t height, int64_t width,
                       int64_t channels, float *y) {
#pragma omp parallel for schedule(static)
    for (int64_t image_row = 0; image_row < batch * height; image_row++) {
        int64_t row = image_row % height, line = width * channels;
        const float *image = x + (image_row - row) * line;
        for (int64_t c = 0; c < channels; c += LANES)
            for (int64_t start = 0; start < width; start += TILE) {
                vec sums[TILE] = {{0}};
                for (int i = 0; i < 5; i++) {
                    int64_t from = row + i - 2;
                    if (from < 0 || from >= height) continue;
                    row_of_taps(image + from * line + c, width, channels, weight + 5 * i * channels + c, start, sums);
                }
                float *out = y + image_row * line + start * channels + c;
#pragma GCC unroll 8
                for (int t = 0; t < TILE; t++)
                    if (start + t < width) store(out + t * channels, sums[t]);
            }
    }
}

/* d_weight[i, j, c] = sum over b, h, w of dy[b, h, w, c] x[b, h + i - 2, w + j - 2, c]. */
void depthwise_weight_gradient(const float *x, const float *dy, int64_t batch, int64_t height, int64_t width,
                               int64_t channels, float *d_weight) {
    int threads = omp_get_max_threads();
    int64_t size = 25 * channels, line = width * channels;
    float *sums = calloc(threads * size, sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        float *mine = sums + omp_get_thread_num() * size;
#pragma omp for schedule(static)
        for (int64_t image = 0; image < batch; image++)
            for (int64_t c = 0; c < channels; c += LANES) {
                vec total[25] = {{0}}; /* of this image, which keeps float32 sums short */
                for (int64_t row = 0; row < height; row++)
                    for (int i = 0; i < 5; i++) {
                        int64_t from = row + i - 2;
                        if (from < 0 || from >= height) continue;
                        const float *g = dy + (image * height + row) * line + c;
                        const float *p = x + (image * height + from) * line + c;
                        vec zero = {0}, t0 = total[5 * i], t1 = total[5 * i + 1], t2 = total[5 * i + 2];
                        vec t3 = total[5 * i + 3], t4 = total[5 * i + 4];
                        vec x0 = zero, x1 = zero, x2 = load(p), x3 = width > 1 ? load(p + channels) : zero;
                        for (int64_t column = 0; column < width; column++) {
                            vec x4 = column + 2 < width ? load(p + (column + 2) * channels) : zero;
                            vec d = load(g + column * channels);
                            t0 += d * x0, t1 += d * x1, t2 += d * x2, t3 += d * x3, t4 += d * x4;
                            x0 = x1, x1 = x2, x2 = x3, x3 = x4;
                        }
                        total[5 * i] = t0, total[5 * i + 1] = t1, total[5 * i + 2] = t2;
                        total[5 * i + 3] = t3, total[5 * i + 4] = t4;
                    }
                for (int tap = 0; tap < 25; tap++) {
                    float *to = mine + tap * channels + c;
                    store(to, load(to) + total[tap]);
                }
            }
    }
    for (int64_t i = 0; i < size; i++) {
        double total = 0;
        for (int t = 0; t < threads; t++) total += sums[t * size + i];
        d_weight[i] = total;
    }
    free(sums);
}

/* ---- the gated sum of a residual cell ---------------------------------------------------------------------------- */

/* sums[b, c] = sum over the pixels of x y, or of x where y is NULL. */
void channel_sums(const float *x, const float *y, int64_t batch, int64_t pixels, int64_t channels, float *sums) {
#pragma omp parallel for schedule(static) if (batch * pixels * channels > WORTH_A_THREAD)
    for (int64_t image = 0; image < batch; image++) {
        float *total = sums + image * channels;
        for (int64_t c = 0; c < channels; c++) total[c] = 0;
        for (int64_t i = image * pixels * channels, end = i + pixels * channels; i < end; i += channels) {
            int64_t c = 0;
            for (; c + LANES <= channels; c += LANES) {
                vec value = load(x + i + c);
                if (y) value *= load(y + i + c);
                store(total + c, load(total + c) + value);
            }
            for (; c < channels; c++) total[c] += y ? x[i + c] * y[i + c] : x[i + c];
        }
    }
}

/* out[b, p, c] = scale[b, c] x[b, p, c] + shift[b, c], plus base[b, p, c]; `shift` or `base` may be NULL. */
void scale_channels(const float *x, const float *scale, const float *shift, const float *base, int64_t batch,
                    int64_t pixels, int64_t channels, float *out) {
#pragma omp parallel for schedule(static) if (batch * pixels * channels > WORTH_A_THREAD)
    for (int64_t pixel = 0; pixel < batch * pixels; pixel++) {
        int64_t row = pixel / pixels * channels, i = pixel * channels, c = 0;
        for (; c + LANES <= channels; c += LANES) {
            vec value = load(x + i + c) * load(scale + row + c);
            if (shift) value += load(shift + row + c);
            if (base) value += load(base + i + c);
            store(out + i + c, value);
        }
        for (; c < channels; c++)
            out[i + c] = x[i + c] * scale[row + c] + (shift ? shift[row + c] : 0) + (base ? base[i + c] : 0);
    }
}

/* ---- singular values ---------------------------------------------------------------------------------------------- */

static float dot(const float *a, const float *b, int64_t n) {
    vec sums = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums += load(a + i) * load(b + i);
    float total = 0;
    for (int l = 0; l < LANES; l++) total += sums[l];
    for (; i < n; i++) total += a[i] * b[i];
    return total;
}

static void normalize(float *a, int64_t n) {
    float norm = sqrtf(dot(a, a, n));
    norm = norm > 1e-12f ? norm : 1e-12f;
    for (int64_t i = 0; i < n; i++) a[i] /= norm;
}

/* Power iteration for each of `count` matrices [rows, columns], in place: left <- W W^T left, normalized. Then right is
 * W^T left of the step before, normalized, and values are left^T W right. */
void power_iteration(const float *matrices, int64_t count, int64_t rows, int64_t columns, int64_t iterations,
                     float *lefts, float *rights, float *values) {
#pragma omp parallel for schedule(static) if (count * rows * columns > WORTH_A_THREAD)
    for (int64_t k = 0; k < count; k++) {
        const float *matrix = matrices + k * rows * columns;
        float *left = lefts + k * rows, *right = rights + k * columns;
        for (int64_t step = 0; step < iterations; step++) {
            for (int64_t j = 0; j < columns; j++) right[j] = 0;
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < columns; j++) right[j] += left[i] * matrix[i * columns + j];
            for (int64_t i = 0; i < rows; i++) left[i] = dot(matrix + i * columns, right, columns);
            normalize(left, rows);
        }
        normalize(right, columns);
        float value = 0;
        for (int64_t i = 0; i < rows; i++) value += left[i] * dot(matrix + i * columns, right, columns);
        values[k] = value;
    }
}

/* ---- several processes -------------------------------------------------------------------------------------------- */

/* The numbers `own` of every process, in `every` [world, count], through memory that they share: for each process a
 * line of 64 bytes with the turns that it took, then [2, world, capacity] numbers. Returns 0 if another one has not come
 * to this turn within so many milliseconds; the call can then be repeated. */
int64_t gather(char *memory, const float *own, int64_t count, int64_t capacity, int64_t rank, int64_t world,
               int64_t turn, int64_t milliseconds, float *every) {
    enum { LINE = 64, POLLS = 2000 };
    float *places = (float *)(memory + LINE * world) + turn % 2 * world * capacity;
    memcpy(places + rank * capacity, own, sizeof(float) * count);
    atomic_store_explicit((_Atomic int64_t *)(memory + LINE * rank), turn, memory_order_release);
    for (int64_t other = 0; other < world; other++) {
        _Atomic int64_t *turns = (_Atomic int64_t *)(memory + LINE * other);
        struct timespec start, now;
        clock_gettime(CLOCK_MONOTONIC, &start);
        for (int64_t polls = 1; atomic_load_explicit(turns, memory_order_acquire) < turn; polls++) {
            if (polls % POLLS) continue;
            sched_yield(); /* the other one may need this core */
            clock_gettime(CLOCK_MONOTONIC, &now);
            if ((now.tv_sec - start.tv_sec) * 1000 + (now.tv_nsec - start.tv_nsec) / 1000000 > milliseconds) return 0;
        }
        memcpy(every + other * count, places + other * capacity, sizeof(float) * count);
    }
    return 1;
}
