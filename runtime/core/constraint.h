// What a grammar allows after a text: one bit per token. Candidates that it forbids are never run, and each row's choice is
// made among the tokens that it allows.

#pragma once

#include <bit>
#include <cstdint>
#include <memory>
#include <vector>

#include "sources.h"

namespace outrider {

using Mask = std::vector<uint32_t>;  // bit t % 32 of word t / 32: token t is allowed

inline bool allows(const Mask& mask, int token) {
    const size_t word = static_cast<size_t>(token) / 32;
    return word < mask.size() && (mask[word] >> token % 32 & 1);
}

// The only token that it allows; -1 where there are more, or none
inline int only_token(const Mask& mask) {
    int found = -1;
    for (size_t word = 0; word < mask.size(); ++word) {
        if (!mask[word]) continue;
        if (found >= 0 || (mask[word] & (mask[word] - 1))) return -1;
        found = static_cast<int>(word * 32) + std::countr_zero(mask[word]);
    }
    return found;
}

// One sequence's
class Constraint {
   public:
    virtual ~Constraint() = default;

    // What may follow the sequence's text and these tokens behind it
    virtual Mask mask(const std::vector<int>& path) = 0;

    int forced = -1;  // the only token that the mask asked for last allows
};

// Tokens that a grammar forces
class GrammarSource : public Source {
   public:
    static std::vector<double> priors() { return {0.0, prior(0.98)}; }

    explicit GrammarSource(int first_feature) : Source(first_feature, static_cast<int>(priors().size())) { is_silent = true; }

    void follow(std::shared_ptr<Constraint> constraint) {
        constraint_ = std::move(constraint);
        is_silent = constraint_ == nullptr;
    }

    void propose(const Tail&, int, Proposals& proposed) override {
        proposed.open(features.first);
        if (constraint_->forced >= 0) proposed.propose(constraint_->forced, features.first + 1);
    }

   private:
    std::shared_ptr<Constraint> constraint_;
};

}  // namespace outrider
