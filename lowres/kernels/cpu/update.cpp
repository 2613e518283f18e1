// Updates of stored weights: see lowres/kernels/update.py.
#include "common.h"

enum { SCALAR = 0, PER_ROW = 1, PER_COLUMN = 2 };

template <bool COLUMNS, bool DECAY>
static inline float change_of(float direction, float code, float factor, float scale, float decay) {
    float change = direction * (COLUMNS ? factor / -scale : factor);
    if (DECAY) change = change + -code * decay;
    return change;
}

template <bool COLUMNS, bool DECAY>
static void int8_row(int8_t *codes, float *scale, const float *direction, const float *factor, float decay,
                     uint32_t start, uint32_t k0, uint32_t k1, int64_t n) {
    const float old = *scale, one = COLUMNS ? 0.0f : *factor / -old;
    int32_t top_bits = 0, change_bits = 0;
#pragma omp simd reduction(max : top_bits, change_bits)
    for (int64_t j = 0; j < n; j++) {
        float code = codes[j];
        float change = change_of<COLUMNS, DECAY>(direction[j], code, COLUMNS ? factor[j] : one, old, decay);
        int32_t a = magnitude(code + change), b = magnitude(change);
        top_bits = a > top_bits ? a : top_bits;
        change_bits = b > change_bits ? b : change_bits;
    }
    const float top = float_of(top_bits);
    const bool fits = (top >= 64.0f || change_bits == 0 || top == 0.0f) && top <= 127.0f;
    const float grow = fits ? 1.0f : top / 120.0f, kept = fits ? 1.0f : 0.0f;
    if (fits) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) {
            float code = codes[j];
            float change = change_of<COLUMNS, DECAY>(direction[j], code, COLUMNS ? factor[j] : one, old, decay);
            float sum = code + round_to_integer(change, random_bits(start + (uint32_t)j, k0, k1));
            sum = sum < -127.0f ? -127.0f : (sum > 127.0f ? 127.0f : sum);
            codes[j] = (int8_t)(int32_t)sum;
        }
        return;
    }
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        float code = codes[j];
        float change = change_of<COLUMNS, DECAY>(direction[j], code, COLUMNS ? factor[j] : one, old, decay);
        float rest = (code + change) / grow;
        float sum = code * kept + round_to_integer(rest, random_bits(start + (uint32_t)j, k0, k1));
        sum = sum < -127.0f ? -127.0f : (sum > 127.0f ? 127.0f : sum);
        codes[j] = (int8_t)(int32_t)sum;
    }
    *scale = old * grow;
}

API void int8_update(int8_t *codes, float *scales, const float *direction, const float *factor, int64_t mode,
                     const float *decay, int64_t k0, int64_t k1, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const float *own = factor + (mode == PER_ROW ? i : 0);
        int8_t *to = codes + i * columns;
        const float *from = direction + i * columns;
        uint32_t start = (uint32_t)(i * columns);
        auto row = mode == PER_COLUMN ? (decay ? int8_row<true, true> : int8_row<true, false>)
                                      : (decay ? int8_row<false, true> : int8_row<false, false>);
        row(to, scales + i, from, own, decay ? *decay : 0.0f, start, (uint32_t)k0, (uint32_t)k1, columns);
    }
}

template <bool COLUMNS>
static void bf16_row(bf16 *value, const float *direction, const float *factor, const float *decay,
                     uint32_t start, uint32_t k0, uint32_t k1, int64_t n) {
    const float keep = decay ? 1.0f - *decay : 1.0f;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        float x = wide(value[j]) * keep;
        x = x + -direction[j] * (COLUMNS ? factor[j] : *factor);
        put_stochastically(value[j], x, random_bits(start + (uint32_t)j, k0, k1));
    }
}

API void bf16_update(bf16 *value, const float *direction, const float *factor, int64_t mode,
                     const float *decay, int64_t k0, int64_t k1, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        auto row = mode == PER_COLUMN ? bf16_row<true> : bf16_row<false>;
        row(value + i * columns, direction + i * columns, factor + (mode == PER_ROW ? i : 0), decay,
            (uint32_t)(i * columns), (uint32_t)k0, (uint32_t)k1, columns);
    }
}

// round fp32 numbers to bf16 stochastically; start: index of the first
API void bf16_round(const float *x, bf16 *out, int64_t k0, int64_t k1, int64_t start, int64_t n) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < n; i++)
        put_stochastically(out[i], x[i], random_bits((uint32_t)(start + i), (uint32_t)k0, (uint32_t)k1));
}

template <class T> static void int8_fill(const T *values, int8_t *codes, float *scales, int64_t rows, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const T *from = values + i * n;
        int8_t *to = codes + i * n;
        int32_t largest = 0;
#pragma omp simd reduction(max : largest)
        for (int64_t j = 0; j < n; j++) {
            int32_t m = magnitude(wide(from[j]));
            largest = m > largest ? m : largest;
        }
        float scale = float_of(largest) / 120.0f;
        scale = scale < 1e-8f ? 1e-8f : scale;
        scales[i] = scale;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) to[j] = (int8_t)(int32_t)rintf(wide(from[j]) / scale);
    }
}

API void int8_fill_fp32(const float *values, int8_t *codes, float *scales, int64_t rows, int64_t n) {
    int8_fill(values, codes, scales, rows, n);
}

API void int8_fill_bf16(const bf16 *values, int8_t *codes, float *scales, int64_t rows, int64_t n) {
    int8_fill(values, codes, scales, rows, n);
}

template <class T>
static void dequantise(const int8_t *codes, const float *scales, T *out, int64_t rows, int64_t n, int64_t stride) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const float scale = scales[i];
#pragma omp simd
        for (int64_t j = 0; j < n; j++) put(out[i * stride + j], (float)codes[i * n + j] * scale);
    }
}

API void dequantise_fp32(const int8_t *codes, const float *scales, float *out, int64_t rows, int64_t n,
                         int64_t stride) {
    dequantise(codes, scales, out, rows, n, stride);
}

API void dequantise_bf16(const int8_t *codes, const float *scales, bf16 *out, int64_t rows, int64_t n,
                         int64_t stride) {
    dequantise(codes, scales, out, rows, n, stride);
}
