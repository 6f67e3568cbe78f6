// What a sequence's text holds of each token: what penalties are counted by.

#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "plan.h"
#include "recycling.h"

namespace outrider {

// The tokens of one sequence's text up to what is committed. It follows committed tokens alone, so it is the same whatever
// was guessed.
class History {
   public:
    // Of tokens of a text, and how often its answer has each; 0: the prompt alone has it
    struct Counts {
        std::vector<int32_t> tokens, counts;
    };

    int64_t length() const { return length_; }

    // An answer begins at this position; what stands before is its prompt.
    void begin(int64_t output_start) {
        if (output_start == output_start_) return;
        output_start_ = output_start;
        for (int32_t& count : counts_.counts) count = 0;
    }

    void commit(std::span<const int> tokens) {
        for (const int token : tokens) add(token, length_++ >= output_start_);
        if (length_ <= MOST_TEXT) text_.insert(text_.end(), tokens.begin(), tokens.end());
        else text_ = {};
    }

    // That of a sequence whose text begins as this one's, with so many tokens
    History first(int64_t count) const {
        if (count > std::ssize(text_)) throw std::out_of_range("so much of the text is not known");
        History begun;
        begun.commit({text_.data(), static_cast<size_t>(count)});
        return begun;
    }

    // All of it, for another rank to `restore`: length, where the answer begins, how many tokens have counts; these; their
    // counts; the text.
    std::vector<int64_t> state() const {
        std::vector<int64_t> words{length_, output_start_, std::ssize(counts_.tokens)};
        for (const auto* part : {&counts_.tokens, &counts_.counts}) words.insert(words.end(), part->begin(), part->end());
        words.insert(words.end(), text_.begin(), text_.end());
        return words;
    }

    static History restored(std::span<const int64_t> words) {
        if (words.size() < 3 || words[2] < 0 || 3 + 2 * words[2] > std::ssize(words))
            throw std::invalid_argument("no state of a history");
        const size_t known = words[2];
        History found;
        found.length_ = words[0];
        found.output_start_ = words[1];
        for (size_t i = 0; i < known; ++i) {
            found.places_.insert(static_cast<int>(words[3 + i]), static_cast<int>(i));
            found.counts_.tokens.push_back(static_cast<int32_t>(words[3 + i]));
            found.counts_.counts.push_back(static_cast<int32_t>(words[3 + known + i]));
        }
        for (const int64_t token : words.subspan(3 + 2 * known)) found.text_.push_back(static_cast<int>(token));
        return found;
    }

    // Of the text that ends in row `row` of the plan `rows` [T, ROW_COLUMNS]: the committed tokens, the row's ancestors and
    // its own
    Counts at(std::span<const int32_t> rows, int row) {
        const size_t known = counts_.tokens.size();
        std::vector<int> counted;  // places whose counts are one too high now
        for (int ancestor = row; ancestor >= 0; ancestor = rows[ancestor * ROW_COLUMNS + PARENT]) {
            const int32_t* line = &rows[ancestor * ROW_COLUMNS];
            const bool is_output = line[POSITION] >= output_start_;
            const int place = add(line[TOKEN], is_output);
            if (is_output) counted.push_back(place);
        }
        Counts found = counts_;
        for (const int place : counted) --counts_.counts[place];
        while (counts_.tokens.size() > known) {
            places_.erase(counts_.tokens.back());
            counts_.tokens.pop_back();
            counts_.counts.pop_back();
        }
        return found;
    }

    static constexpr int64_t MOST_TEXT = 1 << 18;  // an endless text is not kept

   private:
    int add(int token, bool is_output) {
        int place = places_.find(token);
        if (place < 0) {
            place = static_cast<int>(counts_.tokens.size());
            places_.insert(token, place);
            counts_.tokens.push_back(token);
            counts_.counts.push_back(0);
        }
        counts_.counts[place] += is_output;
        return place;
    }

    int64_t length_ = 0, output_start_ = 0;
    std::vector<int> text_;
    Counts counts_;
    PlaceTable places_;  // of a token in them
};

}  // namespace outrider
