/* 3x3 convolution to few channels, with zero padding 1. */
#include "vectors.h"

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
