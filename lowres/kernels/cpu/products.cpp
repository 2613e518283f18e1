// What follows an INT8 product, and the loss: see lowres/kernels/product.py and loss.py.
#include "common.h"

// out [rows, n] = acc * row scale * column scale, or that added to it; null means no such scale
template <class T>
static void epilogue(const int32_t *acc, const float *row_scale, const float *column_scale, T *out, bool add,
                     int64_t rows, int64_t n, int64_t stride) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const float scale = row_scale[i];
        const int32_t *from = acc + i * n;
        T *to = out + i * stride;
        if (column_scale && add) {
#pragma omp simd
            for (int64_t j = 0; j < n; j++) put(to[j], wide(to[j]) + (float)from[j] * scale * column_scale[j]);
        } else if (column_scale) {
#pragma omp simd
            for (int64_t j = 0; j < n; j++) put(to[j], (float)from[j] * scale * column_scale[j]);
        } else if (add) {
#pragma omp simd
            for (int64_t j = 0; j < n; j++) put(to[j], wide(to[j]) + (float)from[j] * scale);
        } else {
#pragma omp simd
            for (int64_t j = 0; j < n; j++) put(to[j], (float)from[j] * scale);
        }
    }
}

API void epilogue_fp32(const int32_t *acc, const float *row_scale, const float *column_scale, float *out, int64_t add,
                       int64_t rows, int64_t n, int64_t stride) {
    epilogue(acc, row_scale, column_scale, out, add, rows, n, stride);
}

API void epilogue_bf16(const int32_t *acc, const float *row_scale, const float *column_scale, bf16 *out, int64_t add,
                       int64_t rows, int64_t n, int64_t stride) {
    epilogue(acc, row_scale, column_scale, out, add, rows, n, stride);
}

// The loss of each row of logits [rows, n]; if differentiated, the logits become its gradient times weight.
// A negative target does not count.
template <class T>
static void cross_entropy(T *logits, const int64_t *targets, double *losses, bool differentiated,
                          const float *weights, int64_t rows, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        T *row = logits + i * n;
        const int64_t target = targets[i];
        float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < n; j++) top = wide(row[j]) > top ? wide(row[j]) : top;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; j++) sum += wide(row[j]) != wide(row[j]) ? NAN : exponential(wide(row[j]) - top);
        if (!(top < INFINITY)) sum = NAN; // such a row gives a loss of NaN, so that the step is skipped
        losses[i] = target < 0 ? 0.0 : (double)(logf(sum) - (wide(row[target]) - top));
        if (!differentiated) continue;
        if (target < 0) {
            memset(row, 0, n * sizeof(T));
            continue;
        }
        const float weight = weights[i], factor = weight / sum, picked = wide(row[target]);
#pragma omp simd
        for (int64_t j = 0; j < n; j++) put(row[j], exponential(wide(row[j]) - top) * factor);
        put(row[target], exponential(picked - top) * factor - weight);
    }
}

API void cross_entropy_fp32(float *logits, const int64_t *targets, double *losses, int64_t differentiated,
                            const float *weights, int64_t rows, int64_t n) {
    cross_entropy(logits, targets, losses, differentiated, weights, rows, n);
}

API void cross_entropy_bf16(bf16 *logits, const int64_t *targets, double *losses, int64_t differentiated,
                            const float *weights, int64_t rows, int64_t n) {
    cross_entropy(logits, targets, losses, differentiated, weights, rows, n);
}

// The INT8 stash: groups of 32 numbers with a bf16 scale.
static const int64_t GROUP = 32;

template <class T> static void group_encode(const T *x, int8_t *codes, bf16 *scales, int64_t groups) {
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < groups; g++) {
        const T *from = x + g * GROUP;
        int32_t largest = 0;
#pragma omp simd reduction(max : largest)
        for (int64_t j = 0; j < GROUP; j++) {
            int32_t m = magnitude(wide(from[j]));
            largest = m > largest ? m : largest;
        }
        put(scales[g], float_of(largest) / 127.0f);
        float scale = wide(scales[g]);
        scale = scale < 1e-30f ? 1e-30f : scale;
#pragma omp simd
        for (int64_t j = 0; j < GROUP; j++) {
            float code = rintf(wide(from[j]) / scale);
            code = code < -127.0f ? -127.0f : (code > 127.0f ? 127.0f : code);
            codes[g * GROUP + j] = (int8_t)(int32_t)code;
        }
    }
}

template <class T> static void group_decode(const int8_t *codes, const bf16 *scales, T *out, int64_t groups) {
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < groups; g++) {
        const float scale = wide(scales[g]);
#pragma omp simd
        for (int64_t j = 0; j < GROUP; j++) {
            bf16 value;
            put(value, (float)codes[g * GROUP + j] * scale);
            put(out[g * GROUP + j], wide(value));
        }
    }
}

API void group_encode_fp32(const float *x, int8_t *codes, bf16 *scales, int64_t groups) {
    group_encode(x, codes, scales, groups);
}

API void group_encode_bf16(const bf16 *x, int8_t *codes, bf16 *scales, int64_t groups) {
    group_encode(x, codes, scales, groups);
}

API void group_decode_fp32(const int8_t *codes, const bf16 *scales, float *out, int64_t groups) {
    group_decode(codes, scales, out, groups);
}

API void group_decode_bf16(const int8_t *codes, const bf16 *scales, bf16 *out, int64_t groups) {
    group_decode(codes, scales, out, groups);
}
