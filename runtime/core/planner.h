// What a step's rows are spent on: as many candidates as pay for themselves, by the measured cost of a step.
//
// A step of T rows takes t(T) seconds (runtime.tuning.cost) and emits, in expectation, one token per sequence plus the
// sum of the candidates' probabilities. The planner grows the trees of all running sequences together, likeliest candidate
// first, and cuts them where expected tokens per second are highest. Where no candidate pays, none is run.

#pragma once

#include <algorithm>
#include <memory>
#include <queue>
#include <span>
#include <utility>
#include <vector>

#include "tree.h"

namespace outrider {

// Candidates between two looks at whether still more could pay
constexpr int CHECK_EVERY = 8;

// Expected gain below which plain decoding is kept: estimates are not better than this.
constexpr double CAUTION = 0.02;

// One sequence's tree, and how many candidates it may get
using BoundedTree = std::pair<std::shared_ptr<CandidateTree>, int>;

// Whether more candidates, none likelier than this, could bring the rate beyond the best so far. `rest` is t(T) from
// the next row on.
inline bool could_pay(double expected, double probability, std::span<const double> rest, double best_rate) {
    for (const double seconds : rest)
        if ((expected += probability) > best_rate * seconds) return true;
    return false;
}

// Grow the trees to where expected tokens per second are highest.
//
// `num_rows`: rows that the step has without them. `seconds`: t(T) for T = 0, 1, ..., non-decreasing; its length bounds
// the rows. Returns the expected number of tokens of the step.
inline double grow(const std::vector<BoundedTree>& trees, int num_rows, std::span<const double> seconds) {
    double expected = static_cast<double>(trees.size()), best_expected = expected;
    double best_rate = (1 + CAUTION) * expected / seconds[num_rows];
    std::vector<int> kept(trees.size()), best_kept = kept;
    using Next = std::pair<double, int>;  // (probability, minus the tree's index)
    std::priority_queue<Next> queue;
    for (size_t index = 0; index < trees.size(); ++index)
        if (trees[index].second > 0) queue.emplace(trees[index].first->next_probability(), -static_cast<int>(index));
    for (size_t count = 1; !queue.empty() && num_rows + count < seconds.size(); ++count) {
        const auto [probability, minus_index] = queue.top();
        queue.pop();
        if (probability == 0) break;
        const auto rest = seconds.subspan(num_rows + count);
        if (count % CHECK_EVERY == 1 && !could_pay(expected, probability, rest, best_rate)) break;
        const auto& [tree, room] = trees[-minus_index];
        tree->grow();
        ++kept[-minus_index];
        expected += probability;
        if (expected / rest.front() > best_rate) {
            best_rate = expected / rest.front();
            best_expected = expected;
            best_kept = kept;
        }
        if (tree->num_candidates() < room) queue.emplace(tree->next_probability(), minus_index);
    }
    for (size_t index = 0; index < trees.size(); ++index) trees[index].first->truncate(best_kept[index]);
    return best_expected;
}

}  // namespace outrider
