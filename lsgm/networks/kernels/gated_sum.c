/* The gated sum of a residual cell. */
#include "channels.h"

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
