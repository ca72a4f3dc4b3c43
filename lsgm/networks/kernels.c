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
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX__)
#include <immintrin.h>
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
static inline float total_of(vec v) {
    float sums[4] = {0};
    for (int l = 0; l < LANES; l++) sums[l % 4] += v[l];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}
/* The smaller (larger) one; `b` if it is NaN. */
#if LANES == 16
static inline vec smaller(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
static inline vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
#elif LANES == 8
static inline vec smaller(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); }
static inline vec larger(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
#else
static inline vec choose(ivec condition, vec yes, vec no) {
    return (vec)((condition & (ivec)yes) | (~condition & (ivec)no));
}
static inline vec smaller(vec a, vec b) { return choose(a < b, a, b); }
static inline vec larger(vec a, vec b) { return choose(a > b, a, b); }
#endif

/* Below this many numbers a second thread costs more than it saves. */
enum { WORTH_A_THREAD = 16384 };

/* ---- swish ---------------------------------------------------------------------------------------------------- */

/* e^x to 2 ulp for x in [-87, 88], which others are clamped to: 2^n e^r with |r| <= log(2) / 2. */
static inline vec exponential(vec x) {
    x = smaller(all(88.0f), larger(all(-87.0f), x)); /* NaN stays NaN */
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

/* ---- statistics of channels ------------------------------------------------------------------------------------- */

/* Scratch memory of a thread, which its next call uses again. */
static float *scratch(int64_t count) {
    static _Thread_local float *memory;
    static _Thread_local int64_t held;
    if (count > held) {
        free(memory);
        held = (count + 15) / 16 * 16;
        memory = aligned_alloc(64, sizeof(float) * held);
    }
    return memory;
}

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
static int64_t block(int64_t width) {
    int64_t rows = 4096 / width;
    return rows < 4 ? 4 : rows > 64 ? 64 : rows;
}

/* Means and sums of squared deviations, of each thread: [threads] times a count, [width] and [width]. */
static double *new_statistics(int threads, int64_t width) { return calloc(threads * (2 * width + 1), sizeof(double)); }

/* Where the numbers of a map are: how far apart its rows (pixels) are, and the vectors of a row. */
typedef struct {
    int64_t row, vector;
} layout;

/* Adds rows of the channels first .. first + size to the statistics of this thread. Blocks of rows have their own means,
 * which are joined in float64 (Chan, Golub, LeVeque 1983): no cancellation, whatever the mean. `before` is the number of
 * rows so far. */
static void add_to_statistics(const float *x, int64_t rows, layout l, int64_t first, int64_t size, int64_t width,
                              double before, double *all_statistics) {
    double *m = all_statistics + omp_get_thread_num() * (2 * width + 1) + 1, *m2 = m + width;
    for (int64_t row = 0, n, step = block(size); row < rows; row += n, before += n) {
        n = rows - row < step ? rows - row : step;
        double share = n / (before + n);
        for (int64_t c = 0; c < size; c += LANES) {
            const float *p = x + row * l.row + c / LANES * l.vector;
            vec a = {0}, b = {0}, even = {0}, odd = {0};
            for (int64_t i = 0; i + 1 < n; i += 2) {
                a += load(p + i * l.row);
                b += load(p + (i + 1) * l.row);
            }
            if (n % 2) a += load(p + (n - 1) * l.row);
            vec center = (a + b) / (float)n;
            for (int64_t i = 0; i + 1 < n; i += 2) {
                vec d = load(p + i * l.row) - center, e = load(p + (i + 1) * l.row) - center;
                even += d * d;
                odd += e * e;
            }
            if (n % 2) {
                vec d = load(p + (n - 1) * l.row) - center;
                even += d * d;
            }
            even += odd;
            dvec_unaligned *of_m = (dvec_unaligned *)(m + first + c), *of_m2 = (dvec_unaligned *)(m2 + first + c);
            dvec delta = __builtin_convertvector(center, dvec) - *of_m;
            *of_m += delta * share;
            *of_m2 += __builtin_convertvector(even, dvec) + delta * delta * (before * share);
        }
    }
}

/* Sets how many rows this thread has added. */
static void set_count(double count, int64_t width, double *all_statistics) {
    all_statistics[omp_get_thread_num() * (2 * width + 1)] = count;
}

/* Mean and biased variance of each channel, of all threads' and tiled rows. Frees the statistics. */
static void join_statistics(double *all_statistics, int threads, int64_t width, int64_t channels, float *mean,
                            float *variance) {
    for (int64_t c = 0; c < channels; c++) {
        double n = 0, m = 0, m2 = 0;
        for (int t = 0; t < threads; t++)
            for (int64_t i = c; i < width; i += channels) {
                const double *of = all_statistics + t * (2 * width + 1);
                double count = of[0], delta = of[1 + i] - m;
                if (count == 0) continue;
                n += count;
                m += delta * count / n;
                m2 += of[1 + width + i] + delta * delta * (n - count) * count / n;
            }
        mean[c] = m;
        variance[c] = m2 / n;
    }
    free(all_statistics);
}

/* ---- batch norm, with swish or without ------------------------------------------------------------------------- */

void batch_norm_statistics(const float *x, int64_t rows, int64_t channels, float *mean, float *variance) {
    shape s = tiled(rows, channels);
    int threads = omp_get_max_threads();
    double *statistics = new_statistics(threads, s.width);
#pragma omp parallel num_threads(threads) if (rows * channels > WORTH_A_THREAD)
    {
        int64_t first, last;
        first_and_last(s.rows, &first, &last);
        add_to_statistics(x + first * s.width, last - first, (layout){s.width, LANES}, 0, s.width, s.width, 0, statistics);
        set_count(last - first, s.width, statistics);
    }
    join_statistics(statistics, threads, s.width, channels, mean, variance);
}

/* Vectors of a channel each, repeated to a width. */
static float *factors(int64_t width, int count) {
    return aligned_alloc(64, (sizeof(float) * count * width + 63) / 64 * 64);
}

/* z = f[0] x + f[1]. */
static float *forward_factors(int64_t width, int64_t channels, const float *mean, const float *variance,
                              const float *gamma, const float *beta, float eps) {
    float *f = factors(width, 2);
    for (int64_t i = 0; i < width; i++) {
        int64_t c = i % channels;
        f[i] = gamma[c] / sqrtf(variance[c] + eps);
        f[width + i] = beta[c] - mean[c] * f[i];
    }
    return f;
}

/* x_hat = f[0] x + f[1], z = f[2] x_hat + f[3]. */
static float *backward_factors(int64_t width, int64_t channels, const float *mean, const float *variance,
                               const float *gamma, const float *beta, float eps) {
    float *f = factors(width, 4);
    for (int64_t i = 0; i < width; i++) {
        int64_t c = i % channels;
        f[i] = 1.0f / sqrtf(variance[c] + eps);
        f[width + i] = -mean[c] * f[i];
        f[2 * width + i] = gamma[c];
        f[3 * width + i] = beta[c];
    }
    return f;
}

/* dx = gamma / sqrt(variance + eps) (dz - mean(dz) - x_hat mean(dz x_hat)) = f[0] dz + f[1] x + f[2]; the means, [2, C],
 * are over the whole batch. */
static float *gradient_factors(int64_t width, int64_t channels, const float *mean, const float *variance,
                               const float *gamma, float eps, const float *means) {
    float *f = factors(width, 3);
    for (int64_t i = 0; i < width; i++) {
        int64_t c = i % channels;
        float r = 1.0f / sqrtf(variance[c] + eps), slope = -gamma[c] * r * r * means[channels + c];
        f[i] = gamma[c] * r;
        f[width + i] = slope;
        f[2 * width + i] = -f[i] * means[c] - slope * mean[c];
    }
    return f;
}

/* y = gamma (x - mean) / sqrt(variance + eps) + beta, or its swish. */
void batch_norm_forward(const float *x, int64_t rows, int64_t channels, const float *mean, const float *variance,
                        const float *gamma, const float *beta, float eps, int64_t swish, float *y) {
    shape s = tiled(rows, channels);
    float *f = forward_factors(s.width, channels, mean, variance, gamma, beta, eps);
#pragma omp parallel if (rows * channels > WORTH_A_THREAD)
    {
        int64_t first, last;
        first_and_last(s.rows, &first, &last);
        for (int64_t row = first; row < last; row++)
            for (int64_t c = 0, i = row * s.width; c < s.width; c += LANES, i += LANES) {
                vec z = load(x + i) * load(f + c) + load(f + s.width + c);
                store(y + i, swish ? z * sigmoid(z) : z);
            }
    }
    free(f);
}

/* The gradient with respect to z, from that with respect to y = z or swish(z). */
static inline vec gradient_of_z(vec dy, vec z, int64_t swish) {
    if (!swish) return dy;
    vec s = sigmoid(z);
    return dy * (s + z * s * (1.0f - s));
}

/* Sums of dz and of dz x_hat over the threads and tiled rows: [threads][2][width] -> [2][channels]. Frees them. */
static void join_sums(double *sums, int threads, int64_t width, int64_t channels, float *d_beta_and_gamma) {
    for (int64_t c = 0; c < channels; c++) {
        double a = 0, p = 0;
        for (int t = 0; t < threads; t++)
            for (int64_t i = c; i < width; i += channels) {
                a += sums[2 * t * width + i];
                p += sums[(2 * t + 1) * width + i];
            }
        d_beta_and_gamma[c] = a;
        d_beta_and_gamma[channels + c] = p;
    }
    free(sums);
}

static inline void add_to_sums(double *of_dz, double *of_product, vec dz, vec product) {
    *(dvec_unaligned *)of_dz += __builtin_convertvector(dz, dvec);
    *(dvec_unaligned *)of_product += __builtin_convertvector(product, dvec);
}

/* Sums over the rows: those of dz are beta's gradient, those of dz x_hat gamma's. With swish dz is kept in `dz`. */
void batch_norm_backward_sums(const float *x, const float *dy, int64_t rows, int64_t channels, const float *mean,
                              const float *variance, const float *gamma, const float *beta, float eps, int64_t swish,
                              float *dz, float *d_beta_and_gamma) {
    shape s = tiled(rows, channels);
    float *f = backward_factors(s.width, channels, mean, variance, gamma, beta, eps);
    int threads = omp_get_max_threads();
    double *sums = calloc(2 * threads * s.width, sizeof(double));
#pragma omp parallel num_threads(threads) if (rows * channels > WORTH_A_THREAD)
    {
        double *of_dz = sums + 2 * s.width * omp_get_thread_num(), *of_product = of_dz + s.width;
        int64_t first, last;
        first_and_last(s.rows, &first, &last);
        for (int64_t row = first, step = block(s.width); row < last; row += step) {
            int64_t n = last - row < step ? last - row : step;
            for (int64_t c = 0; c < s.width; c += LANES) {
                vec r = load(f + c), shift = load(f + s.width + c), g = load(f + 2 * s.width + c);
                vec b = load(f + 3 * s.width + c), a = {0}, p = {0};
                for (int64_t i = row * s.width + c, end = i + n * s.width; i < end; i += s.width) {
                    vec x_hat = load(x + i) * r + shift, d = gradient_of_z(load(dy + i), g * x_hat + b, swish);
                    if (swish) store(dz + i, d);
                    a += d;
                    p += d * x_hat;
                }
                add_to_sums(of_dz + c, of_product + c, a, p);
            }
        }
    }
    join_sums(sums, threads, s.width, channels, d_beta_and_gamma);
    free(f);
}

/* The gradient with respect to x. `dx` may be `dz`. */
void batch_norm_backward(const float *x, const float *dz, int64_t rows, int64_t channels, const float *mean,
                         const float *variance, const float *gamma, float eps, const float *means, float *dx) {
    shape s = tiled(rows, channels);
    float *f = gradient_factors(s.width, channels, mean, variance, gamma, eps, means);
#pragma omp parallel if (rows * channels > WORTH_A_THREAD)
    {
        int64_t first, last;
        first_and_last(s.rows, &first, &last);
        for (int64_t row = first; row < last; row++)
            for (int64_t c = 0, i = row * s.width; c < s.width; c += LANES, i += LANES)
                store(dx + i, load(dz + i) * load(f + c) + load(x + i) * load(f + s.width + c) +
                                  load(f + 2 * s.width + c));
    }
    free(f);
}

/* running <- (1 - momentum) running + momentum (mean, n / (n - 1) variance). */
void track(const float *mean, const float *variance, int64_t channels, float n, float momentum, float *running_mean,
           float *running_variance) {
    for (int64_t c = 0; c < channels; c++) {
        running_mean[c] += momentum * (mean[c] - running_mean[c]);
        running_variance[c] += momentum * (variance[c] * (n / (n - 1)) - running_variance[c]);
    }
}

/* ---- products of matrices ----------------------------------------------------------------------------------------- */

enum { ROWS = 4, VECTORS = LANES == 16 ? 2 : 3, PANEL = VECTORS * LANES }; /* of a tile that stays in registers */

/* c[m, n] (+)= sum over k of a(m, k) b[k, n] for some rows and vectors; a's strides are a_m and a_k. */
static inline __attribute__((always_inline)) void tile(const int rows, const int vectors, const float *a, int64_t a_m,
                                                       int64_t a_k, const float *b, int64_t b_k, int64_t depth,
                                                       float *c, layout l, int add) {
    vec sums[2 * ROWS][VECTORS];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[m][v] = add ? load(c + m * l.row + v * l.vector) : all(0);
    for (int64_t k = 0; k < depth; k++, a += a_k, b += b_k) {
        vec row[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) row[v] = load(b + v * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            vec left = all(a[m * a_m]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sums[m][v] += left * row[v];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) store(c + m * l.row + v * l.vector, sums[m][v]);
}

/* The same for `rows` rows, a multiple of 4, and one panel of b: up to PANEL columns, a multiple of the lanes. */
static void panel(int64_t columns, int64_t rows, const float *a, int64_t a_m, int64_t a_k, const float *b, int64_t b_k,
                  int64_t depth, float *c, layout l, int add) {
    int64_t vectors = columns / LANES, m = 0;
    if (vectors == 1)
        for (; m + 2 * ROWS <= rows; m += 2 * ROWS)
            tile(2 * ROWS, 1, a + m * a_m, a_m, a_k, b, b_k, depth, c + m * l.row, l, add);
    else if (LANES == 16)
        for (; m + 2 * ROWS <= rows; m += 2 * ROWS)
            tile(2 * ROWS, 2, a + m * a_m, a_m, a_k, b, b_k, depth, c + m * l.row, l, add);
    for (; m < rows; m += ROWS)
        if (vectors == 1)
            tile(ROWS, 1, a + m * a_m, a_m, a_k, b, b_k, depth, c + m * l.row, l, add);
        else if (vectors == 2)
            tile(ROWS, 2, a + m * a_m, a_m, a_k, b, b_k, depth, c + m * l.row, l, add);
        else
            tile(ROWS, VECTORS, a + m * a_m, a_m, a_k, b, b_k, depth, c + m * l.row, l, add);
}

static inline int64_t columns_from(int64_t n, int64_t width) { return width - n < PANEL ? width - n : PANEL; }

/* b[k, n] = from[k * of_k + n * of_n], its panels one after the other. */
static float *packed(const float *from, int64_t of_k, int64_t of_n, int64_t depth, int64_t width) {
    float *b = factors(width, depth), *to = b;
    for (int64_t n = 0; n < width; n += PANEL)
        for (int64_t k = 0; k < depth; k++)
            for (int64_t i = n, end = n + columns_from(n, width); i < end; i++) *to++ = from[k * of_k + i * of_n];
    return b;
}

/* c[m, n] = sum over k of a[m, k] b[k, n] with a packed b. */
static void product(int64_t rows, const float *a, const float *b, int64_t depth, int64_t width, float *c, layout l) {
    for (int64_t n = 0; n < width; n += PANEL, b += depth * PANEL, c += VECTORS * l.vector)
        panel(columns_from(n, width), rows, a, depth, 1, b, columns_from(n, width), depth, c, l, 0);
}

/* c[m, n] += sum over k of a[k, m] b[k, n]. */
static void add_product(int64_t rows, const float *a, const float *b, int64_t depth, int64_t width, float *c) {
    for (int64_t n = 0; n < width; n += PANEL)
        panel(columns_from(n, width), rows, a, 1, rows, b + n, width, depth, c + n, (layout){width, LANES}, 1);
}

/* ---- 3x3 convolution, zero padding 1 ------------------------------------------------------------------------------ */

/* Winograd's algorithm F(2x2, 3x3) (Lavin, Gray, arXiv 1509.09308): a tile of 2x2 results needs 16 products instead of 36.
 * y = A^T [(G g G^T) * (B^T d B)] A for a filter g and the 4x4 pixels d that it meets; the products, summed over the
 * channels of the input, are 16 products of matrices [tiles, K] [K, N]. Sides of the maps are even. */
enum { POINTS = 16 };

/* B^T d B of 16 pixels. */
static inline void transform_input(vec v[POINTS]) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        vec d0 = v[j], d1 = v[4 + j], d2 = v[8 + j], d3 = v[12 + j];
        v[j] = d0 - d2, v[4 + j] = d1 + d2, v[8 + j] = d2 - d1, v[12 + j] = d1 - d3;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        vec d0 = v[i], d1 = v[i + 1], d2 = v[i + 2], d3 = v[i + 3];
        v[i] = d0 - d2, v[i + 1] = d1 + d2, v[i + 2] = d2 - d1, v[i + 3] = d1 - d3;
    }
}

/* A^T m A, 2x2, of the 16 sums of products. */
static inline void transform_output(const vec m[POINTS], vec y[4]) {
    vec s[8];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        s[j] = m[j] + m[4 + j] + m[8 + j];
        s[4 + j] = m[4 + j] - m[8 + j] - m[12 + j];
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        y[2 * i] = s[4 * i] + s[4 * i + 1] + s[4 * i + 2];
        y[2 * i + 1] = s[4 * i + 1] - s[4 * i + 2] - s[4 * i + 3];
    }
}

/* A dy A^T, the gradient with respect to the 16 sums. */
static inline void transform_gradient(const vec dy[4], vec m[POINTS]) {
    vec s[8] = {dy[0], dy[1], dy[0] + dy[2], dy[1] + dy[3], dy[0] - dy[2], dy[1] - dy[3], -dy[2], -dy[3]};
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        m[4 * i] = s[2 * i];
        m[4 * i + 1] = s[2 * i] + s[2 * i + 1];
        m[4 * i + 2] = s[2 * i] - s[2 * i + 1];
        m[4 * i + 3] = -s[2 * i + 1];
    }
}

/* G g G^T of 9 taps. */
static inline void transform_filter(const vec g[9], vec u[POINTS]) {
    vec s[12];
#pragma GCC unroll 3
    for (int j = 0; j < 3; j++) {
        vec sum = 0.5f * (g[j] + g[6 + j]), half = 0.5f * g[3 + j];
        s[j] = g[j], s[3 + j] = sum + half, s[6 + j] = sum - half, s[9 + j] = g[6 + j];
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        vec sum = 0.5f * (s[3 * i] + s[3 * i + 2]), half = 0.5f * s[3 * i + 1];
        u[4 * i] = s[3 * i], u[4 * i + 1] = sum + half, u[4 * i + 2] = sum - half, u[4 * i + 3] = s[3 * i + 2];
    }
}

/* G^T du G, the gradient with respect to the filter. */
static inline void transform_filter_gradient(const vec u[POINTS], vec g[9]) {
    vec s[12];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        vec sum = 0.5f * (u[4 + j] + u[8 + j]);
        s[j] = u[j] + sum, s[4 + j] = 0.5f * (u[4 + j] - u[8 + j]), s[8 + j] = sum + u[12 + j];
    }
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++) {
        vec sum = 0.5f * (s[4 * i + 1] + s[4 * i + 2]);
        g[3 * i] = s[4 * i] + sum, g[3 * i + 1] = 0.5f * (s[4 * i + 1] - s[4 * i + 2]), g[3 * i + 2] = sum + s[4 * i + 3];
    }
}

/* Tiles that are worked on at once, a multiple of 4: their numbers stay in the second cache. */
static int64_t tiles_at_once(int64_t channels) {
    int64_t tiles = 4096 / channels / ROWS * ROWS;
    return tiles < 8 ? 8 : tiles > 64 ? 64 : tiles;
}

/* The transformed 4x4 pixels of tiles first .. first + count, [POINTS][count][k]. */
static void input_of_tiles(const float *x, int64_t height, int64_t width, int64_t k, int64_t first, int64_t count,
                           float *v) {
    static const vec zero;
    for (int64_t tile = 0; tile < count; tile++) {
        int64_t across = width / 2, down = first + tile, column = down % across * 2 - 1;
        down /= across;
        int64_t row = down % (height / 2) * 2 - 1, image = down / (height / 2);
        for (int64_t c = 0; c < k; c += LANES) {
            vec d[POINTS];
#pragma GCC unroll 16
            for (int p = 0; p < POINTS; p++) {
                int64_t i = row + p / 4, j = column + p % 4;
                int inside = i >= 0 && i < height && j >= 0 && j < width;
                d[p] = inside ? load(x + ((image * height + i) * width + j) * k + c) : zero;
            }
            transform_input(d);
#pragma GCC unroll 16
            for (int p = 0; p < POINTS; p++) store(v + (p * count + tile) * k + c, d[p]);
        }
    }
}

/* The first of the four results of a tile; the others are next to it and in the next row. */
static inline int64_t result_of_tile(int64_t tile, int64_t width, int64_t n) {
    int64_t across = width / 2;
    return (tile / across * 2 * width + tile % across * 2) * n;
}

/* y [B, H, W, N] = x [B, H, W, K] convolved with weight [N, 3, 3, K], plus the bias if there is one. With `gradient` x is
 * the gradient with respect to the result of a convolution with weight [K, 3, 3, N], and y that to its input. */
void convolution(const float *x, int64_t batch, int64_t height, int64_t width, int64_t k, int64_t n,
                 const float *weight, const float *bias, int64_t gradient, float *y) {
    float *filters = factors(k * n, POINTS);
    int64_t tiles = batch * height * width / 4, step = tiles_at_once(k + n);
#pragma omp parallel
    {
        int64_t first, last;
        first_and_last(gradient ? k : n, &first, &last);
        for (int64_t outer = first; outer < last; outer++)
            for (int64_t inner = 0; inner < (gradient ? n : k); inner += LANES) {
                vec g[9], u[POINTS];
#pragma GCC unroll 9
                for (int t = 0; t < 9; t++)
                    g[t] = load(weight + (outer * 9 + (gradient ? 8 - t : t)) * (gradient ? n : k) + inner);
                transform_filter(g, u);
                int64_t column = gradient ? inner : outer, start = column / PANEL * PANEL;
                int64_t columns = columns_from(start, n);
                float *to = filters + start * k + column - start;
                for (int p = 0; p < POINTS; p++, to += k * n)
                    if (gradient)
                        store(to + outer * columns, u[p]);
                    else
                        for (int l = 0; l < LANES; l++) to[(inner + l) * columns] = u[p][l];
            }
#pragma omp barrier
        float *v = scratch(POINTS * step * (k + n)), *m = v + POINTS * step * k;
        first_and_last(tiles / ROWS, &first, &last);
        for (int64_t tile = first * ROWS, count; tile < last * ROWS; tile += count) {
            count = last * ROWS - tile < step ? last * ROWS - tile : step;
            input_of_tiles(x, height, width, k, tile, count, v);
            for (int p = 0; p < POINTS; p++)
                product(count, v + p * count * k, filters + p * k * n, k, n, m + p * count * n, (layout){n, LANES});
            for (int64_t i = 0; i < count; i++) {
                float *to = y + result_of_tile(tile + i, width, n);
                for (int64_t c = 0; c < n; c += LANES) {
                    vec sums[POINTS], results[4];
#pragma GCC unroll 16
                    for (int p = 0; p < POINTS; p++) sums[p] = load(m + (p * count + i) * n + c);
                    transform_output(sums, results);
#pragma GCC unroll 4
                    for (int q = 0; q < 4; q++)
                        store(to + (q / 2 * width + q % 2) * n + c, bias ? results[q] + load(bias + c) : results[q]);
                }
            }
        }
    }
    free(filters);
}

/* The gradients with respect to weight [N, 3, 3, K] and bias [N]. */
void convolution_weight_gradient(const float *x, const float *dy, int64_t batch, int64_t height, int64_t width,
                                 int64_t k, int64_t n, float *d_weight, float *d_bias) {
    int threads = omp_get_max_threads();
    int64_t tiles = batch * height * width / 4, step = tiles_at_once(k + n), size = (POINTS * k + 1) * n;
    float *sums = factors(size, threads);
#pragma omp parallel num_threads(threads)
    {
        int64_t first, last;
        float *v = scratch(POINTS * step * (k + n)), *m = v + POINTS * step * k;
        float *mine = sums + omp_get_thread_num() * size, *of_bias = mine + POINTS * k * n;
        memset(mine, 0, sizeof(float) * size);
        first_and_last(tiles / ROWS, &first, &last);
        for (int64_t tile = first * ROWS, count; tile < last * ROWS; tile += count) {
            count = last * ROWS - tile < step ? last * ROWS - tile : step;
            input_of_tiles(x, height, width, k, tile, count, v);
            for (int64_t c = 0; c < n; c += LANES) {
                vec total = {0};
                for (int64_t i = 0; i < count; i++) {
                    const float *from = dy + result_of_tile(tile + i, width, n) + c;
                    vec g[4] = {load(from), load(from + n), load(from + width * n), load(from + width * n + n)};
                    vec of_sums[POINTS];
                    total += (g[0] + g[1]) + (g[2] + g[3]);
                    transform_gradient(g, of_sums);
#pragma GCC unroll 16
                    for (int p = 0; p < POINTS; p++) store(m + (p * count + i) * n + c, of_sums[p]);
                }
                store(of_bias + c, load(of_bias + c) + total);
            }
            for (int p = 0; p < POINTS; p++)
                add_product(n, m + p * count * n, v + p * count * k, count, k, mine + p * k * n);
        }
#pragma omp barrier
        first_and_last(n, &first, &last);
        for (int64_t c = first; c < last; c++)
            for (int64_t i = 0; i < k; i += LANES) {
                vec u[POINTS], g[9];
#pragma GCC unroll 16
                for (int p = 0; p < POINTS; p++) {
                    u[p] = all(0);
                    for (int t = 0; t < threads; t++) u[p] += load(sums + t * size + (p * n + c) * k + i);
                }
                transform_filter_gradient(u, g);
#pragma GCC unroll 9
                for (int t = 0; t < 9; t++) store(d_weight + (c * 9 + t) * k + i, g[t]);
            }
    }
    for (int64_t c = 0; c < n; c++) {
        d_bias[c] = 0;
        for (int t = 0; t < threads; t++) d_bias[c] += sums[t * size + POINTS * k * n + c];
    }
    free(sums);
}

/* ---- batch norm, perhaps swish, then a linear operation; statistics of the result for the next batch norm ---------- */

/* The wide maps between these operations, and their gradients, are not channels-last: an image has the pixels of its
 * first vector of channels, then those of the second, and so on. The depthwise convolution so reads and writes memory
 * in order. */
static layout layout_of(int64_t pixels, int64_t channels, int wide) {
    return wide ? (layout){LANES, pixels * LANES} : (layout){channels, LANES};
}

/* A part of the pixels of an image, which are worked on at once: their numbers stay in the second cache. */
typedef struct {
    int64_t pixels, step, count; /* of an image, of a part, of all images' parts */
} parts;

static parts parts_of(int64_t batch, int64_t pixels, int64_t channels) {
    int64_t step = 32768 / channels / ROWS * ROWS;
    step = step < 16 ? 16 : step > 64 ? 64 : step;
    step = step < pixels ? step : pixels;
    return (parts){pixels, step, batch * ((pixels + step - 1) / step)};
}

/* The image, the first pixel and the number of pixels of a part. */
static int64_t part_of(parts p, int64_t part, int64_t *image, int64_t *pixel) {
    int64_t of_image = (p.pixels + p.step - 1) / p.step;
    *image = part / of_image;
    *pixel = part % of_image * p.step;
    return p.pixels - *pixel < p.step ? p.pixels - *pixel : p.step;
}

/* y [pixels, N] = weight [N, K] times a, a = z or swish(z) of the normalized x [pixels, K]; and the statistics of y. Of x
 * and y the one with more channels is wide, x if `project`, which also has swish. */
void pointwise_forward(const float *x, int64_t batch, int64_t pixels, int64_t k, int64_t n, const float *mean,
                       const float *variance, const float *gamma, const float *beta, float eps, int64_t project,
                       const float *weight, float *y, float *y_mean, float *y_variance) {
    float *f = forward_factors(k, k, mean, variance, gamma, beta, eps), *b = packed(weight, 1, k, k, n);
    layout of_x = layout_of(pixels, k, project), of_y = layout_of(pixels, n, !project);
    parts p = parts_of(batch, pixels, k + n);
    int threads = omp_get_max_threads();
    double *statistics = new_statistics(threads, n);
#pragma omp parallel num_threads(threads) if (batch * pixels * k * n > 16 * WORTH_A_THREAD)
    {
        int64_t first, last, image, pixel, count = 0;
        first_and_last(p.count, &first, &last);
        float *a = scratch(p.step * k);
        for (int64_t part = first; part < last; part++) {
            int64_t size = part_of(p, part, &image, &pixel);
            const float *from = x + image * pixels * k + pixel * of_x.row;
            float *to = y + image * pixels * n + pixel * of_y.row;
            for (int64_t c = 0; c < k; c += LANES, from += of_x.vector) {
                vec scale = load(f + c), shift = load(f + k + c);
                for (int64_t i = 0; i < size; i++) {
                    vec z = load(from + i * of_x.row) * scale + shift;
                    store(a + i * k + c, project ? z * sigmoid(z) : z);
                }
            }
            product(size, a, b, k, n, to, of_y);
            add_to_statistics(to, size, of_y, 0, n, n, count, statistics);
            count += size;
        }
        set_count(count, n, statistics);
    }
    join_statistics(statistics, threads, n, n, y_mean, y_variance);
    free(f);
    free(b);
}

/* From dz_out, the gradient with respect to the normalized y, with its means [2, N] over the whole batch: dz, that with
 * respect to the normalized x (before swish); the sums of dz and of dz x_hat [2, K]; and the weight's gradient. */
void pointwise_backward(const float *x, int64_t batch, int64_t pixels, int64_t k, int64_t n, const float *mean,
                        const float *variance, const float *gamma, const float *beta, float eps, int64_t project,
                        const float *weight, const float *y, const float *dz_out, const float *y_mean,
                        const float *y_variance, const float *y_gamma, const float *means, float *dz,
                        float *d_beta_and_gamma, float *d_weight) {
    float *f = backward_factors(k, k, mean, variance, gamma, beta, eps), *b = packed(weight, k, 1, n, k);
    float *g = gradient_factors(n, n, y_mean, y_variance, y_gamma, eps, means);
    layout of_x = layout_of(pixels, k, project), of_y = layout_of(pixels, n, !project);
    parts p = parts_of(batch, pixels, 2 * k + n);
    int threads = omp_get_max_threads();
    double *sums = calloc(2 * threads * k, sizeof(double));
    float *d_weights = calloc(threads * n * k, sizeof(float));
#pragma omp parallel num_threads(threads) if (batch * pixels * k * n > 16 * WORTH_A_THREAD)
    {
        int64_t first, last, image, pixel;
        first_and_last(p.count, &first, &last);
        float *a = scratch(p.step * (2 * k + n)), *slope = a + p.step * k, *dy = slope + p.step * k;
        float *my_d_weight = d_weights + omp_get_thread_num() * n * k;
        double *of_dz = sums + 2 * k * omp_get_thread_num(), *of_product = of_dz + k;
        for (int64_t part = first; part < last; part++) {
            int64_t size = part_of(p, part, &image, &pixel);
            int64_t from_x = image * pixels * k + pixel * of_x.row, from_y = image * pixels * n + pixel * of_y.row;
            for (int64_t c = 0, at = from_y; c < n; c += LANES, at += of_y.vector)
                for (int64_t i = 0; i < size; i++)
                    store(dy + i * n + c, load(dz_out + at + i * of_y.row) * load(g + c) +
                                              load(y + at + i * of_y.row) * load(g + n + c) + load(g + 2 * n + c));
            for (int64_t c = 0, at = from_x; c < k; c += LANES, at += of_x.vector)
                for (int64_t i = 0; i < size; i++) {
                    vec x_hat = load(x + at + i * of_x.row) * load(f + c) + load(f + k + c);
                    vec z = x_hat * load(f + 2 * k + c) + load(f + 3 * k + c);
                    if (project) {
                        vec s = sigmoid(z);
                        store(slope + i * k + c, s + z * s * (1.0f - s));
                        z *= s;
                    }
                    store(a + i * k + c, z);
                }
            add_product(n, dy, a, size, k, my_d_weight);
            product(size, dy, b, n, k, dz + from_x, of_x);
            for (int64_t c = 0, at = from_x; c < k; c += LANES, at += of_x.vector) {
                vec total = {0}, products = {0};
                for (int64_t i = 0; i < size; i++) {
                    vec d = load(dz + at + i * of_x.row);
                    if (project) store(dz + at + i * of_x.row, d *= load(slope + i * k + c));
                    total += d;
                    products += d * (load(x + at + i * of_x.row) * load(f + c) + load(f + k + c));
                }
                add_to_sums(of_dz + c, of_product + c, total, products);
            }
        }
    }
    join_sums(sums, threads, k, k, d_beta_and_gamma);
    for (int64_t i = 0; i < n * k; i++) {
        d_weight[i] = 0;
        for (int t = 0; t < threads; t++) d_weight[i] += d_weights[t * n * k + i];
    }
    free(d_weights);
    free(f);
    free(g);
    free(b);
}

/* A depthwise 5x5 convolution with zero padding. Of a map whose pixels are repeated first (`up`) the four quarters of the
 * result, those at even and odd rows and columns, are 3x3 convolutions of the small map, whose taps are sums of the 25.
 * The work is done on one vector of channels of an image at a time: on planes with a border of zeros. */
enum { TAPS = 25, ACROSS = 8 }; /* ACROSS: pixels of a row whose sums stay in registers */

typedef struct {
    int k, quarters;                /* 5 and 1, or 3 and 4 */
    int64_t height, width, stride;  /* of the small map; vectors between the rows of a plane */
    int64_t plane;                  /* vectors of a plane */
} depthwise;

static inline depthwise depthwise_of(int64_t height, int64_t width, int64_t up) {
    int k = up ? 3 : 5;
    int64_t stride = (width + ACROSS - 1) / ACROSS * ACROSS + k - 1;
    return (depthwise){k, up ? 4 : 1, height, width, stride, (height + k - 1) * stride};
}

/* The tap of a quarter's filter that a tap of the 5x5 filter belongs to. */
static inline int tap_of(depthwise d, int quarter, int tap) {
    if (d.k == 5) return tap;
    int row = tap / 5 + quarter / 2, column = tap % 5 + quarter % 2; /* 0 .. 5, of pixels -2 .. 3 of the large map */
    return row / 2 * 3 + column / 2;
}

/* The quarters' filters, [C / lanes][quarters][k k] vectors, from weight [C, 25]; `flipped` for the gradient. */
static vec *filters(depthwise d, const float *weight, int64_t channels, int flipped) {
    int size = d.k * d.k;
    float *taps = factors(channels, d.quarters * size);
    memset(taps, 0, sizeof(float) * channels * d.quarters * size);
    for (int64_t c = 0; c < channels; c++)
        for (int q = 0; q < d.quarters; q++)
            for (int i = 0; i < TAPS; i++) {
                int to = flipped ? size - 1 - tap_of(d, q, i) : tap_of(d, q, i);
                taps[((c / LANES * d.quarters + q) * size + to) * LANES + c % LANES] += weight[c * TAPS + i];
            }
    return (vec *)taps;
}

/* Adds to the sums of 8 pixels in a row what the k x k filter gives there. */
static inline __attribute__((always_inline)) void correlate(const int k, const vec *x, int64_t stride, const vec *taps,
                                                            vec sums[ACROSS]) {
    for (int i = 0; i < k; i++, x += stride, taps += k) {
        vec w[5];
#pragma GCC unroll 5
        for (int j = 0; j < k; j++) w[j] = taps[j];
#pragma GCC unroll 12
        for (int t = 0; t < ACROSS + k - 1; t++) {
            vec value = x[t];
#pragma GCC unroll 5
            for (int j = 0; j < k; j++)
                if (t - j >= 0 && t - j < ACROSS) sums[t - j] += value * w[j];
        }
    }
}

static inline void correlate_row(depthwise d, const vec *x, const vec *taps, vec sums[ACROSS]) {
    if (d.k == 5)
        correlate(5, x, d.stride, taps, sums);
    else
        correlate(3, x, d.stride, taps, sums);
}

/* sums[i, j] += sum over the pixels of dy times the pixel of x under tap (i, j), for `count` rows of taps from i. */
static inline __attribute__((always_inline)) void correlate_planes(const int k, const int i, const int count,
                                                                   depthwise d, const vec *x, const vec *dy,
                                                                   vec *sums) {
    vec s[10];
#pragma GCC unroll 10
    for (int t = 0; t < count * k; t++) s[t] = all(0);
    for (int64_t row = 0; row < d.height; row++) {
        const vec *g = dy + (row + k / 2) * d.stride + k / 2, *p = x + (row + i) * d.stride;
        for (int64_t column = 0; column < d.width; column++) {
            vec value = g[column];
#pragma GCC unroll 10
            for (int t = 0; t < count * k; t++) s[t] += value * p[t / k * d.stride + column + t % k];
        }
    }
#pragma GCC unroll 10
    for (int t = 0; t < count * k; t++) sums[i * k + t] += s[t];
}

/* Where, among the pixels of the result, the first one of a quarter is that belongs to a pixel of the small map. */
static inline int64_t pixel_of(depthwise d, int64_t row, int64_t column, int quarter) {
    if (d.quarters == 1) return row * d.width + column;
    return (2 * row + quarter / 2) * 2 * d.width + 2 * column + quarter % 2;
}

/* y = the depthwise convolution of swish(z), z the normalized x; and the statistics of y, which has twice as many rows
 * and columns if `up`. Both are wide maps. */
void depthwise_forward(const float *x, int64_t batch, int64_t height, int64_t width, int64_t channels,
                       const float *mean, const float *variance, const float *gamma, const float *beta, float eps,
                       const float *weight, int64_t up, float *y, float *y_mean, float *y_variance) {
    depthwise d = depthwise_of(height, width, up);
    float *f = forward_factors(channels, channels, mean, variance, gamma, beta, eps);
    vec *taps = filters(d, weight, channels, 0);
    int threads = omp_get_max_threads();
    double *statistics = new_statistics(threads, channels);
    int64_t pixels = height * width * d.quarters;
#pragma omp parallel num_threads(threads)
    {
        vec *plane = (vec *)scratch(d.plane * LANES);
        memset(plane, 0, sizeof(vec) * d.plane);
        int64_t first, last;
        first_and_last(batch, &first, &last);
        for (int64_t image = first; image < last; image++)
            for (int64_t c = 0; c < channels; c += LANES) {
                vec scale = load(f + c), shift = load(f + channels + c);
                const float *from = x + (image * channels + c) * height * width;
                float *out = y + (image * channels + c) * pixels;
                for (int64_t row = 0; row < height; row++) {
                    vec *to = plane + (row + d.k / 2) * d.stride + d.k / 2;
                    for (int64_t column = 0; column < width; column++, from += LANES) {
                        vec z = load(from) * scale + shift;
                        to[column] = z * sigmoid(z);
                    }
                }
                for (int64_t row = 0; row < height; row++)
                    for (int q = 0; q < d.quarters; q++)
                        for (int64_t column = 0; column < width; column += ACROSS) {
                            vec sums[ACROSS] = {{0}};
                            const vec *of_quarter = taps + (c / LANES * d.quarters + q) * d.k * d.k;
                            correlate_row(d, plane + row * d.stride + column, of_quarter, sums);
#pragma GCC unroll 8
                            for (int t = 0; t < ACROSS; t++)
                                if (column + t < width) store(out + pixel_of(d, row, column + t, q) * LANES, sums[t]);
                        }
                add_to_statistics(out, pixels, (layout){LANES, 0}, c, LANES, channels, (image - first) * pixels,
                                  statistics);
            }
        set_count((last - first) * pixels, channels, statistics);
    }
    join_statistics(statistics, threads, channels, channels, y_mean, y_variance);
    free(f);
    free(taps);
}

/* What pointwise_backward gives for it. */
void depthwise_backward(const float *x, int64_t batch, int64_t height, int64_t width, int64_t channels,
                        const float *mean, const float *variance, const float *gamma, const float *beta, float eps,
                        const float *weight, int64_t up, const float *y, const float *dz_out, const float *y_mean,
                        const float *y_variance, const float *y_gamma, const float *means, float *dz,
                        float *d_beta_and_gamma, float *d_weight) {
    depthwise d = depthwise_of(height, width, up);
    float *f = backward_factors(channels, channels, mean, variance, gamma, beta, eps);
    float *g = gradient_factors(channels, channels, y_mean, y_variance, y_gamma, eps, means);
    vec *taps = filters(d, weight, channels, 1);
    int threads = omp_get_max_threads(), size = d.k * d.k;
    double *sums = calloc(2 * threads * channels, sizeof(double));
    int64_t of_thread = channels * d.quarters * size;
    float *d_taps = factors(of_thread, threads);
    memset(d_taps, 0, sizeof(float) * of_thread * threads);
#pragma omp parallel num_threads(threads)
    {
        int64_t planes = 1 + d.quarters, first, last;
        vec *plane = (vec *)scratch((planes * d.plane + height * width) * LANES), *slopes = plane + planes * d.plane;
        memset(plane, 0, sizeof(vec) * planes * d.plane);
        double *of_dz = sums + 2 * channels * omp_get_thread_num(), *of_product = of_dz + channels;
        first_and_last(batch, &first, &last);
        for (int64_t image = first; image < last; image++)
            for (int64_t c = 0; c < channels; c += LANES) {
                vec r = load(f + c), shift = load(f + channels + c), scale = load(f + 2 * channels + c);
                vec beta_of = load(f + 3 * channels + c), g0 = load(g + c), g1 = load(g + channels + c);
                vec g2 = load(g + 2 * channels + c);
                int64_t small = (image * channels + c) * height * width, large = small * d.quarters;
                for (int64_t row = 0; row < height; row++)
                    for (int64_t column = 0; column < width; column++) {
                        int64_t at = (row + d.k / 2) * d.stride + column + d.k / 2, i = row * width + column;
                        vec z = (load(x + small + i * LANES) * r + shift) * scale + beta_of, s = sigmoid(z);
                        plane[at] = z * s;
                        slopes[i] = s + z * s * (1.0f - s);
                        for (int q = 0; q < d.quarters; q++) {
                            int64_t out = large + pixel_of(d, row, column, q) * LANES;
                            plane[(1 + q) * d.plane + at] = load(dz_out + out) * g0 + load(y + out) * g1 + g2;
                        }
                    }
                for (int q = 0; q < d.quarters; q++) {
                    const vec *dy = plane + (1 + q) * d.plane;
                    vec *to = (vec *)(d_taps + of_thread * omp_get_thread_num()) + (c / LANES * d.quarters + q) * size;
                    if (d.k == 5) {
                        correlate_planes(5, 0, 2, d, plane, dy, to);
                        correlate_planes(5, 2, 2, d, plane, dy, to);
                        correlate_planes(5, 4, 1, d, plane, dy, to);
                    } else
                        correlate_planes(3, 0, 3, d, plane, dy, to);
                }
                for (int64_t row = 0; row < height; row++) {
                    vec total = {0}, products = {0};
                    for (int64_t column = 0; column < width; column += ACROSS) {
                        vec s[ACROSS] = {{0}};
                        for (int q = 0; q < d.quarters; q++)
                            correlate_row(d, plane + (1 + q) * d.plane + row * d.stride + column,
                                          taps + (c / LANES * d.quarters + q) * size, s);
#pragma GCC unroll 8
                        for (int t = 0; t < ACROSS; t++) {
                            if (column + t >= width) continue;
                            int64_t i = row * width + column + t;
                            vec one = s[t] * slopes[i];
                            store(dz + small + i * LANES, one);
                            total += one;
                            products += one * (load(x + small + i * LANES) * r + shift);
                        }
                    }
                    add_to_sums(of_dz + c, of_product + c, total, products);
                }
            }
    }
    join_sums(sums, threads, channels, channels, d_beta_and_gamma);
    for (int64_t c = 0; c < channels; c++)
        for (int i = 0; i < TAPS; i++) {
            double total = 0;
            for (int t = 0; t < threads; t++)
                for (int q = 0; q < d.quarters; q++)
                    total += d_taps[of_thread * t + ((c / LANES * d.quarters + q) * size + tap_of(d, q, i)) * LANES +
                                    c % LANES];
            d_weight[c * TAPS + i] = total;
        }
    free(d_taps);
    free(f);
    free(g);
    free(taps);
}

/* ---- group norm, with swish or without ---------------------------------------------------------------------------- */

/* Sums over each group of channels, in place: every channel of a group gets the sum. */
static void sum_groups(float *values, int64_t channels, int64_t groups) {
    int64_t size = channels / groups;
    for (int64_t first = 0; first < channels; first += size) {
        double total = 0;
        for (int64_t c = first; c < first + size; c++) total += values[c];
        for (int64_t c = first; c < first + size; c++) values[c] = total;
    }
}

/* y = z or swish(z), z = gamma x_hat + beta; x_hat is x, plus the shift [B, C] of its channels if there is one, with mean
 * and standard deviation of each image's groups removed. statistics [B, 2, C] gets these means and 1 / deviations. */
void group_norm_forward(const float *x, const float *shift, int64_t batch, int64_t pixels, int64_t channels,
                        int64_t groups, const float *gamma, const float *beta, float eps, int64_t swish,
                        float *statistics, float *y) {
    float n = pixels * channels / groups;
#pragma omp parallel for schedule(static) if (batch * pixels * channels > WORTH_A_THREAD)
    for (int64_t image = 0; image < batch; image++) {
        const float *from = x + image * pixels * channels;
        float *mean = statistics + image * 2 * channels, *r = mean + channels;
        for (int64_t c = 0; c < channels; c += LANES) {
            vec e = shift ? load(shift + image * channels + c) : all(0), total = {0};
            for (int64_t i = 0; i < pixels; i++) total += load(from + i * channels + c);
            store(mean + c, total + (float)pixels * e);
        }
        sum_groups(mean, channels, groups);
        for (int64_t c = 0; c < channels; c += LANES) {
            vec center = load(mean + c) / n, total = {0};
            vec e = shift ? load(shift + image * channels + c) - center : -center;
            store(mean + c, center);
            for (int64_t i = 0; i < pixels; i++) {
                vec d = load(from + i * channels + c) + e;
                total += d * d;
            }
            store(r + c, total);
        }
        sum_groups(r, channels, groups);
        for (int64_t c = 0; c < channels; c++) r[c] = 1 / sqrtf(r[c] / n + eps);
        for (int64_t c = 0; c < channels; c += LANES) {
            vec scale = load(r + c) * load(gamma + c), base = load(beta + c) - load(mean + c) * scale;
            if (shift) base += load(shift + image * channels + c) * scale;
            for (int64_t i = image * pixels * channels + c, end = i + pixels * channels; i < end; i += channels) {
                vec z = load(x + i) * scale + base;
                store(y + i, swish ? z * sigmoid(z) : z);
            }
        }
    }
}

/* The gradients with respect to x, shift (unless NULL), gamma and beta. */
void group_norm_backward(const float *x, const float *shift, const float *dy, int64_t batch, int64_t pixels,
                         int64_t channels, int64_t groups, const float *gamma, const float *beta, int64_t swish,
                         const float *statistics, float *dx, float *d_shift, float *d_gamma, float *d_beta) {
    int threads = omp_get_max_threads();
    float n = pixels * channels / groups;
    double *sums = calloc(2 * threads * channels, sizeof(double));
    float *both = factors(channels, 2);
#pragma omp parallel num_threads(threads) if (batch * pixels * channels > WORTH_A_THREAD)
    {
        float *a = scratch(2 * channels), *b = a + channels;
        double *of_dz = sums + 2 * channels * omp_get_thread_num(), *of_product = of_dz + channels;
#pragma omp for schedule(static)
        for (int64_t image = 0; image < batch; image++) {
            const float *mean = statistics + image * 2 * channels, *r = mean + channels;
            int64_t first = image * pixels * channels, end = first + pixels * channels;
            for (int64_t c = 0; c < channels; c += LANES) {
                vec g = load(gamma + c), base = load(beta + c), total = {0}, products = {0};
                vec e = (shift ? load(shift + image * channels + c) : all(0)) - load(mean + c);
                for (int64_t i = first + c; i < end; i += channels) {
                    vec x_hat = (load(x + i) + e) * load(r + c);
                    vec dz = gradient_of_z(load(dy + i), g * x_hat + base, swish);
                    store(dx + i, dz);
                    total += dz;
                    products += dz * x_hat;
                }
                add_to_sums(of_dz + c, of_product + c, total, products);
                store(a + c, g * total);
                store(b + c, g * products);
            }
            sum_groups(a, channels, groups);
            sum_groups(b, channels, groups);
            for (int64_t c = 0; c < channels; c += LANES) {
                vec g = load(gamma + c), mean_dz = load(a + c) / n, mean_product = load(b + c) / n, total = {0};
                vec e = (shift ? load(shift + image * channels + c) : all(0)) - load(mean + c);
                for (int64_t i = first + c; i < end; i += channels) {
                    vec x_hat = (load(x + i) + e) * load(r + c);
                    vec d = load(r + c) * (g * load(dx + i) - mean_dz - x_hat * mean_product);
                    store(dx + i, d);
                    total += d;
                }
                if (d_shift) store(d_shift + image * channels + c, total);
            }
        }
    }
    join_sums(sums, threads, channels, channels, both);
    memcpy(d_beta, both, sizeof(float) * channels);
    memcpy(d_gamma, both + channels, sizeof(float) * channels);
    free(both);
}

/* ---- the gated sum of a residual cell ---------------------------------------------------------------------------- */

/* sums[c] = sum over the pixels of an image of x y, or of x where y is NULL. */
static void channel_sums(const float *x, const float *y, int64_t pixels, int64_t channels, float *sums) {
    for (int64_t c = 0; c < channels; c++) sums[c] = 0;
    for (int64_t i = 0; i < pixels * channels; i += channels) {
        int64_t c = 0;
        for (; c + LANES <= channels; c += LANES) {
            vec value = load(x + i + c);
            if (y) value *= load(y + i + c);
            store(sums + c, load(sums + c) + value);
        }
        for (; c < channels; c++) sums[c] += y ? x[i + c] * y[i + c] : x[i + c];
    }
}

/* out = scale x + add, or + add[c] where `each` is 0; the scale is 0.1 gate[c]. */
static void scale_channels(const float *x, const float *gate, const float *add, int each, int64_t pixels,
                           int64_t channels, float *out) {
    for (int64_t i = 0; i < pixels * channels; i += channels) {
        const float *plus = each ? add + i : add;
        int64_t c = 0;
        for (; c + LANES <= channels; c += LANES)
            store(out + i + c, load(x + i + c) * (0.1f * load(gate + c)) + load(plus + c));
        for (; c < channels; c++) out[i + c] = x[i + c] * (0.1f * gate[c]) + plus[c];
    }
}

/* out = skip + 0.1 gate x with gate = sigmoid(W2 relu(W1 mean + b1) + b2) of each image's means; W1 [hidden, C],
 * W2 [C, hidden]. mean and gate [B, C] and hidden activations are kept. */
void gated_sum_forward(const float *skip, const float *x, int64_t batch, int64_t pixels, int64_t channels,
                       int64_t hidden, const float *w1, const float *b1, const float *w2, const float *b2, float *mean,
                       float *activations, float *gate, float *out) {
#pragma omp parallel for schedule(static) if (batch * pixels * channels > WORTH_A_THREAD)
    for (int64_t image = 0; image < batch; image++) {
        float *m = mean + image * channels, *a = activations + image * hidden, *g = gate + image * channels;
        int64_t first = image * pixels * channels;
        channel_sums(x + first, NULL, pixels, channels, m);
        for (int64_t c = 0; c < channels; c++) m[c] /= pixels;
        for (int64_t j = 0; j < hidden; j++) {
            float total = b1[j];
            for (int64_t c = 0; c < channels; c++) total += w1[j * channels + c] * m[c];
            a[j] = total > 0 ? total : total == total ? 0 : total; /* NaN stays NaN */
        }
        for (int64_t c = 0; c < channels; c++) {
            float total = b2[c];
            for (int64_t j = 0; j < hidden; j++) total += w2[c * hidden + j] * a[j];
            g[c] = 1 / (1 + expf(-total));
        }
        scale_channels(x + first, g, skip + first, 1, pixels, channels, out + first);
    }
}

/* The gradients with respect to x and the gate's parameters; that with respect to skip is dy itself. */
void gated_sum_backward(const float *x, const float *dy, int64_t batch, int64_t pixels, int64_t channels,
                        int64_t hidden, const float *w1, const float *w2, const float *mean, const float *activations,
                        const float *gate, float *dx, float *d_w1, float *d_b1, float *d_w2, float *d_b2) {
    float *d_excite = factors(batch, channels + hidden), *d_squeeze = d_excite + batch * channels;
#pragma omp parallel if (batch * pixels * channels > WORTH_A_THREAD)
    {
        float *d_mean = scratch(channels);
#pragma omp for schedule(static)
        for (int64_t image = 0; image < batch; image++) {
            float *of_excite = d_excite + image * channels, *of_squeeze = d_squeeze + image * hidden;
            const float *g = gate + image * channels, *a = activations + image * hidden;
            int64_t first = image * pixels * channels;
            channel_sums(dy + first, x + first, pixels, channels, of_excite);
            for (int64_t c = 0; c < channels; c++) of_excite[c] *= 0.1f * g[c] * (1 - g[c]);
            for (int64_t j = 0; j < hidden; j++) {
                of_squeeze[j] = 0;
                for (int64_t c = 0; c < channels && a[j] > 0; c++) of_squeeze[j] += of_excite[c] * w2[c * hidden + j];
            }
            for (int64_t c = 0; c < channels; c++) {
                d_mean[c] = 0;
                for (int64_t j = 0; j < hidden; j++) d_mean[c] += of_squeeze[j] * w1[j * channels + c];
                d_mean[c] /= pixels;
            }
            scale_channels(dy + first, g, d_mean, 0, pixels, channels, dx + first);
        }
    }
    memset(d_w1, 0, sizeof(float) * hidden * channels);
    memset(d_b1, 0, sizeof(float) * hidden);
    memset(d_w2, 0, sizeof(float) * hidden * channels);
    memset(d_b2, 0, sizeof(float) * channels);
    for (int64_t image = 0; image < batch; image++) {
        const float *m = mean + image * channels, *a = activations + image * hidden;
        const float *of_excite = d_excite + image * channels, *of_squeeze = d_squeeze + image * hidden;
        for (int64_t j = 0; j < hidden; j++) {
            d_b1[j] += of_squeeze[j];
            for (int64_t c = 0; c < channels; c++) d_w1[j * channels + c] += of_squeeze[j] * m[c];
        }
        for (int64_t c = 0; c < channels; c++) {
            d_b2[c] += of_excite[c];
            for (int64_t j = 0; j < hidden; j++) d_w2[c * hidden + j] += of_excite[c] * a[j];
        }
    }
    free(d_excite);
}

/* ---- 3x3 convolution to few channels, zero padding 1 --------------------------------------------------------------- */

/* y [B, H, W, N] = x [B, H, W, K] convolved with weight [N, 3, 3, K], plus bias [N] if there is one. */
void narrow_convolution(const float *x, int64_t batch, int64_t height, int64_t width, int64_t k, int64_t n,
                        const float *weight, const float *bias, float *y) {
#pragma omp parallel for schedule(static)
    for (int64_t line = 0; line < batch * height; line++)
        for (int64_t column = 0, row = line % height; column < width; column++)
            for (int64_t out = 0; out < n; out++) {
                vec sums[3] = {{0}};
                for (int i = -1; i < 2; i++)
                    for (int j = -1; j < 2; j++) {
                        if (row + i < 0 || row + i >= height || column + j < 0 || column + j >= width) continue;
                        const float *from = x + ((line + i) * width + column + j) * k;
                        const float *taps = weight + (out * 9 + (i + 1) * 3 + j + 1) * k;
                        for (int64_t c = 0; c < k; c += LANES) sums[j + 1] += load(from + c) * load(taps + c);
                    }
                y[(line * width + column) * n + out] = total_of(sums[0] + sums[1] + sums[2]) + (bias ? bias[out] : 0);
            }
}

/* The gradients with respect to weight and bias. */
void narrow_convolution_weight_gradient(const float *x, const float *dy, int64_t batch, int64_t height, int64_t width,
                                        int64_t k, int64_t n, float *d_weight, float *d_bias) {
    int threads = omp_get_max_threads();
    int64_t size = n * (9 * k + 1);
    double *sums = calloc(threads * size, sizeof(double));
#pragma omp parallel num_threads(threads)
    {
        double *mine = sums + size * omp_get_thread_num();
#pragma omp for schedule(static)
        for (int64_t line = 0; line < batch * height; line++) /* whose float32 sums are short */
            for (int64_t out = 0, row = line % height; out < n; out++) {
                const float *g = dy + line * width * n + out;
                for (int64_t column = 0; column < width; column++) mine[n * 9 * k + out] += g[column * n];
                for (int i = -1; i < 2; i++) {
                    if (row + i < 0 || row + i >= height) continue;
                    for (int64_t c = 0; c < k; c += LANES) {
                        const float *from = x + (line + i) * width * k + c;
                        double *to = mine + (out * 9 + (i + 1) * 3) * k + c;
                        vec left = {0}, center = {0}, right = {0};
                        for (int64_t column = 0; column < width; column++) {
                            vec value = load(from + column * k);
                            if (column + 1 < width) left += value * g[(column + 1) * n];
                            center += value * g[column * n];
                            if (column > 0) right += value * g[(column - 1) * n];
                        }
                        *(dvec_unaligned *)to += __builtin_convertvector(left, dvec);
                        *(dvec_unaligned *)(to + k) += __builtin_convertvector(center, dvec);
                        *(dvec_unaligned *)(to + 2 * k) += __builtin_convertvector(right, dvec);
                    }
                }
            }
    }
    for (int64_t i = 0; i < size; i++) {
        double total = 0;
        for (int t = 0; t < threads; t++) total += sums[t * size + i];
        if (i < n * 9 * k)
            d_weight[i] = total;
        else
            d_bias[i - n * 9 * k] = total;
    }
    free(sums);
}

/* ---- singular values ---------------------------------------------------------------------------------------------- */

static float dot(const float *a, const float *b, int64_t n) {
    vec sums = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums += load(a + i) * load(b + i);
    float total = total_of(sums);
    for (; i < n; i++) total += a[i] * b[i];
    return total;
}

static void normalize(float *a, int64_t n) {
    float norm = sqrtf(dot(a, a, n));
    norm = norm > 1e-12f ? norm : 1e-12f;
    for (int64_t i = 0; i < n; i++) a[i] /= norm;
}

/* Arguments of a kernel that works on many tensors: their addresses, one after the other. */
static float *address(const int64_t *addresses, int64_t i) { return (float *)(intptr_t)addresses[i]; }

/* Power iteration for each of `count` matrices of sizes [rows, columns], in place: left <- W W^T left, normalized. Then
 * right is W^T left of the step before, normalized, and values are left^T W right. */
void power_iteration(const int64_t *matrices, const int64_t *sizes, int64_t count, int64_t iterations,
                     const int64_t *lefts, const int64_t *rights, float *values) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t k = 0; k < count; k++) {
        const float *matrix = address(matrices, k);
        int64_t rows = sizes[2 * k], columns = sizes[2 * k + 1];
        float *left = address(lefts, k), *right = address(rights, k);
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

/* The gradients of the sum of the values: gradient left right^T each. */
void outer_products(const int64_t *lefts, const int64_t *rights, const int64_t *sizes, int64_t count,
                    const float *gradient, const int64_t *products) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t k = 0; k < count; k++) {
        const float *left = address(lefts, k), *right = address(rights, k);
        float *to = address(products, k);
        for (int64_t i = 0; i < sizes[2 * k]; i++)
            for (int64_t j = 0; j < sizes[2 * k + 1]; j++) *to++ = gradient[0] * left[i] * right[j];
    }
}

/* ---- weight norm -------------------------------------------------------------------------------------------------- */

/* weights = exp(log_norms) v / (|v| + eps), a norm for each row, for `count` matrices of sizes [rows, columns]. */
void normalize_weights(const int64_t *vs, const int64_t *log_norms, const int64_t *sizes, int64_t count, float eps,
                       const int64_t *weights) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t k = 0; k < count; k++)
        for (int64_t i = 0, n = sizes[2 * k + 1]; i < sizes[2 * k]; i++) {
            const float *v = address(vs, k) + i * n;
            float *to = address(weights, k) + i * n;
            float scale = expf(address(log_norms, k)[i]) / (sqrtf(dot(v, v, n)) + eps);
            for (int64_t j = 0; j < n; j++) to[j] = scale * v[j];
        }
}

void normalize_weights_backward(const int64_t *vs, const int64_t *log_norms, const int64_t *gradients,
                                const int64_t *sizes, int64_t count, float eps, const int64_t *d_vs,
                                const int64_t *d_log_norms) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t k = 0; k < count; k++)
        for (int64_t i = 0, n = sizes[2 * k + 1]; i < sizes[2 * k]; i++) {
            const float *v = address(vs, k) + i * n, *g = address(gradients, k) + i * n;
            float *dv = address(d_vs, k) + i * n;
            float norm = sqrtf(dot(v, v, n)), scale = expf(address(log_norms, k)[i]) / (norm + eps);
            float product = scale * dot(g, v, n), slope = norm > 0 ? product / ((norm + eps) * norm) : 0;
            for (int64_t j = 0; j < n; j++) dv[j] = scale * g[j] - slope * v[j];
            address(d_log_norms, k)[i] = product;
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
