/* Group norm, with swish or without. */
#include "channels.h"

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
