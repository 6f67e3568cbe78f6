// What a sampled request's tokens are chosen by: its filters and its noise, which is known before anything is decoded.
// runtime/model/sampler.py says what they are; here they rank candidates, so approximations do no harm.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "recycling.h"

namespace outrider {

// SplitMix64's finaliser (Steele, Lea and Flood, 2014)
inline uint64_t mixed(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// Standard Gumbel noise of a token at a position
inline double gumbel(int64_t seed, int64_t position, int token) {
    const uint64_t key = mixed(mixed(static_cast<uint64_t>(seed)) + static_cast<uint64_t>(position));
    const uint64_t bits = mixed(key + static_cast<uint64_t>(token) * 0x9E3779B97F4A7C15u) >> 11;
    return -std::log(-std::log((static_cast<double>(bits) + 0.5) * 0x1p-53));
}

struct Sampling {
    int64_t seed = 0;
    double temperature = 0;  // 0: greedy
    int64_t top_k = 0;
    double top_p = 1, min_p = 0;

    bool is_greedy() const { return !(temperature > 0); }

    // By how much the score of each of the likeliest tokens, packed and likeliest first, exceeds that of the best other one,
    // or falls short of it: log p / temperature + noise. All other tokens together stand for one, with the median of their
    // best score.
    void margins(std::span<const int> likeliest, int64_t position, std::vector<double>& found) const {
        constexpr double NONE = -std::numeric_limits<double>::infinity(), MEDIAN = 0.36651292058166435;
        const auto log_of = [&](int packed) { return -(packed & ((1 << TOP_BITS) - 1)) / 16.0; };
        found.clear();
        double mass = 0, scaled_mass = 0;
        for (const int packed : likeliest) {
            mass += std::exp(log_of(packed));
            scaled_mass += std::exp(log_of(packed) / temperature);
        }
        if (likeliest.empty()) return;
        // The others are taken to be as likely, each, as the last of these.
        const double last = log_of(likeliest.back());
        double rest = std::max(1 - mass, 1e-4) * std::exp(last / temperature - last);
        const double floor = min_p > 0 ? log_of(likeliest.front()) / temperature + std::log(min_p) : NONE;
        const double enough = top_p * (scaled_mass + rest);
        double reached = 0;
        int64_t rank = 0;
        for (const int packed : likeliest) {
            const double scaled = log_of(packed) / temperature;
            // The likeliest stays whatever the filters, where sums underflow, too.
            const bool stays = rank == 0 || (scaled >= floor && (top_k <= 0 || rank < top_k) && (top_p >= 1 || reached < enough));
            reached += std::exp(scaled);
            ++rank;
            found.push_back(stays ? scaled + gumbel(seed, position, packed >> TOP_BITS) : NONE);
        }
        if (last / temperature < floor || (top_k > 0 && rank >= top_k) || (top_p < 1 && reached >= enough)) rest = 0;
        double best = rest > 0 ? std::log(rest) + MEDIAN : NONE, second = NONE;
        for (const double score : found) {
            second = std::max(second, std::min(best, score));
            best = std::max(best, score);
        }
        for (double& score : found) score -= score == best ? second : best;
    }
};

}  // namespace outrider
