// Which elements dropout leaves: a hash of (seed, step, layer, sample, element), as in the Python engines, bit for bit.
#pragma once

#include <cstdint>

namespace paraxis {

inline uint64_t splitmix64(uint64_t x) {  // Steele, Lea and Flood 2014
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

inline uint32_t mix32(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

// Those of one layer in one step.
struct Masks {
    Masks(double p, uint64_t seed, uint64_t step, uint32_t layer)
        : threshold(uint32_t(65536 * p + 0.5)), scale(threshold < 65536 ? 65536.0 / (65536.0 - threshold) : 0),
          key(splitmix64(splitmix64(splitmix64(seed) ^ step) ^ layer)) {}
    uint32_t of_sample(int64_t number) const { return mix32(uint32_t(number) + uint32_t(key)) ^ uint32_t(key >> 32); }

    uint32_t threshold;  // a 16-bit draw below it is dropped
    double scale;        // of what is left
    uint64_t key;
};

}  // namespace paraxis
