/* Products of matrices. */
#pragma once
#include "channels.h"

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
static inline void panel(int64_t columns, int64_t rows, const float *a, int64_t a_m, int64_t a_k, const float *b, int64_t b_k,
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
static inline float *packed(const float *from, int64_t of_k, int64_t of_n, int64_t depth, int64_t width) {
    float *b = factors(width, depth), *to = b;
    for (int64_t n = 0; n < width; n += PANEL)
        for (int64_t k = 0; k < depth; k++)
            for (int64_t i = n, end = n + columns_from(n, width); i < end; i++) *to++ = from[k * of_k + i * of_n];
    return b;
}

/* c[m, n] = sum over k of a[m, k] b[k, n] with a packed b. */
static inline void product(int64_t rows, const float *a, const float *b, int64_t depth, int64_t width, float *c, layout l) {
    for (int64_t n = 0; n < width; n += PANEL, b += depth * PANEL, c += VECTORS * l.vector)
        panel(columns_from(n, width), rows, a, depth, 1, b, columns_from(n, width), depth, c, l, 0);
}

/* c[m, n] += sum over k of a[k, m] b[k, n]. */
static inline void add_product(int64_t rows, const float *a, const float *b, int64_t depth, int64_t width, float *c) {
    for (int64_t n = 0; n < width; n += PANEL)
        panel(columns_from(n, width), rows, a, 1, rows, b + n, width, depth, c + n, (layout){width, LANES}, 1);
}
