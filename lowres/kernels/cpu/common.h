// Shared by the CPU kernels. Every file here is compiled into one library by lowres/kernels/native.py.
//
// Loops are written so that a compiler turns them into vector instructions. Results of kernels that have to
// equal PyTorch's bit for bit depend on -ffp-contract=off: no multiplication and addition may be fused.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define API extern "C" __attribute__((visibility("default")))

struct bf16 {
    uint16_t bits;
};

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline float wide(float x) { return x; }
static inline float wide(bf16 x) { return float_of((uint32_t)x.bits << 16); }

static inline void put(float &to, float x) { to = x; }

// to nearest, ties to even, as PyTorch rounds
static inline void put(bf16 &to, float x) {
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

// Magnitudes are compared as integers: the order is that of the numbers, and NaN is the largest.
static inline int32_t magnitude(float x) { return bits_of(x) & 0x7fffffff; }

static inline float absolute(float x) { return float_of(bits_of(x) & 0x7fffffff); }

// lowres.rng.random_bits, of one element or of several
template <class U> static inline U random_bits(U index, uint32_t k0, uint32_t k1) {
    U x = index + k0;
    x ^= x >> 17;
    x *= 0xED5AD4BBu;
    x += k1;
    x ^= x >> 11;
    x *= 0xAC4C1B51u;
    x ^= x >> 15;
    x *= 0x31848BABu;
    x ^= x >> 14;
    return x;
}

// lowres.rng.round_to_bf16
static inline void put_stochastically(bf16 &to, float x, uint32_t random) {
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + (random & 0xffff)) >> 16;
    bf16 nearest;
    put(nearest, x); // inf and nan
    to.bits = (bits & 0x7f800000) == 0x7f800000 ? nearest.bits : rounded;
}

// e^x to 2 units in the last place; 0 below -87, large above 88
static inline float exponential(float x) {
    x = x < -87.3f ? -87.3f : (x > 88.3f ? 88.3f : x);
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * float_of((uint32_t)((int32_t)n + 127) << 23);
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// INT8 codes of a row or column whose largest magnitude has these bits. A row that is not finite gets such a
// scale and codes of zero, so that its products are NaN. A row too small to divide by gets zeros.
struct Scale {
    float scale, inverse;
};

static inline Scale scale_of(int32_t largest) {
    float top = float_of(largest);
    if (largest >= 0x7f800000) return {NAN, 0.0f};
    if (top < 1e-35f) return {0.0f, 0.0f};
    return {top / 127.0f, 127.0f / top};
}

static inline int8_t code_of(float x, float inverse) {
    float code = rintf(x * inverse);
    code = code < -127.0f ? -127.0f : (code > 127.0f ? 127.0f : code); // NaN fails both, and its inverse is 0
    return (int8_t)(int32_t)code;
}
