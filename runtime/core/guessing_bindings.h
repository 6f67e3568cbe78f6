// Bindings: candidate sources, the judge of what they propose, and the tree that grows from it.

#pragma once

#include <memory>
#include <stdexcept>
#include <utility>

#include <nanobind/trampoline.h>

#include "acceptance.h"
#include "arrays.h"
#include "constraint.h"
#include "noise.h"
#include "plan.h"
#include "planner.h"
#include "recycling.h"
#include "rows.h"
#include "sources.h"
#include "tree.h"

namespace outrider {

using Lists = std::vector<std::pair<int, std::vector<std::pair<int, int>>>>;  // (absent, [(token, feature)])
using Ranked = std::vector<std::pair<int, double>>;                             // (token, probability)

inline void add_lists(const Lists& lists, Proposals& proposed) {
    for (const auto& [absent, proposals] : lists) {
        proposed.open(absent);
        for (const auto& [token, feature] : proposals) proposed.propose(token, feature);
    }
}

inline Lists lists_of(const Proposals& proposed) {
    Lists lists;
    for (const ProposalList& list : proposed.lists) {
        lists.emplace_back(list.absent, std::vector<std::pair<int, int>>());
        for (const auto [token, feature] : proposed.of(list)) lists.back().second.emplace_back(token, feature);
    }
    return lists;
}

inline Extent all_of(const Proposals& proposed) { return {0, static_cast<int>(proposed.lists.size())}; }

inline Tokens tokens_of(const Tail& tail) {
    Tokens tokens;
    for (int back = tail.size() - 1; back >= 0; --back) tokens.push_back(tail[back]);
    return tokens;
}

// A source that is written in Python
class PythonSource : public Source {
   public:
    NB_TRAMPOLINE(Source);

    void propose(const Tail& tail, int depth, Proposals& proposed) override {
        constexpr const char* name = "propose";
        const nb::detail::ticket ticket(nb_trampoline, name, nb::detail::str_hash(name), false);
        if (!ticket.key.is_valid()) throw std::runtime_error("a candidate source must have a method propose(tail, depth)");
        const nb::object found = nb_trampoline.base().attr(ticket.key)(nb::tuple(nb::cast(tokens_of(tail))), depth);
        add_lists(nb::cast<Lists>(found), proposed);
    }

    void observe(const Tokens& tokens, bool is_prompt) override { NB_OVERRIDE(observe, tokens, is_prompt); }

    void forget(const Tokens& text) override { NB_OVERRIDE(forget, text); }
};

// A constraint that is written in Python
class PythonConstraint : public Constraint {
   public:
    NB_TRAMPOLINE(Constraint);

    Mask mask(const Tokens& path) override {
        constexpr const char* name = "mask";
        const nb::detail::ticket ticket(nb_trampoline, name, nb::detail::str_hash(name), false);
        if (!ticket.key.is_valid()) throw std::runtime_error("a constraint must have a method mask(path)");
        const nb::object found = nb_trampoline.base().attr(ticket.key)(nb::cast(path));
        const auto words = nb::cast<Int32s>(found);
        return Mask(words.data(), words.data() + words.size());
    }
};

// Remember the likeliest tokens, packed [T, k], behind each row that chose one.
inline void learn_rows(RecycleTable& table, const Rows& rows, const Tokens& before, const Int32s& chosen, const Int32s& top) {
    const auto count = static_cast<size_t>(rows.size());
    if (chosen.size() != count || top.ndim() != 2 || top.shape(0) != count)
        throw std::invalid_argument("one result per row");
    const auto tails = rows.tails(Tail(before));
    const auto width = top.shape(1);
    for (int row = 0; row < rows.size(); ++row)
        if (chosen.data()[row] >= 0) table.update(tails[row], {top.data() + row * width, width});
}

inline std::vector<std::pair<int, std::vector<std::pair<int, int>>>> lookup(const RecycleTable& table, const Tokens& tail) {
    std::vector<std::pair<int, std::vector<std::pair<int, int>>>> found;
    table.lookup(Tail(tail), [&](int order, std::span<const int> top) {
        found.emplace_back(order, std::vector<std::pair<int, int>>());
        for (const int packed : top) found.back().second.push_back(unpacked(packed));
    });
    return found;
}

inline double grow_trees(const std::vector<BoundedTree>& trees, int num_rows, const Doubles& seconds) {
    return grow(trees, num_rows, span_of(seconds));
}

inline void bind_rows(nb::module_& module) {
    nb::class_<Rows>(module, "SequenceRows")
        .def(nb::init<int>(), nb::arg("first_position"))
        .def("__len__", &Rows::size)
        .def_ro("root", &Rows::root)
        .def_ro("tokens", &Rows::tokens)
        .def_ro("positions", &Rows::positions)
        .def_ro("parents", &Rows::parents)
        .def_ro("choose", &Rows::choose)
        .def_prop_ro("root_position", [](const Rows& rows) { return rows.positions.at(rows.root); })
        .def("tokens_of", &Rows::tokens_of, nb::arg("rows"))
        .def("add", &Rows::add, nb::arg("token"), nb::arg("parent"), nb::arg("choose"))
        .def("score", &Rows::score, nb::arg("start"), nb::arg("stop"))
        .def("add_chain", &Rows::add_chain, nb::arg("tokens"), nb::arg("reaches_end"));
}

inline void bind_guessing(nb::module_& module) {
    module.attr("BIAS") = BIAS;
    module.def("prior", &prior, nb::arg("probability"));
    module.def("gumbel", &gumbel, nb::arg("seed"), nb::arg("position"), nb::arg("token"));
    module.def("grow", &grow_trees, nb::arg("trees"), nb::arg("num_rows"), nb::arg("seconds"));

    nb::class_<Acceptance>(module, "Acceptance")
        .def(nb::init<std::vector<double>>(), nb::arg("priors"))
        .def_rw("weights", &Acceptance::weights)
        .def_rw("evidence", &Acceptance::evidence);

    nb::class_<Judge>(module, "Judge")
        .def(nb::init<std::shared_ptr<Acceptance>>(), nb::arg("acceptance"))
        .def_rw("bias", &Judge::bias)
        .def("observe", &Judge::observe, nb::arg("tokens"))
        .def("forget", &Judge::forget, nb::arg("text"))
        .def(
            "judge",
            [](Judge& judge, const Lists& lists) {
                Proposals proposed;
                add_lists(lists, proposed);
                std::vector<Guess> guesses;
                judge.judge(proposed, all_of(proposed), false, guesses);
                std::sort(guesses.begin(), guesses.end());
                Ranked ranked;
                for (const Guess& guess : guesses) ranked.emplace_back(guess.token, guess.probability);
                return ranked;
            },
            nb::arg("lists"))
        .def(
            "without",
            [](Judge& judge, const Lists& lists, int token, const Source& source) {
                Proposals proposed;
                add_lists(lists, proposed);
                return judge.without(proposed, all_of(proposed), false, token, source.features);
            },
            nb::arg("lists"), nb::arg("token"), nb::arg("source"))
        .def(
            "learn",
            [](Judge& judge, const Lists& lists, int chosen) {
                Proposals proposed;
                add_lists(lists, proposed);
                std::vector<Guess> guesses;
                judge.judge(proposed, all_of(proposed), false, guesses);
                judge.learn(proposed, all_of(proposed), false, guesses, chosen);
            },
            nb::arg("lists"), nb::arg("chosen"));

    nb::class_<Bigrams>(module, "Bigrams")
        .def(
            "__init__",
            [](Bigrams* self, const Int32s& top) {
                if (top.ndim() != 2) throw std::invalid_argument("one row of likeliest tokens for each token");
                new (self) Bigrams(Tokens(top.data(), top.data() + top.size()), static_cast<int>(top.shape(1)));
            },
            nb::arg("top"));

    nb::class_<RecycleTable>(module, "RecycleTable")
        .def(nb::init<std::shared_ptr<Bigrams>, size_t>(), nb::arg("bigrams").none() = nb::none(),
             nb::arg("max_contexts") = size_t{1} << 16)
        .def("__len__", &RecycleTable::size)
        .def(
            "update", [](RecycleTable& table, const Tokens& tail, const Tokens& top) { table.update(Tail(tail), top); },
            nb::arg("tail"), nb::arg("top"))
        .def("learn", &learn_rows, nb::arg("rows"), nb::arg("before"), nb::arg("chosen"), nb::arg("top"))
        .def("lookup", &lookup, nb::arg("tail"));

    nb::class_<NgramPool>(module, "NgramPool")
        .def(nb::init<int, int>(), nb::arg("ngram_size"), nb::arg("guess_set_size"))
        .def("add", [](NgramPool& pool, const Tokens& ngram) { pool.add(ngram); }, nb::arg("ngram"))
        .def("add_text", [](NgramPool& pool, const Tokens& text) { pool.add_text(text); }, nb::arg("text"))
        .def(
            "tails",
            [](const NgramPool& pool, int first) {
                const auto tails = pool.tails(first);
                return std::vector<Tokens>(tails.rbegin(), tails.rend());
            },
            nb::arg("first"));

    nb::class_<Source, PythonSource>(module, "Source")
        .def(nb::init<int, int>(), nb::arg("first_feature"), nb::arg("num_features"))
        .def_prop_ro("first_feature", [](const Source& source) { return source.features.first; })
        .def_rw("is_silent", &Source::is_silent)
        .def(
            "propose",
            [](Source& source, const Tokens& tail, int depth) {
                Proposals proposed;
                source.propose(Tail(tail), depth, proposed);
                return lists_of(proposed);
            },
            nb::arg("tail"), nb::arg("depth"))
        .def("lay_out", [](const Source&, const Rows&, int) {}, nb::arg("rows"), nb::arg("room"))
        .def("learn", [](const Source&, const Rows&, const nb::object&) {}, nb::arg("rows"), nb::arg("chosen"))
        .def("observe", &Source::observe, nb::arg("tokens"), nb::arg("is_prompt"))
        .def("forget", &Source::forget, nb::arg("text"));

    nb::class_<NgramSource, Source>(module, "NgramSource")
        .def(nb::init<int, int, int, bool, bool>(), nb::arg("first_feature"), nb::arg("ngram_size"),
             nb::arg("guess_set_size"), nb::arg("from_prompt"), nb::arg("from_output"))
        .def_ro("pool", &NgramSource::pool)
        .attr("PRIORS") = nb::cast(NgramSource::priors());
    nb::class_<SuffixSource, Source>(module, "SuffixSource")
        .def(nb::init<int>(), nb::arg("first_feature"))
        .attr("PRIORS") = nb::cast(SuffixSource::priors());
    nb::class_<RecycleSource, Source>(module, "RecycleSource")
        .def(nb::init<int, std::shared_ptr<RecycleTable>>(), nb::arg("first_feature"), nb::arg("table"))
        .def(
            "sample_by",
            [](RecycleSource& source, int64_t seed, double temperature, int64_t top_k, double top_p, double min_p) {
                source.sampling = {seed, temperature < GREEDY_BELOW ? 0.0 : temperature, top_k, top_p, min_p};
            },
            nb::arg("seed"), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"))
        .attr("PRIORS") = nb::cast(RecycleSource::priors());

    nb::class_<Constraint, PythonConstraint>(module, "Constraint")
        .def(nb::init<>())
        .def_ro("forced", &Constraint::forced)
        .def("mask", [](Constraint& constraint, const Tokens& path) { return copied(constraint.mask(path)); }, nb::arg("path"));
    nb::class_<GrammarSource, Source>(module, "GrammarSource")
        .def(nb::init<int>(), nb::arg("first_feature"))
        .def("follow", &GrammarSource::follow, nb::arg("constraint").none())
        .attr("PRIORS") = nb::cast(GrammarSource::priors());

    nb::class_<CandidateTree>(module, "CandidateTree")
        .def(
            "__init__",
            [](CandidateTree* self, std::shared_ptr<Rows> rows, const Tokens& tail, int max_depth,
               std::vector<std::shared_ptr<Source>> sources, std::shared_ptr<Judge> judge,
               std::shared_ptr<Constraint> constraint) {
                new (self) CandidateTree(std::move(rows), Tail(tail), max_depth, std::move(sources), std::move(judge),
                                         std::move(constraint));
            },
            nb::arg("rows"), nb::arg("tail"), nb::arg("max_depth"), nb::arg("sources"), nb::arg("judge"),
            nb::arg("constraint").none() = nb::none())
        .def_ro("first_row", &CandidateTree::first_row)
        .def("masks",
             [](const CandidateTree& tree) {
                 const auto& masks = tree.masks();
                 return made<int32_t>({masks.size(), masks.empty() ? 0 : masks[0].size()}, [&](int32_t* to) {
                     for (const Mask& mask : masks) to = std::copy(mask.begin(), mask.end(), to);
                 });
             })
        .def_ro("rows", &CandidateTree::rows)
        .def_prop_ro("num_candidates", &CandidateTree::num_candidates)
        .def_prop_ro("margin", &CandidateTree::margin)
        .def_prop_ro("next_probability", &CandidateTree::next_probability)
        .def("fill", &CandidateTree::fill, nb::arg("room"))
        .def("truncate", &CandidateTree::truncate, nb::arg("count"))
        .def("walk", [](const CandidateTree& tree, const Int32s& chosen) { return tree.walk(span_of(chosen)); },
             nb::arg("chosen"))
        .def("learn", [](CandidateTree& tree, const Int32s& chosen) { tree.learn(span_of(chosen)); }, nb::arg("chosen"))
        .def("proposers", &CandidateTree::proposers)
        .def(
            "credit",
            [](CandidateTree& tree, const Int32s& chosen, const Source& source) {
                return tree.credit(span_of(chosen), source.features);
            },
            nb::arg("chosen"), nb::arg("source"))
        .def(
            "tally",
            [](const CandidateTree& tree, const Int32s& chosen) {
                const auto counts = tree.tally(span_of(chosen));
                return std::pair(counts.by_source, counts.by_depth);
            },
            nb::arg("chosen"));
}

}  // namespace outrider
