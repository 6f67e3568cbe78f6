// Learned acceptance: how likely a proposed token is the one the model will choose, given who proposes it and how.
//
// Every proposal carries one feature per list (a source has one list or several), the list's `absent` feature
// where that source does not propose the token. A token's logit adds up the weights of its features, the strongest in
// full and the others in part, so that sources that agree strengthen each other; what that leaves wrong is learned by
// the token's circumstances: how many lists propose it, how often the text has had it, and whether it hangs on the
// text or on a guess. Of all tokens proposed at a node one at most is right: probabilities are a softmax of the logits,
// with 0 for "none of them". Weights start from priors and are learned online, from every node whose next token has
// become known, whether or not its proposals fitted into the step.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace outrider {

// Of AdaGrad (Duchi et al., 2011): first steps are about this large, in logits, and shrink as evidence comes in.
constexpr double LEARNING_RATE = 0.3;

// Squared gradients that a prior counts for
constexpr double PRIOR_EVIDENCE = 1.0;

// Logit of a token that nobody proposes; priors of features are given as what they add to it.
constexpr double BIAS = -4.0;

// How much the weights of all proposals but the strongest count. Sources look at the same text, so they are not
// independent: with 1, chains on which all agree are believed to be accepted far longer than they are.
constexpr double AGREEMENT = 0.4;

// How fast the bias of one text follows its own record
constexpr double TEXT_RATE = 0.02;

// The weight of a feature whose proposals are accepted with this probability when nothing else is proposed
inline double prior(double probability) {
    const double p = std::clamp(probability, 1e-4, 1 - 1e-4);
    return std::log(p / (1 - p)) - BIAS;
}

// A token that may come next, and the feature that describes why
struct Proposal {
    int token, feature;
};

// What one source says of the next token at one node: proposals [first, last) of the tree's, each token once
struct ProposalList {
    int absent;  // the feature of all tokens that are not proposed here
    int first, last;
};

// What sources have said, for many nodes, one after the other
struct Proposals {
    std::vector<ProposalList> lists;
    std::vector<Proposal> proposals;

    void open(int absent) {
        const int here = static_cast<int>(proposals.size());
        lists.push_back({absent, here, here});
    }

    void propose(int token, int feature) {
        proposals.push_back({token, feature});
        lists.back().last = static_cast<int>(proposals.size());
    }

    std::span<const Proposal> of(const ProposalList& list) const {
        return {proposals.data() + list.first, proposals.data() + list.last};
    }
};

// Part of them: one node's lists [first, last)
struct Extent {
    int first, last;

    template <typename T>
    std::span<const T> in(const std::vector<T>& all) const {
        return {all.data() + first, all.data() + last};
    }
};

// A token, and how likely it is to be accepted
struct Guess {
    double probability;
    int token;

    // Likeliest first; ties go to the lower id.
    bool operator<(const Guess& other) const {
        return std::pair(-probability, token) < std::pair(-other.probability, other.token);
    }
};

// How far a candidate's probability, the product along its path, can be trusted: learned from how often candidates of
// about this probability were accepted. Estimates are noisy, so the low ones are too low; and where one of a run that
// looked safe is wrong, the next ones are, too, so those of long runs are too high.
class Calibration {
   public:
    double operator()(double probability) const {
        const int kind = kind_of(probability);
        return probability * accepted_[kind] / expected_[kind];
    }

    void learn(double probability, bool was_accepted) {
        const int kind = kind_of(probability);
        expected_[kind] += probability;
        accepted_[kind] += was_accepted;
        if (expected_[kind] < FORGOTTEN_AT) return;
        expected_[kind] /= 2;
        accepted_[kind] /= 2;
    }

   private:
    static constexpr int KINDS = 12;             // of probability: 1 to 1/2, 1/2 to 1/4, ...; the last is open
    static constexpr double TRUST = 4.0;         // accepted candidates that it takes to move a factor
    static constexpr double FORGOTTEN_AT = 400;  // accepted candidates, then the record counts half

    static std::array<double, KINDS> trusted() {
        std::array<double, KINDS> counts;
        counts.fill(TRUST);
        return counts;
    }

    static int kind_of(double probability) {
        return std::clamp(static_cast<int>(-std::log2(std::max(probability, 1e-9))), 0, KINDS - 1);
    }

    std::array<double, KINDS> expected_ = trusted(), accepted_ = trusted();
};

// Weights of all features, and their calibration; several sequences may learn the same ones.
struct Acceptance {
    explicit Acceptance(std::vector<double> priors) : num_proposal_features(static_cast<int>(priors.size())) {
        weights = std::move(priors);
        weights.resize(weights.size() + TIMES * 2 * MOST_AGREE, 0.0);
        evidence.assign(weights.size(), PRIOR_EVIDENCE);
    }

    static constexpr int MOST_AGREE = 3;
    static constexpr int OFTEN = 4;  // times in the text: more are not told apart
    static constexpr int TIMES = 4;  // that the text has had a token: never, once, two or three times, more

    int num_proposal_features;
    Calibration calibration;
    std::vector<double> weights, evidence;

    // The feature of tokens that so many lists propose and the text has had so often, after the text or after a guess
    int circumstances(int num_lists, int times, bool after_guess) const {
        const int kind = times < 2 ? times : times < 4 ? 2 : 3;
        return num_proposal_features + (kind * 2 + after_guess) * MOST_AGREE + std::min(num_lists, MOST_AGREE) - 1;
    }

    // Move a weight against the gradient of the log-loss.
    void learn(int feature, double gradient) {
        evidence[feature] += gradient * gradient;
        weights[feature] -= LEARNING_RATE * gradient / std::sqrt(evidence[feature]);
    }
};

// Turns the sources' lists into guesses for one sequence, and learns from what the model chose.
class Judge {
   public:
    explicit Judge(std::shared_ptr<Acceptance> acceptance) : acceptance(std::move(acceptance)) {}

    std::shared_ptr<Acceptance> acceptance;
    double bias = 0;  // what this text adds to every logit: how much harder or easier to guess it is than others

    // The text has grown by these tokens.
    void observe(const std::vector<int>& tokens) {
        for (const int token : tokens) {
            if (token >= std::ssize(seen_)) seen_.resize(token + 1);
            seen_[token] = std::min(seen_[token] + 1, Acceptance::OFTEN);
        }
    }

    // Of the text only these tokens, the newest, are left.
    void forget(const std::vector<int>& text) {
        seen_.clear();
        observe(text);
    }

    // Append all tokens that a node's lists propose to `guesses`, in no order.
    void judge(const Proposals& proposed, Extent lists, bool after_guess, std::vector<Guess>& guesses) {
        const auto& weights = acceptance->weights;
        double base = BIAS + bias;
        for (const ProposalList& list : lists.in(proposed.lists)) base += AGREEMENT * weights[list.absent];
        candidates_.clear();
        places_.fill(NOWHERE);
        for (const ProposalList& list : lists.in(proposed.lists)) {
            const double missing = weights[list.absent];
            for (const auto [token, feature] : proposed.of(list)) {
                Candidate& candidate = find(token, base);
                candidate.logit += AGREEMENT * (weights[feature] - missing);
                candidate.strongest = std::max(candidate.strongest, weights[feature]);
                ++candidate.num_lists;
            }
        }
        const size_t first = guesses.size();
        float total = 1;
        for (const auto& [token, num_lists, logit, strongest] : candidates_) {
            const double agreed = weights[acceptance->circumstances(num_lists, times_seen(token), after_guess)];
            const float odds = std::exp(static_cast<float>(logit + (1 - AGREEMENT) * strongest + agreed));
            guesses.push_back({odds, token});
            total += odds;
        }
        for (size_t i = first; i < guesses.size(); ++i) guesses[i].probability /= total;
    }

    // The token's probability if the source with features [first, last) had not proposed it
    double without(const Proposals& proposed, Extent lists, bool after_guess, int token, Extent features) {
        Proposals others;
        for (const ProposalList& list : lists.in(proposed.lists)) {
            others.open(list.absent);
            if (list.absent >= features.first && list.absent < features.last) continue;
            for (const auto [other, feature] : proposed.of(list)) others.propose(other, feature);
        }
        std::vector<Guess> guesses;
        judge(others, {0, static_cast<int>(others.lists.size())}, after_guess, guesses);
        for (const Guess& guess : guesses)
            if (guess.token == token) return guess.probability;
        return 0;
    }

    // The model chose `chosen` where these were the guesses.
    void learn(const Proposals& proposed, Extent lists, bool after_guess, std::span<const Guess> guesses, int chosen) {
        const auto& weights = acceptance->weights;
        double error = 0;
        for (const auto [probability, token] : guesses) {
            const double gradient = probability - (token == chosen);
            error += gradient;
            described_.clear();
            int strongest = -1, num_lists = 0;
            for (const ProposalList& list : lists.in(proposed.lists)) {
                const auto proposals = proposed.of(list);
                const auto found = std::ranges::find(proposals, token, &Proposal::token);
                const bool has_it = found != proposals.end();
                described_.push_back(has_it ? found->feature : list.absent);
                num_lists += has_it;
                if (has_it && (strongest < 0 || weights[found->feature] > weights[strongest]))
                    strongest = found->feature;
            }
            for (const int feature : described_)
                acceptance->learn(feature, gradient * (feature == strongest ? 1.0 : AGREEMENT));
            acceptance->learn(acceptance->circumstances(num_lists, times_seen(token), after_guess), gradient);
        }
        bias -= TEXT_RATE * error;
    }

   private:
    struct Candidate {
        int token, num_lists;
        double logit, strongest;
    };

    Candidate& find(int token, double base) {
        int16_t& place = places_[token % PLACES];
        if (place != NOWHERE && candidates_[place].token == token) return candidates_[place];
        for (size_t i = 0; place != NOWHERE && i < candidates_.size(); ++i)
            if (candidates_[i].token == token) return candidates_[i];
        place = static_cast<int16_t>(candidates_.size());
        return candidates_.emplace_back(token, 0, base, -std::numeric_limits<double>::infinity());
    }

    int times_seen(int token) const { return token < std::ssize(seen_) ? seen_[token] : 0; }

    static constexpr int PLACES = 256, NOWHERE = -1;

    std::vector<uint8_t> seen_;  // how often the text has a token, at most OFTEN
    std::vector<Candidate> candidates_;
    std::array<int16_t, PLACES> places_{};  // by a token's last bits, the newest candidate with these
    std::vector<int> described_;  // the features of one token, one per list
};

}  // namespace outrider
