// Which tokens of its past a sequence keeps, sees, and where it sees them: decided from token ids alone, on every rank and
// by the coordinator alike. runtime/retention.py says what the policies are.

#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

namespace outrider {

constexpr int64_t UNBOUNDED = int64_t{1} << 62;

using Longs = std::vector<int64_t>;

// How the stored tokens change: some are dropped, and the anchors' keys may move to other positions.
struct Compaction {
    Longs kept;   // indices into the tokens stored before, ascending
    Longs turns;  // for the first of those kept, the anchors: by how many positions their keys, as stored first, are turned
    int64_t num_turned_before = 0;  // how many of the tokens stored before, the first ones, an earlier compaction has turned
};

// What is stored of one sequence in a group of layers
class Retention {
   public:
    Retention(bool slot, std::vector<int> separators, int64_t num_initial)
        : slot(slot), num_initial(num_initial), separators_(std::move(separators)) {
        std::ranges::sort(separators_);
    }
    virtual ~Retention() = default;

    const bool slot;  // positions are those in the cache
    const int64_t num_initial;
    int64_t max_stored = 0;  // most tokens that stay stored between two steps
    int64_t max_turned = 0;  // most of them whose keys get turned

    int64_t length = 0;             // tokens the sequence has had
    Longs positions;                // in the text, of the tokens stored, ascending
    std::vector<uint8_t> anchored;  // whether the policy keeps the token when the window leaves it

    const std::vector<int>& separators() const { return separators_; }

    int64_t num_stored() const { return std::ssize(positions); }

    bool may_anchor(int64_t position, int token) const {
        return position < num_initial || std::ranges::binary_search(separators_, token);
    }

    virtual void reset() {
        length = 0;
        positions.clear();
        anchored.clear();
    }

    // Store the next tokens of the sequence.
    std::optional<Compaction> commit(std::span<const int> tokens) {
        for (const int token : tokens) {
            anchored.push_back(may_anchor(length, token));
            positions.push_back(length++);
        }
        return compact_after(std::ssize(tokens));
    }

    // All that decides what comes next, for another rank to `restore`: length, anchors in front, then position and whether it
    // is anchored of each token stored.
    Longs state() const {
        Longs words{length, num_in_front()};
        for (size_t i = 0; i < positions.size(); ++i) {
            words.push_back(positions[i]);
            words.push_back(anchored[i]);
        }
        return words;
    }

    void restore(const Longs& words) {
        if (words.size() < 2 || words.size() % 2 || words[0] < std::ssize(words) / 2 - 1 ||
            std::ssize(words) / 2 - 1 > max_stored)
            throw std::invalid_argument("no state of a retention with this room");
        reset();
        length = words[0];
        for (size_t i = 2; i < words.size(); i += 2) {
            positions.push_back(words[i]);
            anchored.push_back(words[i + 1] != 0);
        }
        restored(words[1]);
    }

    // Make room for a turn of so many tokens, where the policy evicts per turn.
    virtual std::optional<Compaction> begin_turn(int64_t /*num_coming*/) { return {}; }

    // The first position that a row of the next step must not have: the tokens before are to be stored first.
    virtual int64_t horizon() const = 0;

    // Stored tokens, the first ones, whose distance to a row counts from the row's slot, not from its position
    virtual int64_t num_slot_anchors() const = 0;

    // The place in the cache of a row at this position
    virtual int64_t slot_of(int64_t position) const = 0;

    // Whether a row at `query` sees a token before it
    virtual bool sees(int64_t query, int64_t key, bool is_anchored) const = 0;

    // Whether rows up to `newest` see all stored tokens
    virtual bool sees_all_stored(int64_t newest) const = 0;

    // How many tokens each of these next ones sees, itself included
    virtual void num_seen(std::span<const int> tokens, Longs& counts) const = 0;

   protected:
    // Stored tokens, the first ones, that an earlier compaction has put there
    virtual int64_t num_in_front() const { return 0; }

    // The tokens stored are another's, of which so many stand in front.
    virtual void restored(int64_t /*num_in_front*/) {}

    // What is to change now that the last `num_new` tokens have been stored
    virtual std::optional<Compaction> compact_after(int64_t num_new) = 0;

    // Drop all but these.
    void keep(const Longs& kept) {
        for (int64_t i = 0; i < std::ssize(kept); ++i) {
            positions[i] = positions[kept[i]];
            anchored[i] = anchored[kept[i]];
        }
        positions.resize(kept.size());
        anchored.resize(kept.size());
    }

   private:
    std::vector<int> separators_;
};

// Anchors and a window of recent tokens (full: all of them). StreamingLLM section 3.2, SepLLM section 3.1.
class Sliding : public Retention {
   public:
    // `window` counts the current token, none is everything; `max_kept` bounds anchors and window together.
    //
    // Tokens that have left the window are dropped whenever the length is a multiple of `interval`, about an eighth of the
    // window, so that what is stored depends on the length alone, and not on how many tokens a step brought. It is a power
    // of two, so that equal chunks of a text find equally many tokens stored: torch makes kernels per shape.
    Sliding(std::optional<int64_t> window, int64_t max_kept, bool slot, std::vector<int> separators, int64_t num_initial)
        : Retention(slot, separators, num_initial), window(window) {
        if (slot && !separators.empty()) throw std::invalid_argument("with separators as anchors, slots are for Compacting");
        max_stored = max_kept;
        if (!window) return;
        interval_ = 1;
        while (interval_ < std::max<int64_t>(*window / 8, 16)) interval_ *= 2;
        max_stored += interval_;
    }

    const std::optional<int64_t> window;

    int64_t interval() const { return interval_; }

    void reset() override {
        Retention::reset();
        anchors_.clear();
    }

    int64_t horizon() const override {
        // Until then slots are positions, for staged sinks, too.
        return slot && window && length < num_initial ? num_initial + *window : UNBOUNDED;
    }

    int64_t num_slot_anchors() const override { return slot ? std::min(num_initial, num_stored()) : 0; }

    int64_t slot_of(int64_t position) const override { return std::min(position, num_initial + window.value() - 1); }

    bool sees(int64_t query, int64_t key, bool is_anchored) const override {
        return !window || is_anchored || key > query - *window;
    }

    bool sees_all_stored(int64_t newest) const override {
        for (size_t i = 0; window && i < positions.size() && positions[i] <= newest - *window; ++i)
            if (!anchored[i]) return false;
        return true;
    }

    void num_seen(std::span<const int> tokens, Longs& counts) const override {
        Longs anchors = window ? anchors_ : Longs();
        size_t passed = 0;  // anchors that have left the window
        for (int64_t position = length; const int token : tokens) {
            int64_t count = position + 1;
            if (window) {
                if (may_anchor(position, token)) anchors.push_back(position);
                while (passed < anchors.size() && anchors[passed] <= position - *window) ++passed;
                count = std::min(count, *window) + static_cast<int64_t>(passed);
            }
            counts.push_back(count);
            ++position;
        }
    }

   protected:
    void restored(int64_t) override {
        for (int64_t i = 0; window && i < num_stored(); ++i)
            if (anchored[i]) anchors_.push_back(positions[i]);
    }

    std::optional<Compaction> compact_after(int64_t num_new) override {
        if (!window) return {};
        for (int64_t i = num_stored() - num_new; i < num_stored(); ++i)
            if (anchored[i]) anchors_.push_back(positions[i]);
        const int64_t boundary = length - length % interval_;
        if (boundary <= length - num_new) return {};
        Compaction change;
        for (int64_t i = 0; i < num_stored(); ++i)
            if (anchored[i] || positions[i] > boundary - *window) change.kept.push_back(i);
        if (std::ssize(change.kept) == num_stored()) return {};
        keep(change.kept);
        return change;
    }

   private:
    int64_t interval_ = UNBOUNDED;
    Longs anchors_;  // their positions; none is ever dropped
};

// Initial tokens, the newest separators, and a recent run that is compacted when it is time.
//
// SepLLM section 3.3, and, with eviction per turn, StreamingLLM's demo. The layout is [initial tokens | separators | recent
// run]: the recent run is the paper's past and local windows.
class Compacting : public Retention {
   public:
    // `size` is c, the most tokens stored; `local` is w, how many of the newest stay after a compaction. None, for eviction
    // per turn: as many as leave room for the turn.
    Compacting(int64_t size, std::optional<int64_t> local, bool slot, std::vector<int> separators, int64_t num_initial,
               int64_t max_separators, bool compact_after_attention, bool per_turn)
        : Retention(slot, std::move(separators), num_initial),
          max_separators(max_separators),
          size_(size),
          local_(local),
          per_turn_(per_turn) {
        max_stored = size + compact_after_attention;
        max_turned = slot ? num_initial + max_separators : 0;
    }

    const int64_t max_separators;

    // Initial tokens and separators before the recent run; none until the first compaction
    int64_t num_anchors() const { return num_anchors_; }

    void reset() override {
        Retention::reset();
        num_anchors_ = 0;
    }

    int64_t horizon() const override { return per_turn_ ? UNBOUNDED : length + max_stored - num_stored(); }
    int64_t num_slot_anchors() const override { return slot ? num_anchors_ : 0; }
    int64_t slot_of(int64_t position) const override { return position - (length - num_stored()); }
    bool sees(int64_t, int64_t, bool) const override { return true; }
    bool sees_all_stored(int64_t) const override { return true; }

    void num_seen(std::span<const int> tokens, Longs& counts) const override {
        for (int64_t i = 1; i <= std::ssize(tokens); ++i) counts.push_back(num_stored() + i);
    }

    std::optional<Compaction> begin_turn(int64_t num_coming) override {
        if (!per_turn_ || num_stored() + num_coming <= size_) return {};
        return compact(num_coming);
    }

   protected:
    int64_t num_in_front() const override { return num_anchors_; }
    void restored(int64_t num_in_front) override { num_anchors_ = num_in_front; }

    std::optional<Compaction> compact_after(int64_t) override {
        if (num_stored() > max_stored) throw std::logic_error("more tokens stored than there is room for");
        if (per_turn_ || num_stored() < max_stored) return {};
        return compact(0);
    }

   private:
    Compaction compact(int64_t num_coming) {
        const int64_t count = num_stored(), initial = std::min(num_initial, count);
        const int64_t local = local_.value_or(std::max<int64_t>(size_ - initial - num_coming, 0));
        const int64_t start = std::max(count - local, initial);
        Longs separators;
        for (int64_t i = initial; i < start; ++i)
            if (anchored[i]) separators.push_back(i);
        if (std::ssize(separators) > max_separators) separators.erase(separators.begin(), separators.end() - max_separators);
        Compaction change;
        change.num_turned_before = num_slot_anchors();
        for (int64_t i = 0; i < initial; ++i) change.kept.push_back(i);
        change.kept.insert(change.kept.end(), separators.begin(), separators.end());
        for (int64_t i = start; i < count; ++i) change.kept.push_back(i);
        num_anchors_ = initial + std::ssize(separators);
        for (int64_t i = 0; i < num_slot_anchors(); ++i) change.turns.push_back(i - positions[change.kept[i]]);
        keep(change.kept);
        return change;
    }

    const int64_t size_;
    const std::optional<int64_t> local_;
    const bool per_turn_;
    int64_t num_anchors_ = 0;
};

// The coordinator's account of what one sequence keeps, over all groups of layers
class Ledger {
   public:
    using Group = std::pair<std::shared_ptr<Retention>, int>;  // and how many layers it has

    // `capacity`: most tokens that one may see where the policy is bounded
    Ledger(std::vector<Group> groups, std::optional<int64_t> capacity) : groups_(std::move(groups)), capacity_(capacity) {
        for (const auto& [retained, count] : groups_) num_layers_ += count;
    }

    int64_t length() const { return groups_[0].first->length; }

    // The first position that a row of the next step must not have
    int64_t horizon() const {
        int64_t nearest = UNBOUNDED;
        for (const auto& [retained, count] : groups_) nearest = std::min(nearest, retained->horizon());
        return nearest;
    }

    // Tokens that the newest token saw over all tokens up to it, mean over layers
    double kept_last() const { return length() ? seen_last_ / length() : 1.0; }

    // The same, both counts summed over all tokens so far
    double kept_sum() const { return length() ? 2 * seen_sum_ / (double(length()) * (length() + 1)) : 1.0; }

    // Index of the one of these next tokens that fills the slot of a bounded policy; their number if none does
    int64_t full_at(std::span<const int> tokens) const {
        int64_t first = std::ssize(tokens);
        if (!capacity_) return first;
        for (const auto& [retained, count] : groups_) {
            Longs counts;
            retained->num_seen(tokens, counts);
            first = std::min<int64_t>(first, std::ranges::lower_bound(counts, *capacity_) - counts.begin());
        }
        return first;
    }

    void begin_turn(int64_t num_coming) {
        for (const auto& [retained, count] : groups_) retained->begin_turn(num_coming);
    }

    // The next tokens have entered the cache.
    void commit(std::span<const int> tokens) {
        if (tokens.empty()) return;
        std::vector<double> seen(tokens.size());
        for (const auto& [retained, count] : groups_) {
            Longs counts;
            retained->num_seen(tokens, counts);
            for (size_t i = 0; i < seen.size(); ++i) seen[i] += counts[i] * (double(count) / num_layers_);
            retained->commit(tokens);
        }
        seen_last_ = seen.back();
        for (const double value : seen) seen_sum_ += value;
    }

   private:
    std::vector<Group> groups_;
    std::optional<int64_t> capacity_;
    int num_layers_ = 0;
    double seen_last_ = 0, seen_sum_ = 0;
};

}  // namespace outrider
