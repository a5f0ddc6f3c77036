// The exponential and the half-precision formats, in plain arithmetic: the same on every device, and vectorisable.
#pragma once

#include <string.h>

#include "config.hpp"

PAMA_BEGIN

// e^x = 2^k e^r with r = x - k log 2, |r| <= log(2)/2, e^r = 1 + r + r^2 q(r); q by its Taylor series, to
// half a unit in the last place of the type. `k3` receives e^x - 1 - x, without cancellation where k = 0.
// Beyond the range of the type it is infinity above and its smallest normal number below.
PAMA_HD inline float exponential(float given, float& k3) {
    float x = given;
    x = x < 89.0f ? x : 89.0f;
    x = x > -87.0f ? x : -87.0f;
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float k = shifted - 12582912.0f;
    const float r = (x - k * 0.693145752f) - k * 1.42860677e-6f;
    float q = 1.0f / 5040;
    q = q * r + 1.0f / 720;
    q = q * r + 1.0f / 120;
    q = q * r + 1.0f / 24;
    q = q * r + 1.0f / 6;
    q = q * r + 0.5f;
    const float tail = r * r * q;
    unsigned bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits << 23) + (127u << 23);
    float power;
    memcpy(&power, &bits, 4);
    const float u = power * (1.0f + (r + tail));
    k3 = k == 0.0f ? tail : u - 1.0f - given;
    return u;
}

PAMA_HD inline double exponential(double given, double& k3) {
    double x = given;
    x = x < 710.0 ? x : 710.0;
    x = x > -708.0 ? x : -708.0;
    const double shifted = x * 1.4426950408889634 + 6755399441055744.0;
    const double k = shifted - 6755399441055744.0;
    const double r = (x - k * 0.6931471803691238) - k * 1.9082149292705877e-10;
    double q = 1.0 / 87178291200.0;
    q = q * r + 1.0 / 6227020800.0;
    q = q * r + 1.0 / 479001600.0;
    q = q * r + 1.0 / 39916800.0;
    q = q * r + 1.0 / 3628800.0;
    q = q * r + 1.0 / 362880.0;
    q = q * r + 1.0 / 40320.0;
    q = q * r + 1.0 / 5040.0;
    q = q * r + 1.0 / 720.0;
    q = q * r + 1.0 / 120.0;
    q = q * r + 1.0 / 24.0;
    q = q * r + 1.0 / 6.0;
    q = q * r + 0.5;
    const double tail = r * r * q;
    unsigned long bits;
    memcpy(&bits, &shifted, 8);
    bits = (bits << 52) + (1023UL << 52);
    double power;
    memcpy(&power, &bits, 8);
    const double u = power * (1.0 + (r + tail));
    k3 = k == 0.0 ? tail : u - 1.0 - given;
    return u;
}

PAMA_HD inline float bf16_to_float(unsigned short x) {
    const unsigned bits = static_cast<unsigned>(x) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

// Exact, subnormals, infinities and NaN included: the exponent is rebased by a multiplication.
PAMA_HD inline float f16_to_float(unsigned short x) {
    const unsigned magnitude = static_cast<unsigned>(x & 0x7fff) << 13;
    float scaled;
    memcpy(&scaled, &magnitude, 4);
    scaled *= 0x1p112f;
    unsigned bits;
    memcpy(&bits, &scaled, 4);
    bits |= (x & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    bits |= static_cast<unsigned>(x & 0x8000) << 16;
    memcpy(&scaled, &bits, 4);
    return scaled;
}

PAMA_END
