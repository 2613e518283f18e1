// Updates of stored weights: see lowres/kernels/update.py.
#include "common.h"
#include <vector>

enum { SCALAR = 0, PER_ROW = 1, PER_COLUMN = 2 };

// lowres.rng.round_to_integer, for magnitudes below 2^31
static inline int32_t round_to_integer(float x, uint32_t bits) {
    float size = absolute(x);
    int32_t whole = (int32_t)size;
    float uniform = ((float)(int32_t)(bits >> 8) + 0.5f) * 0x1p-24f;
    whole += uniform < size - (float)whole;
    return x < 0 ? -whole : whole;
}

static const int64_t PART = 512; // numbers of a row between two prefetches

// Every loop has numbers of one width, because compilers mix int8 and fp32 badly; so a row passes through these.
struct Row {
    std::vector<float> code, change;
    std::vector<int32_t> sum;
    Row(int64_t n) : code(n), change(n), sum(n) {}
};

template <bool COLUMNS, bool DECAY>
static void int8_row(int8_t *codes, float *scale, const float *direction, const float *factor, float decay,
                     uint32_t start, uint32_t k0, uint32_t k1, int64_t n, Row &row) {
    const float old = *scale, one = COLUMNS ? 0.0f : *factor / -old;
    float *code = row.code.data(), *change = row.change.data();
    int32_t *sum = row.sum.data();
#pragma omp simd
    for (int64_t j = 0; j < n; j++) code[j] = codes[j];
    int32_t top_bits = 0, change_bits = 0;
#pragma omp simd reduction(max : top_bits, change_bits)
    for (int64_t j = 0; j < n; j++) {
        float c = direction[j] * (COLUMNS ? factor[j] / -old : one);
        if (DECAY) c = fmaf(-code[j], decay, c); // as addcmul, see update.py
        change[j] = c;
        int32_t a = magnitude(code[j] + c), b = magnitude(c);
        top_bits = a > top_bits ? a : top_bits;
        change_bits = b > change_bits ? b : change_bits;
    }
    const float top = float_of(top_bits);
    const bool fits = (top >= 64.0f || change_bits == 0 || top == 0.0f) && top <= 127.0f;
    const float grow = fits ? 1.0f : top / 120.0f;
    if (!fits) {
        *scale = old * grow;
#pragma omp simd
        for (int64_t j = 0; j < n; j++) { // the new value is rounded as a whole, otherwise only the change
            change[j] = (code[j] + change[j]) / grow;
            code[j] = 0;
        }
    }
    for (int64_t begin = 0; begin < n; begin += PART) {
        const int64_t end = begin + PART < n ? begin + PART : n;
        // The next row, because the hardware's prefetching ends with this one; harmless beyond the last row.
        for (int64_t j = begin; j < end; j += 16) __builtin_prefetch(direction + n + j);
        for (int64_t j = begin; j < end; j += 64) __builtin_prefetch(codes + n + j, 1);
#pragma omp simd
        for (int64_t j = begin; j < end; j++)
            sum[j] = (int32_t)code[j] + round_to_integer(change[j], random_bits(start + (uint32_t)j, k0, k1));
#pragma omp simd
        for (int64_t j = begin; j < end; j++)
            codes[j] = (int8_t)(sum[j] < -127 ? -127 : (sum[j] > 127 ? 127 : sum[j]));
    }
}

API void int8_update(int8_t *codes, float *scales, const float *direction, const float *factor, int64_t mode,
                     const float *decay, int64_t k0, int64_t k1, int64_t rows, int64_t columns) {
    auto update = mode == PER_COLUMN ? (decay ? int8_row<true, true> : int8_row<true, false>)
                                     : (decay ? int8_row<false, true> : int8_row<false, false>);
#pragma omp parallel
    {
        Row row(columns);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++)
            update(codes + i * columns, scales + i, direction + i * columns, factor + (mode == PER_ROW ? i : 0),
                   decay ? *decay : 0.0f, (uint32_t)(i * columns), (uint32_t)k0, (uint32_t)k1, columns, row);
    }
}

template <bool COLUMNS>
static void bf16_row(bf16 *value, const float *direction, const float *factor, const float *decay,
                     uint32_t start, uint32_t k0, uint32_t k1, int64_t n) {
    const float keep = decay ? 1.0f - *decay : 1.0f;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        float x = wide(value[j]) * keep;
        x = fmaf(-direction[j], COLUMNS ? factor[j] : *factor, x);
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

// Linear codes in blocks that share a scale: see lowres/kernels/blocks.py.
static const int64_t BLOCK = 256;

API void blocks_expand(const int8_t *codes, const float *absmax, float *out, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        const int64_t end = begin + BLOCK < n ? begin + BLOCK : n;
        const float scale = absmax[begin / BLOCK] / 127.0f;
#pragma omp simd
        for (int64_t j = begin; j < end; j++) out[j] = (float)codes[j] * scale;
    }
}

API void blocks_store(const float *values, int8_t *codes, float *absmax, const bool *accepted, int64_t k0,
                      int64_t k1, int64_t start, int64_t n) {
    if (!*accepted) return;
#pragma omp parallel for schedule(static)
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        const int64_t end = begin + BLOCK < n ? begin + BLOCK : n;
        int32_t bits = 0, code[BLOCK];
#pragma omp simd reduction(max : bits)
        for (int64_t j = begin; j < end; j++) {
            int32_t m = magnitude(values[j]);
            bits = m > bits ? m : bits;
        }
        const float largest = float_of(bits), inverse = 127.0f / (largest < 1e-36f ? 1e-36f : largest);
        absmax[begin / BLOCK] = largest;
#pragma omp simd
        for (int64_t j = begin; j < end; j++)
            code[j - begin] = round_to_integer(values[j] * inverse,
                                               random_bits((uint32_t)(start + j), (uint32_t)k0, (uint32_t)k1));
#pragma omp simd
        for (int64_t j = begin; j < end; j++) {
            const int32_t c = code[j - begin];
            codes[j] = (int8_t)(c < -127 ? -127 : (c > 127 ? 127 : c));
        }
    }
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
