/* Statistics of the channels of a feature map, and what batch norm makes of them. */
#pragma once
#include "vectors.h"

/* Rows of few channels are taken together, so that `width` is a multiple of the lanes. */
typedef struct {
    int64_t rows, width, repeats;
} shape;

static inline shape tiled(int64_t rows, int64_t channels) {
    int64_t repeats = 1;
    while (channels * repeats % LANES || (channels * repeats < 4 * LANES && rows % (2 * repeats) == 0)) repeats *= 2;
    return (shape){rows / repeats, channels * repeats, repeats};
}

/* Rows whose float32 sums go into a float64 sum: what the fastest cache holds, at most 64. */
static inline int64_t block(int64_t width) {
    int64_t rows = 4096 / width;
    return rows < 4 ? 4 : rows > 64 ? 64 : rows;
}

/* Means and sums of squared deviations, of each thread: [threads] times a count, [width] and [width]. */
static inline double *new_statistics(int threads, int64_t width) { return calloc(threads * (2 * width + 1), sizeof(double)); }

/* Where the numbers of a map are: how far apart its rows (pixels) are, and the vectors of a row. */
typedef struct {
    int64_t row, vector;
} layout;

/* Adds rows of the channels first .. first + size to the statistics of this thread. Blocks of rows have their own means,
 * which are joined in float64 (Chan, Golub, LeVeque 1983): no cancellation, whatever the mean. `before` is the number of
 * rows so far. */
static inline void add_to_statistics(const float *x, int64_t rows, layout l, int64_t first, int64_t size, int64_t width,
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
static inline void set_count(double count, int64_t width, double *all_statistics) {
    all_statistics[omp_get_thread_num() * (2 * width + 1)] = count;
}

/* Mean and biased variance of each channel, of all threads' and tiled rows. Frees the statistics. */
static inline void join_statistics(double *all_statistics, int threads, int64_t width, int64_t channels, float *mean,
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

/* Vectors of a channel each, repeated to a width. */
static inline float *factors(int64_t width, int count) {
    return aligned_alloc(64, (sizeof(float) * count * width + 63) / 64 * 64);
}

/* z = f[0] x + f[1]. */
static inline float *forward_factors(int64_t width, int64_t channels, const float *mean, const float *variance,
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
static inline float *backward_factors(int64_t width, int64_t channels, const float *mean, const float *variance,
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
static inline float *gradient_factors(int64_t width, int64_t channels, const float *mean, const float *variance,
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

/* The gradient with respect to z, from that with respect to y = z or swish(z). */
static inline vec gradient_of_z(vec dy, vec z, int64_t swish) {
    if (!swish) return dy;
    vec s = sigmoid(z);
    return dy * (s + z * s * (1.0f - s));
}

/* Sums of dz and of dz x_hat over the threads and tiled rows: [threads][2][width] -> [2][channels]. Frees them. */
static inline void join_sums(double *sums, int threads, int64_t width, int64_t channels, float *d_beta_and_gamma) {
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
