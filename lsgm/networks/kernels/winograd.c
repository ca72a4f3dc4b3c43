/* 3x3 convolution with zero padding 1. */
#include "products.h"

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
