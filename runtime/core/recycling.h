// Tables of what the model gave after a token the last time (Token Recycling, Luo et al., 2024, arXiv 2408.08696).
//
// The paper's table is keyed by one token. Here there is one for the last token, one for the last two and one for the
// last three: a longer context says more, a shorter one is known more often. Where none of them knows enough, there is
// what the model says behind the last token whatever stood before it (Stewart et al., 2024, arXiv 2411.03786).

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "rows.h"

namespace outrider {

// runtime.step.TOP_BITS: low bits of a packed likeliest token, its log-probability in sixteenths of a nat below zero
constexpr int TOP_BITS = 8;

// Of log-probability, each half a nat wide; the last is open.
constexpr int CLASSES = 16;

// From keys to places, in one array: the next free slot from a key's own on, and no gaps between.
class PlaceTable {
   public:
    size_t size() const { return count_; }

    // -1 where the key is not there
    int find(uint64_t key) const { return slots_[slot_of(key)].place; }

    void insert(uint64_t key, int place) {
        if (2 * ++count_ > slots_.size()) grow();
        slots_[slot_of(key)] = {key, place};
    }

    // Of a key that is there
    void erase(uint64_t key) {
        const size_t mask = slots_.size() - 1;
        size_t gap = slot_of(key);
        for (size_t next = (gap + 1) & mask; slots_[next].place >= 0; next = (next + 1) & mask) {
            const size_t own = hash(slots_[next].key) & mask;
            if (((next - own) & mask) < ((next - gap) & mask)) continue;  // it stands where it may, behind the gap
            slots_[gap] = slots_[next];
            gap = next;
        }
        slots_[gap].place = -1;
        --count_;
    }

   private:
    struct Slot {
        uint64_t key = 0;
        int place = -1;
    };

    static size_t hash(uint64_t key) {
        key *= 0x9E3779B97F4A7C15u;
        return key ^ key >> 32;
    }

    // Where the key stands, or would
    size_t slot_of(uint64_t key) const {
        const size_t mask = slots_.size() - 1;
        size_t slot = hash(key) & mask;
        while (slots_[slot].place >= 0 && slots_[slot].key != key) slot = (slot + 1) & mask;
        return slot;
    }

    void grow() {
        const std::vector<Slot> before = std::exchange(slots_, std::vector<Slot>(2 * slots_.size()));
        for (const Slot& slot : before)
            if (slot.place >= 0) slots_[slot_of(slot.key)] = slot;
    }

    size_t count_ = 0;
    std::vector<Slot> slots_ = std::vector<Slot>(1024);
};

// One table: contexts of `order` tokens. The one not updated for longest goes first.
class ContextTable {
   public:
    static constexpr int MOST_KEPT = 8;  // likeliest tokens per context

    ContextTable(int order, size_t max_contexts) : order_(order), max_contexts_(max_contexts) {}

    size_t size() const { return places_.size(); }

    void update(const Tail& tail, std::span<const int> top) {
        const uint64_t key = key_of(tail);
        int place = places_.find(key);
        if (place >= 0) {
            unlink(place);
        } else if (entries_.size() < max_contexts_) {
            place = static_cast<int>(entries_.size());
            entries_.emplace_back();
            places_.insert(key, place);
        } else {
            place = oldest_;
            places_.erase(entries_[place].key);
            unlink(place);
            places_.insert(key, place);
        }
        Entry& entry = entries_[place];
        entry.key = key;
        entry.count = static_cast<int>(std::min<size_t>(top.size(), MOST_KEPT));
        std::copy_n(top.begin(), entry.count, entry.top.begin());
        link(place);
    }

    // The likeliest tokens behind a tail, packed; none where nothing is known.
    std::span<const int> lookup(const Tail& tail) const {
        const int place = places_.find(key_of(tail));
        if (place < 0) return {};
        const Entry& entry = entries_[place];
        return {entry.top.data(), static_cast<size_t>(entry.count)};
    }

   private:
    struct Entry {
        uint64_t key = 0;
        int older = -1, newer = -1;
        int count = 0;
        std::array<int, MOST_KEPT> top{};
    };

    // Packed tokens have TOP_BITS to spare in 32 bits, and three of the models' vocabularies fit into one word.
    uint64_t key_of(const Tail& tail) const {
        uint64_t key = 0;
        for (int back = 0; back < order_; ++back) key = key << 21 | static_cast<uint32_t>(tail[back]);
        return key;
    }

    void unlink(int place) {
        const auto [older, newer] = std::pair(entries_[place].older, entries_[place].newer);
        (older >= 0 ? entries_[older].newer : oldest_) = newer;
        (newer >= 0 ? entries_[newer].older : newest_) = older;
    }

    void link(int place) {
        entries_[place].older = newest_;
        entries_[place].newer = -1;
        (newest_ >= 0 ? entries_[newest_].newer : oldest_) = place;
        newest_ = place;
    }

    int order_;
    size_t max_contexts_;
    int oldest_ = -1, newest_ = -1;
    PlaceTable places_;
    std::vector<Entry> entries_;
};

// What the model says behind each single token, packed [V, k]; it does not change.
class Bigrams {
   public:
    Bigrams(std::vector<int> top, int k) : top_(std::move(top)), k_(k) {}

    // None for tokens that are not in the table
    std::span<const int> lookup(int token) const {
        if (token < 0 || static_cast<size_t>(token + 1) * k_ > top_.size()) return {};
        return {top_.data() + static_cast<size_t>(token) * k_, static_cast<size_t>(k_)};
    }

   private:
    std::vector<int> top_;
    int k_;
};

// The model's likeliest next tokens by the last one, two and three tokens
class RecycleTable {
   public:
    static constexpr int MAX_ORDER = 3;  // most tokens of context; order 0 are the bigrams

    // At most so many contexts per table; the default ones take some 20 MiB for all three when full. `bigrams` may be
    // null.
    RecycleTable(std::shared_ptr<const Bigrams> bigrams, size_t max_contexts)
        : bigrams_(std::move(bigrams)),
          tables_{ContextTable(1, max_contexts), ContextTable(2, max_contexts), ContextTable(3, max_contexts)} {}

    size_t size() const { return tables_[0].size() + tables_[1].size() + tables_[2].size(); }

    // The model's likeliest tokens, packed, after a text that ends in `tail`
    void update(const Tail& tail, std::span<const int> top) {
        for (int order = 1; order <= std::min(MAX_ORDER, tail.size()); ++order) tables_[order - 1].update(tail, top);
    }

    // The two longest contexts known, longest first: give(order, likeliest tokens, packed)
    template <typename Give>
    void lookup(const Tail& tail, Give give) const {
        int found = 0;
        for (int order = std::min(MAX_ORDER, tail.size()); order > 0 && found < 2; --order) {
            const auto top = tables_[order - 1].lookup(tail);
            if (top.empty()) continue;
            give(order, top);
            ++found;
        }
        if (found == 2 || bigrams_ == nullptr || tail.size() == 0) return;
        const auto top = bigrams_->lookup(tail[0]);
        if (!top.empty()) give(0, top);
    }

   private:
    std::shared_ptr<const Bigrams> bigrams_;
    std::array<ContextTable, MAX_ORDER> tables_;
};

// Of a packed token, its id and the class of its probability
inline std::pair<int, int> unpacked(int packed) {
    return {packed >> TOP_BITS, std::min((packed & ((1 << TOP_BITS) - 1)) >> 3, CLASSES - 1)};
}

}  // namespace outrider
