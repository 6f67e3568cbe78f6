// The verification branch: candidates as one tree of rows, grown best first, and the walk that accepts a path of it.

#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "acceptance.h"
#include "constraint.h"
#include "rows.h"
#include "sources.h"

namespace outrider {

// How far a guess behind a guess is trusted beside its own probability: where one of a run that looked safe is wrong,
// the next ones are, too.
constexpr double RUN = 0.96;

// Candidates below the current token. A prefix that several share is stored once; ties are broken by age.
class CandidateTree {
   public:
    // `tail`: what the text ends in, the current token included. No candidate stands deeper than `max_depth`.
    CandidateTree(std::shared_ptr<Rows> rows, const Tail& tail, int max_depth,
                  std::vector<std::shared_ptr<Source>> sources, std::shared_ptr<Judge> judge,
                  std::shared_ptr<Constraint> constraint = nullptr)
        : rows(std::move(rows)),
          first_row(this->rows->size()),
          max_depth_(max_depth),
          sources_(std::move(sources)),
          judge_(std::move(judge)),
          constraint_(std::move(constraint)) {
        nodes_.reserve(128);
        proposals_.proposals.reserve(2048);
        guesses_.reserve(2048);
        for (const auto& source : sources_) source->begin(this->rows->positions[this->rows->root] + 1);
        add_node(-1, tail, 0, 1.0);
    }

    const std::shared_ptr<Rows> rows;
    const int first_row;  // the first candidate's

    int num_candidates() const { return rows->size() - first_row; }

    // Probability of the least likely candidate taken in; 1 where there is none.
    double margin() const { return num_candidates() == 0 ? 1.0 : calibrated(nodes_[num_candidates()].probability); }

    // Of being accepted, of the row that `grow` would add; 0 where there is none.
    double next_probability() const { return frontier_.empty() ? 0.0 : calibrated(frontier_.front().probability); }

    // Add the likeliest candidate that is not in the tree yet.
    void grow() {
        std::pop_heap(frontier_.begin(), frontier_.end());
        const Offer best = frontier_.back();
        frontier_.pop_back();
        const int token = guesses_[nodes_[best.node].guesses.first + best.index].token;
        rows->add(token, row_of(best.node), SAMPLE);
        offer(best.node, best.index + 1);
        const int child = add_node(best.node, nodes_[best.node].tail.followed_by(token), nodes_[best.node].depth + 1,
                                   best.probability);
        nodes_[child].sibling = std::exchange(nodes_[best.node].child, child);
    }

    // Grow until `room` candidates are in the tree, or no more are known.
    void fill(int room) {
        while (!frontier_.empty() && num_candidates() < room) grow();
    }

    // Keep the first `count` candidates only; the tree cannot grow any more.
    void truncate(int count) {
        for (Node& node : nodes_)
            while (node.child > count) node.child = nodes_[node.child].sibling;
        nodes_.erase(nodes_.begin() + count + 1, nodes_.end());
        if (constraint_) masks_.erase(masks_.begin() + count + 1, masks_.end());
        rows->truncate(first_row + count);
        frontier_.clear();
    }

    // What the constraint allows behind the current token, and behind each candidate; none without one
    const std::vector<Mask>& masks() const { return masks_; }

    // Follow the tokens the model chose as far as the tree holds them.
    //
    // `chosen[row]` is what one-at-a-time decoding would emit after that row, so a candidate is accepted if and only if
    // it equals that token: the text is the same, whatever was proposed.
    //
    // Returns the accepted rows below the root, and the tokens emitted: theirs, and the one that the model gives after
    // the last of them.
    std::pair<std::vector<int>, std::vector<int>> walk(std::span<const int> chosen) const {
        std::vector<int> path, emitted;
        for (const int node : decided(chosen)) {
            if (node > 0) path.push_back(row_of(node));
            emitted.push_back(chosen[row_of(node)]);
        }
        return {path, emitted};
    }

    // Learn from the nodes whose next token has become known, whatever fitted in behind them, and from which candidates
    // were accepted.
    void learn(std::span<const int> chosen) {
        const auto path = decided(chosen);
        auto accepted = path.begin() + 1;
        for (int node = 1; node <= num_candidates(); ++node) {
            const bool is_accepted = accepted != path.end() && *accepted == node;
            accepted += is_accepted;
            judge_->acceptance->calibration.learn(nodes_[node].probability, is_accepted);
        }
        for (const int node : path)
            judge_->learn(proposals_, nodes_[node].lists, nodes_[node].depth > 0, nodes_[node].guesses.in(guesses_),
                          chosen[row_of(node)]);
    }

    // Of each candidate, in row order, which sources propose it: bit i for the i-th.
    std::vector<int> proposers() const {
        std::vector<int> found;
        for (int node = 1; node <= num_candidates(); ++node) {
            const int token = rows->tokens[row_of(node)];
            int bits = 0;
            for (const ProposalList& list : nodes_[nodes_[node].parent].lists.in(proposals_.lists))
                for (const Proposal& proposal : proposals_.of(list))
                    if (proposal.token == token) bits |= 1 << source_of(list);
            found.push_back(bits);
        }
        return found;
    }

    // How many accepted tokens would have had no place in the tree without the source with these features
    int credit(std::span<const int> chosen, Extent features) {
        int count = 0;
        for (const int node : decided(chosen)) {
            const int token = chosen[row_of(node)];
            if (child_of(node, token) < 0) continue;
            const double alone = judge_->without(proposals_, nodes_[node].lists, nodes_[node].depth > 0, token,
                                                 features);
            count += calibrated(nodes_[node].probability * alone) < margin();
        }
        return count;
    }

    // Of the tree's candidates, and of the accepted ones: how many each source has proposed, in the sources' order, and
    // how many stand at each depth, from 1. What several sources propose counts for each.
    struct Tally {
        std::vector<std::pair<int, int>> by_source, by_depth;
    };

    Tally tally(std::span<const int> chosen) const {
        Tally counts;
        counts.by_source.resize(sources_.size());
        const auto path = decided(chosen);
        auto next = path.begin() + 1;
        for (int node = 1; node <= num_candidates(); ++node) {
            const bool is_accepted = next != path.end() && *next == node;
            next += is_accepted;
            const auto count = [is_accepted](std::pair<int, int>& pair) { pair.first++, pair.second += is_accepted; };
            if (const auto depth = static_cast<size_t>(nodes_[node].depth); counts.by_depth.size() < depth)
                counts.by_depth.resize(depth);
            count(counts.by_depth[nodes_[node].depth - 1]);
            int newest = -1;  // a source's lists stand together, and it counts once
            for (const ProposalList& list : nodes_[nodes_[node].parent].lists.in(proposals_.lists))
                for (const Proposal& proposal : proposals_.of(list))
                    if (proposal.token == rows->tokens[row_of(node)] && newest != source_of(list))
                        count(counts.by_source[newest = source_of(list)]);
        }
        return counts;
    }

   private:
    // The current token, or a candidate, and what may follow it. Node 0 is the root; candidates follow in row order.
    struct Node {
        int parent;
        Tail tail;
        int depth;
        double probability;  // of being accepted: the product along the path, before it is calibrated
        Extent lists, guesses;
        int child = -1;    // the newest, or -1
        int sibling = -1;  // the next older child of its parent, or -1
    };

    // A node's guess with this index, which competes for the next row
    struct Offer {
        double probability;
        int age;
        int node, index;

        bool operator<(const Offer& other) const {  // in a heap's sense: the lowest comes last
            return std::tuple(probability, -age, -node, -index) <
                   std::tuple(other.probability, -other.age, -other.node, -other.index);
        }
    };

    double calibrated(double probability) const { return judge_->acceptance->calibration(probability); }

    // Which source a list is of, by its features
    int source_of(const ProposalList& list) const {
        int index = 0;
        const auto has = [&](const Extent& features) { return features.first <= list.absent && list.absent < features.last; };
        while (index + 1 < static_cast<int>(sources_.size()) && !has(sources_[index]->features)) ++index;
        return index;
    }

    int row_of(int node) const { return node == 0 ? rows->root : first_row + node - 1; }

    int add_node(int parent, const Tail& tail, int depth, double probability) {
        const int node = static_cast<int>(nodes_.size());
        if (constraint_) {
            std::vector<int> path;
            for (int above = parent, row = row_of(node); above >= 0; row = row_of(above), above = nodes_[above].parent)
                path.push_back(rows->tokens[row]);
            std::ranges::reverse(path);
            masks_.push_back(constraint_->mask(path));
            constraint_->forced = only_token(masks_.back());
        }
        Extent lists{static_cast<int>(proposals_.lists.size()), 0}, guesses{static_cast<int>(guesses_.size()), 0};
        for (const auto& source : sources_)
            if (!source->is_silent) source->propose(tail, depth, proposals_);
        lists.last = static_cast<int>(proposals_.lists.size());
        judge_->judge(proposals_, lists, depth > 0, guesses_);
        if (constraint_)
            guesses_.erase(std::remove_if(guesses_.begin() + guesses.first, guesses_.end(),
                                          [&](const Guess& guess) { return !allows(masks_.back(), guess.token); }),
                           guesses_.end());
        guesses.last = static_cast<int>(guesses_.size());
        nodes_.push_back({parent, tail, depth, probability, lists, guesses});
        if (depth < max_depth_) offer(node, 0);
        return node;
    }

    // Let a node's next guess compete: the likeliest from this index on, which those before have been.
    void offer(int index_of_node, int index) {
        const Node& node = nodes_[index_of_node];
        const auto rest = guesses_.begin() + node.guesses.first + index, last = guesses_.begin() + node.guesses.last;
        if (rest >= last) return;
        std::iter_swap(rest, std::min_element(rest, last));
        const double likely = rest->probability;
        const double path = node.probability * likely * (node.depth > 0 ? RUN : 1.0);
        frontier_.push_back({path, rows->size(), index_of_node, index});
        std::push_heap(frontier_.begin(), frontier_.end());
    }

    int child_of(int node, int token) const {
        int child = nodes_[node].child;
        while (child >= 0 && rows->tokens[row_of(child)] != token) child = nodes_[child].sibling;
        return child;
    }

    // The nodes whose next token has become known: the current token's, and the accepted ones'.
    std::vector<int> decided(std::span<const int> chosen) const {
        std::vector<int> path;
        for (int node = 0; node >= 0; node = child_of(node, chosen[row_of(node)])) path.push_back(node);
        return path;
    }

    int max_depth_;
    std::vector<std::shared_ptr<Source>> sources_;
    std::shared_ptr<Judge> judge_;
    std::shared_ptr<Constraint> constraint_;
    std::vector<Mask> masks_;  // of the nodes
    std::vector<Node> nodes_;
    std::vector<Offer> frontier_;
    Proposals proposals_;         // of all nodes
    std::vector<Guess> guesses_;  // of all nodes
};

}  // namespace outrider
