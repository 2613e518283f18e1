// Activations: norm, SwiGLU and rotary embedding, with quantisation: see norm.py, swiglu.py, rotary.py and
// quantise.py in lowres/kernels.
#include "common.h"
#include <vector>

// A row in fp32 becomes codes with one scale.
static inline void quantise_row(const float *row, int8_t *codes, float *scale, int64_t n) {
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < n; j++) {
        int32_t m = magnitude(row[j]);
        largest = m > largest ? m : largest;
    }
    Scale s = scale_of(largest);
    *scale = s.scale;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) codes[j] = code_of(row[j], s.inverse);
}

template <class T>
static void quantise_rows(const T *x, const float *fold, int8_t *codes, float *scales, int64_t rows, int64_t n) {
#pragma omp parallel
    {
        std::vector<float> row(n);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            const T *from = x + i * n;
            if (fold) {
#pragma omp simd
                for (int64_t j = 0; j < n; j++) row[j] = wide(from[j]) * fold[j];
            } else {
#pragma omp simd
                for (int64_t j = 0; j < n; j++) row[j] = wide(from[j]);
            }
            quantise_row(row.data(), codes + i * n, scales + i, n);
        }
    }
}

static const int64_t STRIP = 64; // columns that are read together

// codes [rows, n] with a scale for every column; fold: a factor for every row
template <class T>
static void quantise_columns(const T *x, const float *fold, int8_t *codes, float *scales, int64_t rows, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t start = 0; start < n; start += STRIP) {
        const int64_t width = n - start < STRIP ? n - start : STRIP;
        int32_t largest[STRIP] = {0};
        float inverse[STRIP];
        for (int64_t i = 0; i < rows; i++) {
            const T *from = x + i * n + start;
#pragma omp simd
            for (int64_t j = 0; j < width; j++) {
                int32_t m = magnitude(wide(from[j]) * fold[i]);
                largest[j] = m > largest[j] ? m : largest[j];
            }
        }
        for (int64_t j = 0; j < width; j++) {
            Scale s = scale_of(largest[j]);
            scales[start + j] = s.scale;
            inverse[j] = s.inverse;
        }
        for (int64_t i = 0; i < rows; i++) {
            const T *from = x + i * n + start;
            int8_t *to = codes + i * n + start;
#pragma omp simd
            for (int64_t j = 0; j < width; j++) to[j] = code_of(wide(from[j]) * fold[i], inverse[j]);
        }
    }
}

// 1 / root mean square of a row
template <class T> static inline float inverse_rms(const T *x, float eps, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += wide(x[j]) * wide(x[j]);
    return 1.0f / sqrtf(sum / n + eps);
}

// out or codes: one of them may be null
template <class T>
static void norm(const T *x, const float *weight, float eps, T *out, int8_t *codes, float *scales, int64_t rows,
                 int64_t n) {
#pragma omp parallel
    {
        std::vector<float> row(n);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            const T *from = x + i * n;
            const float inverse = inverse_rms(from, eps, n);
#pragma omp simd
            for (int64_t j = 0; j < n; j++) row[j] = wide(from[j]) * inverse * weight[j];
            if (out) {
#pragma omp simd
                for (int64_t j = 0; j < n; j++) put(out[i * n + j], row[j]);
            }
            if (codes) quantise_row(row.data(), codes + i * n, scales + i, n);
        }
    }
}

static const int64_t BLOCK = 64; // rows whose gradients of the weight are summed first, for any number of threads

template <class T>
static void norm_backward(const T *dy, const T *x, const float *weight, float eps, T *dx, float *d_weight,
                          float *partial, int64_t rows, int64_t n) {
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        float *sum = partial + b * n;
        memset(sum, 0, n * sizeof(float));
        for (int64_t i = b * BLOCK; i < rows && i < (b + 1) * BLOCK; i++) {
            const T *from = x + i * n, *grad = dy + i * n;
            const float inverse = inverse_rms(from, eps, n);
            float along = 0;
#pragma omp simd reduction(+ : along)
            for (int64_t j = 0; j < n; j++) along += wide(grad[j]) * weight[j] * wide(from[j]);
            along = along * inverse * inverse / n; // times x is the part along the normalised row
#pragma omp simd
            for (int64_t j = 0; j < n; j++) {
                float g = wide(grad[j]), value = wide(from[j]);
                sum[j] += g * value * inverse;
                put(dx[i * n + j], (g * weight[j] - value * along) * inverse);
            }
        }
    }
#pragma omp parallel for simd schedule(static)
    for (int64_t j = 0; j < n; j++) {
        float sum = 0;
        for (int64_t b = 0; b < blocks; b++) sum += partial[b * n + j];
        d_weight[j] += sum;
    }
}

template <class T>
static void swiglu(const T *gate, const T *up, T *out, int8_t *codes, float *scales, int64_t rows, int64_t n) {
#pragma omp parallel
    {
        std::vector<float> row(n);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            const T *g = gate + i * n, *u = up + i * n;
#pragma omp simd
            for (int64_t j = 0; j < n; j++) row[j] = wide(g[j]) * sigmoid(wide(g[j])) * wide(u[j]);
            if (out) {
#pragma omp simd
                for (int64_t j = 0; j < n; j++) put(out[i * n + j], row[j]);
            }
            if (codes) quantise_row(row.data(), codes + i * n, scales + i, n);
        }
    }
}

// the gradients replace gate and up
template <class T> static void swiglu_backward(const T *dy, T *gate, T *up, int64_t count) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; i++) {
        float g = wide(gate[i]), u = wide(up[i]), d = wide(dy[i]), s = sigmoid(g);
        put(gate[i], d * u * s * (1.0f + g * (1.0f - s)));
        put(up[i], d * g * s);
    }
}

// x [rows, heads, width] in place, with row i at position i % length
template <class T>
static void rotate(T *x, const float *cos, const float *sin, float sign, int64_t rows, int64_t length,
                   int64_t heads, int64_t width) {
    const int64_t half = width / 2;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const float *c = cos + i % length * width, *s = sin + i % length * width;
        for (int64_t h = 0; h < heads; h++) {
            T *first = x + (i * heads + h) * width, *second = first + half;
#pragma omp simd
            for (int64_t j = 0; j < half; j++) {
                float a = wide(first[j]), b = wide(second[j]);
                put(first[j], a * c[j] - b * (sign * s[j]));
                put(second[j], b * c[j] + a * (sign * s[j]));
            }
        }
    }
}

#define FORMS(T, NAME)                                                                                             \
    API void quantise_rows_##NAME(const T *x, const float *fold, int8_t *codes, float *scales, int64_t rows,       \
                                  int64_t n) {                                                                     \
        quantise_rows(x, fold, codes, scales, rows, n);                                                            \
    }                                                                                                              \
    API void quantise_columns_##NAME(const T *x, const float *fold, int8_t *codes, float *scales, int64_t rows,    \
                                     int64_t n) {                                                                  \
        quantise_columns(x, fold, codes, scales, rows, n);                                                         \
    }                                                                                                              \
    API void norm_##NAME(const T *x, const float *weight, double eps, T *out, int8_t *codes, float *scales,        \
                         int64_t rows, int64_t n) {                                                                \
        norm(x, weight, (float)eps, out, codes, scales, rows, n);                                                  \
    }                                                                                                              \
    API void norm_backward_##NAME(const T *dy, const T *x, const float *weight, double eps, T *dx,                 \
                                  float *d_weight, float *partial, int64_t rows, int64_t n) {                      \
        norm_backward(dy, x, weight, (float)eps, dx, d_weight, partial, rows, n);                                  \
    }                                                                                                              \
    API void swiglu_##NAME(const T *gate, const T *up, T *out, int8_t *codes, float *scales, int64_t rows,         \
                           int64_t n) {                                                                            \
        swiglu(gate, up, out, codes, scales, rows, n);                                                             \
    }                                                                                                              \
    API void swiglu_backward_##NAME(const T *dy, T *gate, T *up, int64_t count) {                                  \
        swiglu_backward(dy, gate, up, count);                                                                      \
    }                                                                                                              \
    API void rotate_##NAME(T *x, const float *cos, const float *sin, double sign, int64_t rows, int64_t length,    \
                           int64_t heads, int64_t width) {                                                         \
        rotate(x, cos, sin, (float)sign, rows, length, heads, width);                                              \
    }

FORMS(float, fp32)
FORMS(bf16, bf16)
