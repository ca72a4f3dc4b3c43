/* What is done to all weights of a network: largest singular values, and weight norm. */
#include "vectors.h"

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
