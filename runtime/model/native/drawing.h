// The token that a row chooses by more than its largest logit: what runtime.model.sampler.draw_on_torch says.
//
// The noise of a token is -log(E), E = -log(u) of a uniform u, so the best score x / T - log(E) belongs to the smallest E / w,
// where w = exp((x - largest) / T). Since E is at least 1 - u, which costs no logarithm, hardly any token's own noise has to
// be computed: that of those where (1 - u) / w is below the smallest E / w so far.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "vectors.h"

namespace {

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;
constexpr float SLACK = 1.002f;  // by how much the bounds in float32 may be wrong, and more
constexpr double NO_LEAST = -std::numeric_limits<double>::infinity();

typedef uint64_t Keys __attribute__((vector_size(64)));
typedef int64_t Signed __attribute__((vector_size(64)));
typedef float HalfVec __attribute__((vector_size(32)));
constexpr int KEYS = 8;

// One row's; decoder.py mirrors it.
struct Draw {
    const float* logits;  // this shard's slice
    const uint32_t* mask;  // bits of the tokens, of the whole vocabulary, that may be chosen; null: all
    const int32_t *counted, *counts, *biased;
    const float* biases;
    int64_t num_counted, num_biased;
    int64_t seed, position, top_k;
    double temperature, top_p, min_p;  // temperature 0: greedy, and no filters
    double repetition, presence, frequency;
    double least;  // logits below are left out; NaN: the filters decide here
};

// SplitMix64's finaliser (Steele, Lea and Flood, 2014)
template <class T>
INLINE T mix(T x) {
    x += GOLDEN;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

INLINE double noise_of(uint64_t key, int64_t token) {
    const double uniform = ((double)(mix(key + (uint64_t)token * GOLDEN) >> 11) + 0.5) * 0x1p-53;
    return -std::log(-std::log(uniform));
}

// Not more than 1 - u of 16 tokens, of which the first 8 have these places in the sequence of hashes
INLINE Vec distances(Keys places) {
    Vec both;
    for (int half = 0; half < 2; ++half) {
        const Signed rest = (Signed)(~mix(places + half * KEYS * GOLDEN) >> 11);  // 2^53 - 1 - bits
        const HalfVec real = __builtin_convertvector(rest, HalfVec) * 0x1p-53f;
        std::memcpy((char*)&both + half * sizeof real, &real, sizeof real);
    }
    return both;
}

INLINE bool any(Ints condition) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)condition, (__m512i)condition) != 0;
#else
    int32_t found = 0;
    for (int lane = 0; lane < LANES; ++lane) found |= condition[lane];
    return found != 0;
#endif
}

// Logits, padded with -inf to a multiple of 32, and what they weigh
struct Weighed {
    std::vector<float> logits, weights;  // room for them
    int64_t size = 0;

    // Make room for so many.
    void resize(int64_t count) {
        size = round_up(count, PANEL);
        if (std::ssize(logits) < size + LANES) logits.resize(size + LANES), weights.resize(size + LANES);
        std::fill(&logits[count], &logits[size], -INFINITE);
        std::fill(&weights[count], &weights[size], 0.f);
    }

    struct Part {
        int64_t count = 0;
        double mass = 0;
    };

    // Those whose logits are at least this
    Part from(float least) const {
        Ints count = {};
        double mass = 0;
        for (int64_t start = 0; start < size; start += 64 * LANES) {  // sums of few stay exact enough
            Vec some = {};
            for (int64_t i = start; i < std::min(size, start + 64 * LANES); i += LANES) {
                const Ints is_in = widen(&logits[i]) >= least;
                some += select(is_in, widen(&weights[i]), Vec{});
                count -= is_in;
            }
            mass += total(some);
        }
        Part part{0, mass};
        for (int lane = 0; lane < LANES; ++lane) part.count += count[lane];
        return part;
    }

    // Those, in their order
    void keep(float least, Weighed& kept) const {
        kept.resize(size);
        int64_t count = 0;
        for (int64_t i = 0; i < size; i += LANES) {
            const Vec some = widen(&logits[i]);
#if defined(__AVX512F__)
            const __mmask16 is_in = _mm512_cmp_ps_mask((__m512)some, _mm512_set1_ps(least), _CMP_GE_OQ);
            const auto put = [&](Vec values, float* to) {
                narrow((Vec)_mm512_maskz_compress_ps(is_in, (__m512)values), to);
            };
            put(some, &kept.logits[count]), put(widen(&weights[i]), &kept.weights[count]);
            count += __builtin_popcount(is_in);
#else
            if (!any(some >= least)) continue;
            for (int lane = 0; lane < LANES; ++lane) {
                if (!(logits[i + lane] >= least)) continue;
                kept.logits[count] = logits[i + lane], kept.weights[count++] = weights[i + lane];
            }
#endif
        }
        kept.resize(count);
    }

    // The largest logit such that it and all larger ones are enough; `floor`, which none is below, if they never are.
    // `most` is the largest there is, `stride` how far to go down at first.
    template <class Enough>
    float least(float most, double stride, float floor, Enough enough) const {
        // Down in growing strides, until they are enough
        float above = std::nextafter(most, INFINITE), below = most;
        Part larger, all;  // those from `above` on, and from `below` on
        for (;; stride *= 2) {
            below = std::max((float)(most - stride), floor);
            all = from(below);
            if (enough(all)) break;
            if (below <= floor || stride > 1e30) return floor;
            above = below, larger = all;
        }
        // Then halves, until what lies between can be sorted
        for (int halving = 0; halving < 24 && all.count - larger.count > MOST_SORTED; ++halving) {
            const float middle = below + (above - below) / 2;
            if (middle <= below || middle >= above) break;
            const Part part = from(middle);
            if (enough(part)) below = middle, all = part;
            else above = middle, larger = part;
        }
        static thread_local std::vector<std::pair<float, float>> between;
        between.clear();
        for (int64_t i = 0; i < size; i += LANES) {
            const Vec some = widen(&logits[i]);
            if (!any((some >= below) & (some < above))) continue;
            for (int64_t lane = i; lane < i + LANES; ++lane)
                if (logits[lane] >= below && logits[lane] < above) between.emplace_back(logits[lane], weights[lane]);
        }
        std::sort(between.begin(), between.end(), std::greater<>());
        for (const auto& [logit, weight] : between) {
            ++larger.count;
            larger.mass += weight;
            if (enough(larger)) return logit;
        }
        return below;  // sums in another order fell short by a rounding
    }

    static constexpr int64_t MOST_SORTED = 64;
};

// A row's logits behind mask, biases and penalties
class Row {
   public:
    // Of `count` tokens from id `first` on
    void load(const Draw& draw, int64_t first, int64_t count) {
        all_.resize(count);
        std::copy_n(draw.logits, count, all_.logits.begin());
        if (draw.mask)
            for (int64_t i = 0; i < count; ++i)
                if (const int64_t id = first + i; !(draw.mask[id / 32] >> id % 32 & 1)) all_.logits[i] = -INFINITE;
        for (int64_t i = 0; i < draw.num_biased; ++i)
            if (const int64_t place = draw.biased[i] - first; place >= 0 && place < count) all_.logits[place] += draw.biases[i];
        const float repetition = draw.repetition ? (float)draw.repetition : 1.0f;
        for (int64_t i = 0; i < draw.num_counted; ++i) {
            const int64_t place = draw.counted[i] - first;
            if (place < 0 || place >= count) continue;
            const float times = (float)draw.counts[i];
            float logit = all_.logits[place];
            logit = logit > 0 ? logit / repetition : logit * repetition;
            logit -= (float)draw.frequency * times;
            if (times > 0) logit -= (float)draw.presence;
            all_.logits[place] = logit;
        }
    }

    void load(const float* logits, int64_t count) {
        all_.resize(count);
        std::copy_n(logits, count, all_.logits.begin());
    }

    const float* logits() const { return all_.logits.data(); }

    // (logit, place) of the largest, the first of equals
    std::pair<float, int64_t> largest() const {
        Vec most = widen(&all_.logits[0]);
        for (int64_t i = LANES; i < all_.size; i += LANES) most = larger(widen(&all_.logits[i]), most);
        const float found = maximum(most);
        for (int64_t i = 0; i < all_.size; i += LANES)
            if (any(widen(&all_.logits[i]) == found)) return {found, std::find(&all_.logits[i], &all_.logits[i] + LANES, found) - &all_.logits[0]};
        return {found, 0};
    }

    void weigh(float most, double temperature) {
        const float factor = (float)(1 / temperature);
        for (int64_t i = 0; i < all_.size; i += LANES)
            narrow(weight_of((widen(&all_.logits[i]) - most) * factor), &all_.weights[i]);
    }

    // The smallest logit that stays under min-p, top-k and top-p, as runtime.model.sampler.least_kept says. `weigh` comes first.
    float least_kept(float most, const Draw& draw) {
        const double temperature = draw.temperature;
        float least = draw.min_p > 0 ? least_likely(most, temperature, draw.min_p) : -INFINITE;
        if (draw.top_k <= 0 && draw.top_p >= 1) return least;
        // Few tokens can be the last one kept: those that are no less likely than some k, or of which, all as likely as
        // the least of them, the whole vocabulary had no more than what top-p leaves out.
        double whole = 0;
        float lower = least;
        if (draw.top_k > 0) {
            lower = std::max(lower, kth_block(draw.top_k));
        } else {
            whole = all_.from(least).mass;
            const double share = (1 - draw.top_p) * whole / all_.size / SLACK;
            if (share > 1e-30) lower = std::max(lower, (float)(most + temperature * std::log(share)));
        }
        all_.keep(lower, few_);
        if (draw.top_k > 0) {
            least = few_.least(most, temperature, lower, [&](Weighed::Part part) { return part.count >= draw.top_k; });
            whole = few_.from(least).mass;
        }
        if (draw.top_p >= 1) return least;
        return few_.least(most, temperature, std::max(least, lower),
                          [&](Weighed::Part part) { return part.mass >= draw.top_p * whole; });
    }

    // The best score, and where it is; tokens below `least` are left out.
    std::pair<double, int64_t> draw(const Draw& draw, int64_t first, float least, float most, int64_t place) const {
        const uint64_t key = mix(mix((uint64_t)draw.seed) + (uint64_t)draw.position);
        const auto score_of = [&](int64_t i) { return (double)all_.logits[i] / draw.temperature + noise_of(key, first + i); };
        double best = score_of(place);
        float bound = bound_of(best, most, draw.temperature);
        const Keys lane = {0, 1, 2, 3, 4, 5, 6, 7};
        Keys places = (lane + (uint64_t)first) * GOLDEN + key;
        const auto near = [&](int64_t i, Keys places) {
            return (distances(places) <= widen(&all_.weights[i]) * bound) & (widen(&all_.logits[i]) >= least);
        };
        for (int64_t start = 0; start < all_.size; start += PANEL, places += PANEL * GOLDEN) {
            const Ints first_half = near(start, places), second_half = near(start + LANES, places + LANES * GOLDEN);
            if (!any(first_half | second_half)) continue;
            for (int64_t i = start; i < start + PANEL; ++i) {
                if (!(i < start + LANES ? first_half[i - start] : second_half[i - start - LANES])) continue;
                const double score = score_of(i);
                if (score < best || (score == best && i >= place)) continue;
                best = score, place = i;
                bound = bound_of(best, most, draw.temperature);
            }
        }
        return {best, place};
    }

   private:
    // What E / w must not exceed for a better score than this
    static float bound_of(double score, float most, double temperature) {
        return (float)std::exp((double)most / temperature - score) * SLACK;
    }

    // The smallest logit that is at least `min_p` times as likely as the largest
    static float least_likely(float most, double temperature, double min_p) {
        const double floor = (double)most / temperature + std::log(min_p);
        const auto stays = [&](float logit) { return (double)logit / temperature >= floor; };
        float least = (float)(floor * temperature);
        while (!stays(least)) least = std::nextafter(least, INFINITE);
        while (stays(std::nextafter(least, -INFINITE))) least = std::nextafter(least, -INFINITE);
        return least;
    }

    // A logit that at least k reach: the kth largest of the largest in every vector
    float kth_block(int64_t k) {
        if (k * LANES > all_.size) return -INFINITE;
        blocks_.clear();
        for (int64_t i = 0; i < all_.size; i += LANES) blocks_.push_back(maximum(widen(&all_.logits[i])));
        std::nth_element(blocks_.begin(), blocks_.begin() + (k - 1), blocks_.end(), std::greater<>());
        return blocks_[k - 1];
    }

    Weighed all_, few_;
    std::vector<float> blocks_;
};

// The best score of this shard's `count` tokens from id `first` on, and where it is
std::pair<double, int64_t> draw_one(Row& row, const Draw& draw, int64_t first, int64_t count) {
    row.load(draw, first, count);
    const auto [most, place] = row.largest();
    if (!(draw.temperature > 0) || !(most > -INFINITE)) return {most, place};
    row.weigh(most, draw.temperature);
    const float least = std::isnan(draw.least) ? row.least_kept(most, draw) : (float)draw.least;
    if (most < least) return {-INFINITE, place};  // other shards have what is left
    return row.draw(draw, first, least, most, place);
}

}  // namespace
