// Dividing a step's rows among the LP replicas: each gets subtrees, with the ancestors they need.

#pragma once

#include <bit>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace outrider {

class Partition {
   public:
    static constexpr int MOST_REPLICAS = 31;

    // `parents`: per row its parent's index, lower than its own, or -1
    Partition(std::span<const int> parents, int num_replicas) : parents_(parents), num_replicas_(num_replicas) {
        if (num_replicas == 1 || parents.empty()) {
            replicas.assign(parents.size(), 1);
            return;
        }
        find_leaves();
        int low = (static_cast<int>(parents.size()) + num_replicas - 1) / num_replicas;
        int high = static_cast<int>(parents.size());
        while (low < high) {
            const int size = (low + high) / 2;
            if (cut(size)) high = size;
            else low = size + 1;
        }
        if (replicas.empty()) cut(low);  // else the last cut that fitted is the one
    }

    std::vector<int> replicas;  // per row the bit set of the replicas that have it

    // Per row the first replica that has it
    std::vector<int> owners() const {
        std::vector<int> owners;
        for (const int mask : replicas) owners.push_back(std::countr_zero(static_cast<unsigned>(mask)));
        return owners;
    }

   private:
    // Depth first, so that neighbours share their ancestors
    void find_leaves() {
        const int count = static_cast<int>(parents_.size());
        std::vector<int> child(count + 1, -1), sibling(count, -1);  // the last child is the first root
        for (int row = count - 1; row >= 0; --row) {
            int& first = child[parents_[row] >= 0 ? parents_[row] : count];
            sibling[row] = std::exchange(first, row);
        }
        int row = child[count];
        while (row >= 0) {
            while (child[row] >= 0) row = child[row];
            leaves_.push_back(row);
            while (row >= 0 && sibling[row] < 0) row = parents_[row];
            if (row >= 0) row = sibling[row];
        }
    }

    // Give each replica a run of leaves with their ancestors, `size` rows at most; false, and nothing changed, where
    // that takes too many replicas.
    bool cut(int size) {
        std::vector<int> masks(parents_.size());
        std::vector<int> path;
        int replica = 0, used = 0;
        for (const int leaf : leaves_) {
            while (true) {
                path.clear();
                for (int row = leaf; row >= 0 && !(masks[row] >> replica & 1); row = parents_[row]) path.push_back(row);
                if (used + static_cast<int>(path.size()) <= size) break;
                if (used == 0 || replica + 1 == num_replicas_) return false;  // too long for any, or none is left
                ++replica;
                used = 0;
            }
            for (const int row : path) masks[row] |= 1 << replica;
            used += static_cast<int>(path.size());
        }
        replicas = std::move(masks);
        return true;
    }

    std::span<const int> parents_;
    int num_replicas_;
    std::vector<int> leaves_;
};

}  // namespace outrider
