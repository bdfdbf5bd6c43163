// SPDX-License-Identifier: Apache-2.0
// A step of a Parameter whose moments are 8-bit codes in blocks: what optim/algorithms.py says, with its bits, one block
// after another. A block in float32 stays in the first-level cache, and its loops are what compilers make vectors of.
//
// optim/native.py builds it, without contraction to fused multiply-adds, and defines
//     ALGORITHM            ADAM, LION or SGD
//     BLOCK                elements
//     WEIGHT, GRADIENT     FLOAT or BFLOAT16; a bfloat16 Parameter is rounded stochastically
//     COUPLED, NESTEROV    0 or 1

#include <cmath>
#include <cstdint>
#include <cstring>

#define ADAM 0
#define LION 1
#define SGD 2
#define FLOAT float
#define BFLOAT16 uint16_t

struct Moment {
    uint8_t *codes;
    float *scales;
    const float *values;   // of every code
    const int32_t *words;  // numerics/lookup.py
    float top;             // the largest value
    int32_t nonzero;       // what is not 0 (and never negative) does not get the code of 0
};

struct Scalars {  // as algorithms.py names them; sign: -1 to maximize, times the clipping factor
    float sign, wd, decay, lr, b2, omb1, omb2, alpha, rbc2, eps, momentum, damped;
};

static uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

static float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

[[maybe_unused]] static float widen(float x) { return x; }
[[maybe_unused]] static float widen(uint16_t x) { return float_of((uint32_t)x << 16); }

static void decode(const Moment &moment, int64_t block, float *__restrict x) {
    const uint8_t *codes = moment.codes + block * BLOCK;
    const float scale = moment.scales[block], *values = moment.values;
    for (int i = 0; i < BLOCK; i++) x[i] = values[codes[i]] * scale;
}

static void encode(const Moment &moment, int64_t block, const float *__restrict x) {
    uint32_t most = 0;  // magnitudes of floats are in the order of their bits
    for (int i = 0; i < BLOCK; i++) {
        const uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF;
        most = magnitude > most ? magnitude : most;
    }
    float scale = float_of(most) / moment.top;
    scale = scale < 0x1p-126f ? 0x1p-126f : scale > 0x1p126f ? 0x1p126f : scale;
    moment.scales[block] = scale = most ? scale : 1.0f;
    const float factor = 1.0f / scale, least = moment.nonzero ? 0x1p-149f : -INFINITY;
    uint8_t codes[BLOCK];  // of its own memory, or its elements might be words of the table, one by one
    const int32_t *words = moment.words;
    for (int i = 0; i < BLOCK; i++) {
        const float value = x[i], z = value * factor, floor = value < least ? value : least;
        const uint32_t bits = bits_of(z > floor ? z : floor);
        const int32_t code = (int32_t)(words[bits >> 16] + bits) >> 16;
        codes[i] = code < 0 ? -code : code;  // where negative numbers have falling codes
    }
    std::memcpy(moment.codes + block * BLOCK, codes, BLOCK);
}

static uint32_t mix(uint32_t h) {
    h = (h ^ h >> 16) * 0x7FEB352Du;
    h = (h ^ h >> 15) * 0x846CA68Bu;
    return h ^ h >> 16;
}

[[maybe_unused]] static void write(float *__restrict to, const float *__restrict w, uint64_t, uint32_t, uint32_t) {
    std::memcpy(to, w, BLOCK * sizeof(float));
}

// numerics/rounding.py: stochastic_truncation, with words of numerics/hashing.py.
[[maybe_unused]] static void write(uint16_t *__restrict to, const float *__restrict w, uint64_t start, uint32_t k0, uint32_t k1) {
    const uint32_t low = (uint32_t)start, late = k1 ^ mix((uint32_t)(start >> 32));
    for (uint32_t i = 0; i < BLOCK; i++) {
        uint32_t h = (low + i) ^ k0;
        h = ((h ^ h >> 16) * 0x7FEB352Du) ^ late;
        h = (h ^ h >> 15) * 0x846CA68Bu;
        h = (h ^ h >> 16) & 0xFFFF;
        const uint32_t bits = bits_of(w[i]), up = (bits + h) >> 16, top = (bits >> 31 << 15) | 0x7F7F;
        const uint32_t finite = (up & 0x7FFF) > 0x7F7F ? top : up;
        to[i] = (bits & 0x7F800000) == 0x7F800000 ? 0x7FC0 : finite;
    }
}

static void update(const GRADIENT *__restrict grad, float *__restrict w, float *__restrict m, float *__restrict v,
                   const Scalars &s) {
    for (int i = 0; i < BLOCK; i++) {
        float g = widen(grad[i]) * s.sign;
        if (COUPLED) g = w[i] * s.wd + g;
#if ALGORITHM == ADAM
        m[i] = (g - m[i]) * s.omb1 + m[i];
        v[i] = (g * s.omb2) * g + v[i] * s.b2;
        w[i] = w[i] * s.decay - (m[i] * s.alpha) / (std::sqrt(v[i]) * s.rbc2 + s.eps);
#elif ALGORITHM == LION
        const float difference = g - m[i], c = difference * s.omb1 + m[i];
        w[i] = w[i] * s.decay - (float)((c > 0) - (c < 0)) * s.lr;
        m[i] = difference * s.omb2 + m[i];
#else
        m[i] = m[i] * s.momentum + g * s.damped;
        w[i] = w[i] - (NESTEROV ? m[i] * s.momentum + g : m[i]) * s.lr;
#endif
    }
}

// Blocks `first` to `last` of a Parameter, or of a part of one, whose block 0 begins at flat index `start`.
extern "C" void step(WEIGHT *weight, const GRADIENT *grad, const Moment *moments, const Scalars *scalars, int64_t first,
                     int64_t last, uint64_t start, uint32_t k0, uint32_t k1) {
    const Scalars s = *scalars;
    alignas(64) float w[BLOCK], m[BLOCK], v[BLOCK];
    for (int64_t block = first; block < last; block++) {
        const int64_t offset = block * BLOCK;
        for (int i = 0; i < BLOCK; i++) w[i] = widen(weight[offset + i]);
        decode(moments[0], block, m);
        if (ALGORITHM == ADAM) decode(moments[1], block, v);
        update(grad + offset, w, m, v, s);
        encode(moments[0], block, m);
        if (ALGORITHM == ADAM) encode(moments[1], block, v);
        write(weight + offset, w, start + offset, k0, k1);
    }
}
