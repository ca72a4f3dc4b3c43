/* Batch norm, perhaps swish, then a linear operation; and the statistics of its result for the next batch norm. */
#include "products.h"

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
