// What the rows of one sequence see, and in which columns the CPU kernels find the keys (runtime/model/native/kernels.cpp).

#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <vector>

#include "retention.h"

namespace outrider {

// [t, t] row i has row j as an ancestor, or is row j. Parents come before their children; -1 is none.
inline std::vector<uint8_t> ancestry(std::span<const int32_t> parents) {
    const size_t count = parents.size();
    std::vector<uint8_t> sees(count * count);
    for (size_t row = 0; row < count; ++row) {
        const int parent = parents[row];
        if (parent >= static_cast<int>(row) || parent < -1)
            throw std::invalid_argument("a row's parent must come before it, in the same slot");
        if (parent >= 0) std::copy_n(&sees[parent * count], parent + 1, &sees[row * count]);
        sees[row * count + row] = 1;
    }
    return sees;
}

// The rows of one sequence in a step, and which keys they see: those of n stored tokens, and of the t rows themselves
class Sight {
   public:
    // `positions`, `tokens` and `parents` [t] of the rows (parents among them, -1: none). `window`: the layer's own sliding
    // window; it cuts nothing where positions are slots (ModelSpec.check_cache).
    Sight(const Retention& retained, std::span<const int64_t> positions, std::span<const int64_t> tokens,
          std::span<const int32_t> parents, std::optional<int64_t> window)
        : retained(retained), own(positions), parents(parents), window_(retained.slot ? std::nullopt : window) {
        for (size_t row = 0; row < own.size(); ++row) anchored_.push_back(retained.may_anchor(own[row], tokens[row]));
    }

    const Retention& retained;
    const std::span<const int64_t> own;  // positions
    const std::span<const int32_t> parents;

    int64_t num_stored() const { return retained.num_stored(); }
    int64_t num_rows() const { return std::ssize(own); }

    int64_t position_of(int64_t key) const {
        return key < num_stored() ? retained.positions[key] : own[key - num_stored()];
    }

    bool sees_stored(int64_t row, int64_t key) const { return sees(row, retained.positions[key], retained.anchored[key]); }

    // Where `other` is an ancestor of the row, or the row itself
    bool sees_own(int64_t row, int64_t other) const { return sees(row, own[other], anchored_[other]); }

    // Whether the row sees all its ancestors
    bool sees_ancestors(int64_t row) const { return sees(row, own[0], false); }

    // Whether all rows see all that is stored
    bool sees_all_stored() const {
        const int64_t newest = std::ranges::max(own);
        return retained.sees_all_stored(newest) && (num_stored() == 0 || is_near(newest, retained.positions[0]));
    }

   private:
    bool is_near(int64_t query, int64_t key) const { return !window_ || key > query - *window_; }

    bool sees(int64_t row, int64_t key, bool is_anchored) const {
        return is_near(own[row], key) && retained.sees(own[row], key, is_anchored);
    }

    std::optional<int64_t> window_;
    std::vector<uint8_t> anchored_;
};

// Columns of keys in blocks, by position: a row's sum runs through them in that order, whether its ancestors are in the
// cache or in the step. A column holds an index into the stored tokens and the rows behind them, or -1.
//
// All rows share the first `columns`. Behind these every row of a tree has columns of its own, its tail: the rest of what it
// sees.
class Keys {
   public:
    Keys(const Sight& sight, int64_t block) {
        int64_t chained = 0;  // rows that follow one another, the first
        while (chained < sight.num_rows() && sight.parents[chained] == chained - 1) ++chained;
        num_shared = sight.num_stored() + chained;
        if (chained < sight.num_rows()) hang_tails(sight, std::ranges::min(sight.own.subspan(chained)) / block * block, block);
        int64_t last = -1;
        for (int64_t key = 0; key < num_shared; ++key) {
            const int64_t position = sight.position_of(key);
            if (position / block != last) columns.resize(columns.size() + block, -1);  // blocks without a key are left out
            last = position / block;
            columns[columns.size() - block + position % block] = key;
        }
        if (hides_shared(sight)) show(sight);
    }

    Longs columns;                 // [C]
    Longs tails;                   // [t, num_tail], or none
    int64_t num_tail = 0;
    int64_t num_shared = 0;        // keys that `columns` hold: the first ones
    std::vector<uint8_t> visible;  // [t, C], or none: a row sees all columns that hold keys up to itself

   private:
    // Of positions from `start` on
    void hang_tails(const Sight& sight, int64_t start, int64_t block) {
        const int64_t n = sight.num_stored(), t = sight.num_rows();
        while (num_shared > 0 && sight.position_of(num_shared - 1) >= start) --num_shared;
        int64_t newest = start;
        for (int64_t row = std::max<int64_t>(num_shared - n, 0); row < t; ++row) newest = std::max(newest, sight.own[row]);
        num_tail = (newest - start + block) / block * block;
        tails.assign(t * num_tail, -1);
        for (int64_t row = 0; row < t; ++row) {
            int64_t* tail = &tails[row * num_tail];
            for (int64_t key = num_shared; key < n; ++key)
                if (sight.sees_stored(row, key)) tail[sight.position_of(key) - start] = key;
            for (int64_t other = row; other >= 0 && n + other >= num_shared; other = sight.parents[other])
                if (sight.sees_own(row, other)) tail[sight.own[other] - start] = n + other;
        }
    }

    // Whether there is a row that does not see all shared keys up to itself
    bool hides_shared(const Sight& sight) const {
        const int64_t n = sight.num_stored(), t = sight.num_rows();
        if (!sight.sees_all_stored())
            for (int64_t row = 0; row < t; ++row)
                for (int64_t key = 0; key < std::min(n, num_shared); ++key)
                    if (!sight.sees_stored(row, key)) return true;
        const int64_t shared = std::max<int64_t>(num_shared - n, 0);  // rows of the chain
        for (int64_t row = 0; shared > 0 && row < t; ++row) {
            int64_t seen = 0, other = row;
            for (; other >= 0 && !(other < shared && sight.sees_ancestors(row)); other = sight.parents[other])
                seen += other < shared && sight.sees_own(row, other);
            if (seen + other + 1 != std::min(row + 1, shared)) return true;
        }
        return false;
    }

    void show(const Sight& sight) {
        const int64_t n = sight.num_stored(), t = sight.num_rows(), width = std::ssize(columns);
        visible.assign(t * width, 0);
        std::vector<uint8_t> is_ancestor(t);
        for (int64_t row = 0; row < t; ++row) {
            std::ranges::fill(is_ancestor, 0);
            for (int64_t other = row; other >= 0; other = sight.parents[other]) is_ancestor[other] = 1;
            for (int64_t column = 0; column < width; ++column)
                if (const int64_t key = columns[column]; key >= 0)
                    visible[row * width + column] = key < n ? sight.sees_stored(row, key)
                                                            : is_ancestor[key - n] && sight.sees_own(row, key - n);
        }
    }
};

}  // namespace outrider
