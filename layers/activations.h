// Activations and their slopes in float32, in forms that compilers turn into vector instructions.
//
// The macro ACTIVATION of channel.cpp and spline.cpp is one of the structs below; native.py has their names in PyTorch.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// exp(-x) for x >= 0, within 2 units in the last place up to 87, beyond 88 zero: a line in n and a polynomial, which
// compilers turn into vector instructions (constants of Cephes, expf).
inline float decay(float x) {
    const float y = -(x > 88.0f ? 88.0f : x);
    const float n = std::nearbyint(y * 1.44269504f);
    const float r = y - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
    float power;  // 2^n, and 0 for n = -127
    std::memcpy(&power, &bits, sizeof power);
    return (p * r * r + r + 1.0f) * power;
}

inline float sigmoid(float x) {
    const float e = decay(std::abs(x));
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

struct silu {
    static float value(float x) { return x * sigmoid(x); }
    static float slope(float x) {
        const float s = sigmoid(x);
        return s * (1.0f + x * (1.0f - s));
    }
};

struct gelu {
    // The normal distribution, by formula 7.1.26 of Abramowitz and Stegun for erf: an error of 1.5e-7 at most.
    static float cdf(float x, float density) {
        const float t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * std::abs(x));
        float p = 1.061405429f;
        p = p * t - 1.453152027f;
        p = p * t + 1.421413741f;
        p = p * t - 0.284496736f;
        p = p * t + 0.254829592f;
        const float tail = 0.5f * p * t * density;  // beyond |x|; the density is exp(-x^2 / 2)
        return x > 0 ? 1.0f - tail : tail;
    }
    static float value(float x) { return x * cdf(x, decay(0.5f * x * x)); }
    static float slope(float x) {
        const float density = decay(0.5f * x * x);
        return cdf(x, density) + 0.39894228f * x * density;
    }
};

struct gelu_tanh {
    // x (1 + tanh z) / 2 is x sigmoid(2 z)
    static float argument(float x) { return 1.59576912f * x * (1.0f + 0.044715f * x * x); }
    static float value(float x) { return x * sigmoid(argument(x)); }
    static float slope(float x) {
        const float s = sigmoid(argument(x));
        return s + x * s * (1.0f - s) * 1.59576912f * (1.0f + 0.134145f * x * x);
    }
};

struct relu {
    static float value(float x) { return x < 0 ? 0.0f : x; }  // NaN stays
    static float slope(float x) { return x > 0 ? 1.0f : 0.0f; }
};

struct hyperbolic {  // tanh, within 1e-7
    static float value(float x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }
    static float slope(float x) { return 1.0f - value(x) * value(x); }
};

struct logistic {
    static float value(float x) { return sigmoid(x); }
    static float slope(float x) { return sigmoid(x) * (1.0f - sigmoid(x)); }
};

struct identity {
    static float value(float x) { return x; }
    static float slope(float) { return 1.0f; }
};

struct zero {  // in place of an activation that is not here
    static float value(float) { return 0.0f; }
    static float slope(float) { return 0.0f; }
};

}  // namespace
