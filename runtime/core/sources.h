// Candidate sources: each proposes tokens that may follow a node of the candidate tree.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "acceptance.h"
#include "noise.h"
#include "recycling.h"
#include "rows.h"

namespace outrider {

// One sequence's source
class Source {
   public:
    Source(int first_feature, int num_features) : features{first_feature, first_feature + num_features} {}
    virtual ~Source() = default;

    const Extent features;  // the numbers of its features
    bool is_silent = false;  // it has nothing to propose in this step

    // The next tree is for a text whose next token has this position.
    virtual void begin(int /*position*/) {}

    // Tokens that may follow a text that ends in `tail`, of which the last `depth` tokens are guesses
    virtual void propose(const Tail& tail, int depth, Proposals& proposed) = 0;

    // The text has grown by these tokens, a prompt's or the model's.
    virtual void observe(const std::vector<int>&, bool /*is_prompt*/) {}

    // Of the text only these tokens, the newest, are left.
    virtual void forget(const std::vector<int>&) {}
};

// The n-gram pool: per first token, at most G n-grams, the least recently used one out first
// (Fu et al., 2024, section 3.2: the n-gram pool and its size G).
class NgramPool {
   public:
    NgramPool(int ngram_size, int guess_set_size) : ngram_size(ngram_size), guess_set_size(guess_set_size) {}

    using Tokens = std::vector<int>;
    const int ngram_size, guess_set_size;

    // Put an n-gram (length N) in, as the newest of its first token.
    void add(std::span<const int> ngram) {
        auto& tails = tails_[ngram[0]];
        Tokens tail(ngram.begin() + 1, ngram.end());
        const auto found = std::ranges::find(tails, tail);
        if (found != tails.end()) tails.erase(found);
        else if (static_cast<int>(tails.size()) == guess_set_size) tails.erase(tails.begin());
        tails.push_back(std::move(tail));
    }

    // Put every n-gram of `text` in.
    void add_text(std::span<const int> text) {
        for (size_t start = 0; start + ngram_size <= text.size(); ++start) add(text.subspan(start, ngram_size));
    }

    // The N-1 tokens after `first` in each of its n-grams, oldest first
    std::span<const Tokens> tails(int first) const {
        const auto found = tails_.find(first);
        return found == tails_.end() ? std::span<const Tokens>() : std::span<const Tokens>(found->second);
    }

   private:
    std::unordered_map<int, std::vector<Tokens>> tails_;
};

// What the pool's n-grams say: the verification branch of the paper.
class NgramSource : public Source {
   public:
    static constexpr int DEPTHS = 3, AGES = 4;

    // By how many tokens of the n-gram are there already, and by how old it is among the pool's
    static std::vector<double> priors() {
        std::vector<double> weights{0.0};
        for (const double p : {0.06, 0.1, 0.15})
            for (int age = 0; age < AGES; ++age) weights.push_back(prior(p / (1 + age / 2.0)));
        return weights;
    }

    NgramSource(int first_feature, int ngram_size, int guess_set_size, bool from_prompt, bool from_output)
        : Source(first_feature, static_cast<int>(priors().size())),
          pool(ngram_size, guess_set_size),
          from_prompt_(from_prompt),
          from_output_(from_output) {}

    NgramPool pool;

    void propose(const Tail& tail, int depth, Proposals& proposed) override {
        proposed.open(features.first);
        if (depth + 1 >= std::min(pool.ngram_size, tail.size() + 1)) return;
        const int first = features.first + 1 + std::min(depth, DEPTHS - 1) * AGES;
        const auto tails = pool.tails(tail[depth]);
        followers_.clear();
        for (auto ngram = tails.rbegin(); ngram != tails.rend(); ++ngram) {
            bool follows = true;
            for (int place = 0; place < depth; ++place) follows &= (*ngram)[place] == tail[depth - 1 - place];
            const int token = (*ngram)[depth];
            if (!follows || std::ranges::find(followers_, token) != followers_.end()) continue;
            proposed.propose(token, first + std::min(static_cast<int>(followers_.size()), AGES - 1));
            followers_.push_back(token);
        }
    }

    void observe(const std::vector<int>& tokens, bool is_prompt) override {
        end_.insert(end_.end(), tokens.begin(), tokens.end());
        if (!is_silent && (is_prompt ? from_prompt_ : from_output_)) pool.add_text(end_);
        end_.erase(end_.begin(), end_.end() - std::min<size_t>(end_.size(), pool.ngram_size - 1));
    }

   private:
    bool from_prompt_, from_output_;
    std::vector<int> end_;        // the last N-1 tokens of the text
    std::vector<int> followers_;  // proposed at this node
};

// Prompt lookup: what followed the longest suffixes of the text where they stood before.
class SuffixSource : public Source {
   public:
    static constexpr int MAX_PROPOSALS = 8;
    static constexpr int MAX_MATCH = 8;
    static constexpr int MAX_PLACES = 32;  // places of the text looked at, the newest ones
    static constexpr int SHARES = 3;

    // By the length of the match, the share of its followers that were this token, and whether it was seen twice
    static std::vector<double> priors() {
        std::vector<double> weights{0.0};
        for (const double match : {0.08, 0.2, 0.4, 0.55, 0.65, 0.7, 0.75, 0.8})
            for (const double share : {0.3, 0.6, 1.0}) weights.insert(weights.end(), 2, prior(match * share));
        return weights;
    }

    explicit SuffixSource(int first_feature) : Source(first_feature, static_cast<int>(priors().size())) {}

    void propose(const Tail& tail, int, Proposals& proposed) override {
        proposed.open(features.first);
        proposed_.clear();
        if (tail.size() >= 2) propose_matches(tail, proposed);
        const auto found = followers_.find(tail[0]);
        if (found == followers_.end()) return;
        const auto& [followers, total] = found->second;
        for (auto follower = followers.rbegin(); follower != followers.rend(); ++follower)
            if (!offer(*follower, total, 1, proposed)) return;
    }

    void observe(const std::vector<int>& tokens, bool) override {
        for (const int token : tokens) {
            text_.push_back(token);
            const int place = static_cast<int>(text_.size()) - 1;
            if (place >= 1) followers_[text_[place - 1]].count(token);
            if (place >= 2) places_[pair(text_[place - 2], text_[place - 1])].push_back(place);
        }
    }

    void forget(const std::vector<int>& text) override {
        text_.clear();
        places_.clear();
        followers_.clear();
        observe(text, true);
    }

   private:
    struct Follower {
        int token, count;
    };

    struct Followers {
        std::vector<Follower> tokens;  // the newest last
        int total = 0;

        void count(int token) {
            ++total;
            const auto found = std::ranges::find(tokens, token, &Follower::token);
            if (found == tokens.end()) tokens.push_back({token, 1});
            else {
                ++found->count;
                std::rotate(found, found + 1, tokens.end());
            }
        }
    };

    struct Match {
        int length, token;
    };

    static uint64_t pair(int first, int second) {
        return static_cast<uint64_t>(static_cast<uint32_t>(first)) << 32 | static_cast<uint32_t>(second);
    }

    // What followed where at least two tokens match, the longest matches first
    void propose_matches(const Tail& tail, Proposals& proposed) {
        const auto found = places_.find(pair(tail[1], tail[0]));
        if (found == places_.end()) return;
        const auto& places = found->second;
        matches_.clear();
        int longest = 0;
        for (auto place = places.rbegin(); place != places.rend() && matches_.size() < MAX_PLACES; ++place) {
            matches_.push_back({match(tail, *place), text_[*place]});
            longest = std::max(longest, matches_.back().length);
        }
        for (int length = longest; length >= 2; --length) {
            counted_.clear();
            int total = 0;
            bool any = false;
            for (const auto [reach, token] : matches_) {
                any |= reach == length;
                if (reach < length) continue;
                ++total;
                const auto same = std::ranges::find(counted_, token, &Follower::token);
                if (same == counted_.end()) counted_.push_back({token, 1});
                else ++same->count;
            }
            if (!any) continue;
            for (const Follower& follower : counted_)
                if (!offer(follower, total, length, proposed)) return;
        }
    }

    // How many of the tail's last tokens, two of which do, stand before a place of the text
    int match(const Tail& tail, int place) const {
        const int most = std::min({MAX_MATCH, tail.size(), place});
        int length = 2;
        while (length < most && text_[place - length - 1] == tail[length]) ++length;
        return length;
    }

    // Propose a follower unless a longer match has; false where there is no more room.
    bool offer(const Follower& follower, int total, int length, Proposals& proposed) {
        if (proposed_.size() == MAX_PROPOSALS) return false;
        if (std::ranges::find(proposed_, follower.token) != proposed_.end()) return true;
        const int share = follower.count == total ? 2 : 2 * follower.count >= total ? 1 : 0;
        const int kind = ((length - 1) * SHARES + share) * 2 + (follower.count > 1);
        proposed.propose(follower.token, features.first + 1 + kind);
        proposed_.push_back(follower.token);
        return true;
    }

    std::vector<int> text_;
    std::unordered_map<uint64_t, std::vector<int>> places_;  // two tokens -> where in the text others followed them
    std::unordered_map<int, Followers> followers_;           // one token -> what followed it
    std::vector<Match> matches_;
    std::vector<Follower> counted_;
    std::vector<int> proposed_;
};

// The likeliest tokens that the model gave the last time it stood behind the same tokens, in whatever row.
class RecycleSource : public Source {
   public:
    static constexpr int ORDERS = RecycleTable::MAX_ORDER + 1;

    // By context (the longest known, or the next), by its length, and by the class of log-probability it gave; then the
    // same where tokens are sampled, by the class of the margin with which the known noise lets a token win
    static std::vector<double> priors() {
        std::vector<double> weights{0.0};  // nothing is known here
        for (const bool is_sampled : {false, true})
            for (const double place : {1.0, 0.3})
                for (const double trust : {0.3, 0.5, 0.75, 0.85}) {  // that it holds here, too, by the order
                    for (int kind = 0; kind < CLASSES; ++kind) {
                        const double likely = is_sampled ? 1 / (1 + std::exp(-SHARPNESS * margin_of(kind)))
                                                         : std::exp(-(kind + 0.5) * 0.5);
                        weights.push_back(place * prior(trust * likely));
                    }
                    weights.push_back(0.0);  // not among the likeliest
                }
        return weights;
    }

    RecycleSource(int first_feature, std::shared_ptr<RecycleTable> table)
        : Source(first_feature, static_cast<int>(priors().size())), table_(std::move(table)) {}

    Sampling sampling;  // how the sequence's tokens are chosen

    void begin(int position) override { position_ = position; }

    void propose(const Tail& tail, int depth, Proposals& proposed) override {
        int place = 0;
        table_->lookup(tail, [&](int order, std::span<const int> likeliest) {
            const int group = ((sampling.is_greedy() ? 0 : 2) + place) * ORDERS + order;
            const int first = features.first + 1 + group * (CLASSES + 1);
            proposed.open(first + CLASSES);
            if (sampling.is_greedy()) {
                for (const int packed : likeliest) {
                    const auto [token, kind] = unpacked(packed);
                    proposed.propose(token, first + kind);
                }
            } else {
                sampling.margins(likeliest, position_ + depth, margins_);
                for (size_t i = 0; i < likeliest.size(); ++i)
                    proposed.propose(unpacked(likeliest[i]).first, first + kind_of(margins_[i]));
            }
            ++place;
        });
        for (; place < 2; ++place) proposed.open(features.first);
    }

   private:
    static constexpr double SHARPNESS = 1.2;

    // Classes of margins, half a nat wide and best first; the outer ones are open.
    static double margin_of(int kind) { return (CLASSES / 2 - 0.5 - kind) * 0.5; }
    static int kind_of(double margin) {
        if (!(margin > -CLASSES)) return CLASSES - 1;  // what is no number, too
        return static_cast<int>(std::clamp(std::floor(CLASSES / 2 - margin / 0.5), 0.0, CLASSES - 1.0));
    }

    int position_ = 0;  // of the token that follows the text
    std::vector<double> margins_;
    std::shared_ptr<RecycleTable> table_;
};

}  // namespace outrider
