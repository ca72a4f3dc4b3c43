/* Batch norm, with swish or without. */
#include "channels.h"

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
