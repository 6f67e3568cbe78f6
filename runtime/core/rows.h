// The rows of one sequence in one step: a chain of uncached tokens, and guesses that hang on its end.

#pragma once

#include <algorithm>
#include <array>
#include <stdexcept>
#include <vector>

namespace outrider {

// runtime.step.Choose: what a row's logits are for.
enum Choose { NOTHING = 0, SAMPLE = 1, ARGMAX = 2, SCORE = 3 };

// The last tokens of a text: what guesses about the next one are made from.
class Tail {
   public:
    static constexpr int MOST = 8;

    Tail() = default;

    explicit Tail(const std::vector<int>& text) {
        for (size_t i = text.size() - std::min<size_t>(text.size(), MOST); i < text.size(); ++i) push(text[i]);
    }

    int size() const { return size_; }

    // The token that is `back` before the last one.
    int operator[](int back) const { return tokens_[size_ - 1 - back]; }

    void push(int token) {
        if (size_ == MOST) std::copy(tokens_.begin() + 1, tokens_.end(), tokens_.begin());
        else ++size_;
        tokens_[size_ - 1] = token;
    }

    Tail followed_by(int token) const {
        Tail longer = *this;
        longer.push(token);
        return longer;
    }

   private:
    std::array<int, MOST> tokens_{};
    int size_ = 0;
};

// A forest of rows under construction; the columns run in parallel.
class Rows {
   public:
    explicit Rows(int first_position) : first_position(first_position) {}

    int first_position;  // of a row without parent: the number of cached tokens
    int root = -1;       // the current token's row, where guesses begin; -1 while the prompt is not all there
    std::vector<int> tokens, positions, parents, choose;

    int size() const { return static_cast<int>(tokens.size()); }

    // Append a row one position after `parent` (-1: after the cached tokens); returns its index.
    int add(int token, int parent, int chooses) {
        tokens.push_back(token);
        positions.push_back(parent >= 0 ? positions[parent] + 1 : first_position);
        parents.push_back(parent);
        choose.push_back(chooses);
        return size() - 1;
    }

    // The tokens that are not cached yet; if they reach the text's end, the last one is the current token.
    void add_chain(const std::vector<int>& chain, bool reaches_end) {
        int parent = -1;
        for (const int token : chain) parent = add(token, parent, NOTHING);
        if (reaches_end) {
            if (parent < 0) throw std::invalid_argument("a text's end is a token");
            root = parent;
            choose[root] = SAMPLE;
        }
    }

    // Rows of a prompt, whose tokens have these positions, tell how likely it was.
    void score(int start, int stop) {
        for (int row = 0; row < size(); ++row)
            if (choose[row] == NOTHING && positions[row] + 1 >= start && positions[row] + 1 < stop) choose[row] = SCORE;
    }

    std::vector<int> tokens_of(const std::vector<int>& some) const {
        std::vector<int> found;
        for (const int row : some) found.push_back(tokens.at(row));
        return found;
    }

    // Keep the first `count` rows.
    void truncate(int count) {
        for (auto* column : {&tokens, &positions, &parents, &choose}) column->resize(count);
    }

    // What a text ends in at each row, where `before` stands before the first.
    std::vector<Tail> tails(const Tail& before) const {
        std::vector<Tail> tails;
        tails.reserve(size());
        for (int row = 0; row < size(); ++row)
            tails.push_back((parents[row] >= 0 ? tails[parents[row]] : before).followed_by(tokens[row]));
        return tails;
    }
};

}  // namespace outrider
