/* What all kernels use. Feature maps are float32 and channels-last: `rows` pixels of `channels` numbers.
 *
 * Vectors are GCC's and Clang's extension, of the widest kind that the processor has.
 */
#pragma once
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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

/* Scratch memory of a thread, which its next call uses again. */
static inline float *scratch(int64_t count) {
    static _Thread_local float *memory;
    static _Thread_local int64_t held;
    if (count > held) {
        free(memory);
        held = (count + 15) / 16 * 16;
        memory = aligned_alloc(64, sizeof(float) * held);
    }
    return memory;
}

static inline void first_and_last(int64_t rows, int64_t *first, int64_t *last) {
    int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    *first = rows * thread / threads;
    *last = rows * (thread + 1) / threads;
}
