// The Python module: what guessing takes per row and node, compiled. __init__.pyi says what each function gives.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/trampoline_self_life_support.h>

#include "acceptance.h"
#include "partition.h"
#include "planner.h"
#include "recycling.h"
#include "rows.h"
#include "sources.h"
#include "tree.h"

namespace py = pybind11;
using namespace outrider;

namespace {

using Tokens = std::vector<int>;
using Int32s = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Lists = std::vector<std::pair<int, std::vector<std::pair<int, int>>>>;  // (absent, [(token, feature)])
using Ranked = std::vector<std::pair<int, double>>;                             // (token, probability)

void add_lists(const Lists& lists, Proposals& proposed) {
    for (const auto& [absent, proposals] : lists) {
        proposed.open(absent);
        for (const auto& [token, feature] : proposals) proposed.propose(token, feature);
    }
}

Lists lists_of(const Proposals& proposed) {
    Lists lists;
    for (const ProposalList& list : proposed.lists) {
        lists.emplace_back(list.absent, std::vector<std::pair<int, int>>());
        for (const auto [token, feature] : proposed.of(list)) lists.back().second.emplace_back(token, feature);
    }
    return lists;
}

Extent all_of(const Proposals& proposed) { return {0, static_cast<int>(proposed.lists.size())}; }

Tokens tokens_of(const Tail& tail) {
    Tokens tokens;
    for (int back = tail.size() - 1; back >= 0; --back) tokens.push_back(tail[back]);
    return tokens;
}

// A source that is written in Python
class PythonSource : public Source, public py::trampoline_self_life_support {
   public:
    using Source::Source;

    void propose(const Tail& tail, int depth, Proposals& proposed) override {
        const py::function propose = py::get_override(static_cast<const Source*>(this), "propose");
        if (!propose) throw std::runtime_error("a candidate source must have a method propose(tail, depth)");
        add_lists(propose(py::tuple(py::cast(tokens_of(tail))), depth).cast<Lists>(), proposed);
    }

    void observe(const Tokens& tokens, bool is_prompt) override {
        PYBIND11_OVERRIDE(void, Source, observe, tokens, is_prompt);
    }

    void forget(const Tokens& text) override { PYBIND11_OVERRIDE(void, Source, forget, text); }
};

// Rows [T, 4]: token, position, parent, choose
Int32s as_array(const Rows& rows) {
    Int32s table({rows.size(), 4});
    auto* line = table.mutable_data();
    for (int row = 0; row < rows.size(); ++row, line += 4) {
        line[0] = rows.tokens[row];
        line[1] = rows.positions[row];
        line[2] = rows.parents[row];
        line[3] = rows.choose[row];
    }
    return table;
}

// Remember the likeliest tokens, packed [T, k], behind each row that chose one.
void learn_rows(RecycleTable& table, const Rows& rows, const Tokens& before, const Tokens& chosen, const Int32s& top) {
    const auto tails = rows.tails(Tail(before));
    const auto likeliest = top.unchecked<2>();
    for (int row = 0; row < rows.size(); ++row)
        if (chosen[row] >= 0)
            table.update(tails[row], {likeliest.data(row, 0), static_cast<size_t>(likeliest.shape(1))});
}

std::vector<std::pair<int, std::vector<std::pair<int, int>>>> lookup(const RecycleTable& table, const Tokens& tail) {
    std::vector<std::pair<int, std::vector<std::pair<int, int>>>> found;
    table.lookup(Tail(tail), [&](int order, std::span<const int> top) {
        found.emplace_back(order, std::vector<std::pair<int, int>>());
        for (const int packed : top) found.back().second.push_back(unpacked(packed));
    });
    return found;
}

double grow_trees(const std::vector<BoundedTree>& trees, int num_rows, const Doubles& seconds) {
    return grow(trees, num_rows, {seconds.data(), static_cast<size_t>(seconds.size())});
}

std::pair<Int32s, Int32s> partitioned(const Int32s& parents, int num_replicas) {
    const Partition parts({parents.data(), static_cast<size_t>(parents.size())}, num_replicas);
    const Tokens owners = parts.owners();
    return {Int32s(std::ssize(owners), owners.data()), Int32s(std::ssize(parts.replicas), parts.replicas.data())};
}

}  // namespace

PYBIND11_MODULE(core, module, py::mod_gil_not_used()) {
    module.attr("TAIL") = Tail::MOST;
    module.attr("BIAS") = BIAS;
    module.attr("RUN") = RUN;
    module.def("prior", &prior, py::arg("probability"));
    module.def("grow", &grow_trees, py::arg("trees"), py::arg("num_rows"), py::arg("seconds"));
    module.def("partition", &partitioned, py::arg("parents"), py::arg("num_replicas"));

    py::classh<Rows>(module, "SequenceRows")
        .def(py::init<int>(), py::arg("first_position"))
        .def("__len__", &Rows::size)
        .def_readonly("root", &Rows::root)
        .def_readonly("tokens", &Rows::tokens)
        .def_readonly("positions", &Rows::positions)
        .def_readonly("parents", &Rows::parents)
        .def_readonly("choose", &Rows::choose)
        .def("add", &Rows::add, py::arg("token"), py::arg("parent"), py::arg("choose"))
        .def("add_chain", &Rows::add_chain, py::arg("tokens"), py::arg("reaches_end"))
        .def("as_array", &as_array);

    py::classh<Acceptance>(module, "Acceptance")
        .def(py::init<std::vector<double>>(), py::arg("priors"))
        .def_readwrite("weights", &Acceptance::weights)
        .def_readwrite("evidence", &Acceptance::evidence);

    py::classh<Judge>(module, "Judge")
        .def(py::init<std::shared_ptr<Acceptance>>(), py::arg("acceptance"))
        .def_readwrite("bias", &Judge::bias)
        .def("observe", &Judge::observe, py::arg("tokens"))
        .def("forget", &Judge::forget, py::arg("text"))
        .def(
            "judge",
            [](Judge& judge, const Lists& lists) {
                Proposals proposed;
                add_lists(lists, proposed);
                std::vector<Guess> guesses;
                judge.judge(proposed, all_of(proposed), false, guesses);
                Ranked ranked;
                for (const Guess& guess : guesses) ranked.emplace_back(guess.token, guess.probability);
                return ranked;
            },
            py::arg("lists"))
        .def(
            "without",
            [](Judge& judge, const Lists& lists, int token, const Source& source) {
                Proposals proposed;
                add_lists(lists, proposed);
                return judge.without(proposed, all_of(proposed), false, token, source.features);
            },
            py::arg("lists"), py::arg("token"), py::arg("source"))
        .def(
            "learn",
            [](Judge& judge, const Lists& lists, int chosen) {
                Proposals proposed;
                add_lists(lists, proposed);
                std::vector<Guess> guesses;
                judge.judge(proposed, all_of(proposed), false, guesses);
                judge.learn(proposed, all_of(proposed), false, guesses, chosen);
            },
            py::arg("lists"), py::arg("chosen"));

    py::classh<Bigrams>(module, "Bigrams")
        .def(py::init([](const Int32s& top) {
                 return Bigrams(Tokens(top.data(), top.data() + top.size()), static_cast<int>(top.shape(1)));
             }),
             py::arg("top"));

    py::classh<RecycleTable>(module, "RecycleTable")
        .def(py::init<std::shared_ptr<Bigrams>, size_t>(), py::arg("bigrams") = nullptr,
             py::arg("max_contexts") = size_t{1} << 16)
        .def("__len__", &RecycleTable::size)
        .def(
            "update", [](RecycleTable& table, const Tokens& tail, const Tokens& top) { table.update(Tail(tail), top); },
            py::arg("tail"), py::arg("top"))
        .def("learn", &learn_rows, py::arg("rows"), py::arg("before"), py::arg("chosen"), py::arg("top"))
        .def("lookup", &lookup, py::arg("tail"));

    py::classh<NgramPool>(module, "NgramPool")
        .def(py::init<int, int>(), py::arg("ngram_size"), py::arg("guess_set_size"))
        .def("add", [](NgramPool& pool, const Tokens& ngram) { pool.add(ngram); }, py::arg("ngram"))
        .def("add_text", [](NgramPool& pool, const Tokens& text) { pool.add_text(text); }, py::arg("text"))
        .def(
            "tails",
            [](const NgramPool& pool, int first) {
                const auto tails = pool.tails(first);
                return std::vector<Tokens>(tails.rbegin(), tails.rend());
            },
            py::arg("first"));

    py::classh<Source, PythonSource>(module, "Source")
        .def(py::init<int, int>(), py::arg("first_feature"), py::arg("num_features"))
        .def_property_readonly("first_feature", [](const Source& source) { return source.features.first; })
        .def_readwrite("is_silent", &Source::is_silent)
        .def(
            "propose",
            [](Source& source, const Tokens& tail, int depth) {
                Proposals proposed;
                source.propose(Tail(tail), depth, proposed);
                return lists_of(proposed);
            },
            py::arg("tail"), py::arg("depth"))
        .def("lay_out", [](const Source&, const Rows&, int) {}, py::arg("rows"), py::arg("room"))
        .def("learn", [](const Source&, const Rows&, const py::object&) {}, py::arg("rows"), py::arg("chosen"))
        .def("observe", &Source::observe, py::arg("tokens"), py::arg("is_prompt"))
        .def("forget", &Source::forget, py::arg("text"));

    py::classh<NgramSource, Source>(module, "NgramSource")
        .def(py::init<int, int, int, bool, bool>(), py::arg("first_feature"), py::arg("ngram_size"),
             py::arg("guess_set_size"), py::arg("from_prompt"), py::arg("from_output"))
        .def_readonly("pool", &NgramSource::pool)
        .attr("PRIORS") = NgramSource::priors();
    py::classh<SuffixSource, Source>(module, "SuffixSource")
        .def(py::init<int>(), py::arg("first_feature"))
        .attr("PRIORS") = SuffixSource::priors();
    py::classh<RecycleSource, Source>(module, "RecycleSource")
        .def(py::init<int, std::shared_ptr<RecycleTable>>(), py::arg("first_feature"), py::arg("table"))
        .attr("PRIORS") = RecycleSource::priors();

    py::classh<CandidateTree>(module, "CandidateTree")
        .def(py::init([](std::shared_ptr<Rows> rows, const Tokens& tail, int max_depth,
                         std::vector<std::shared_ptr<Source>> sources, std::shared_ptr<Judge> judge) {
                 return CandidateTree(std::move(rows), Tail(tail), max_depth, std::move(sources), std::move(judge));
             }),
             py::arg("rows"), py::arg("tail"), py::arg("max_depth"), py::arg("sources"), py::arg("judge"))
        .def_readonly("rows", &CandidateTree::rows)
        .def_property_readonly("num_candidates", &CandidateTree::num_candidates)
        .def_property_readonly("margin", &CandidateTree::margin)
        .def_property_readonly("next_probability", &CandidateTree::next_probability)
        .def("fill", &CandidateTree::fill, py::arg("room"))
        .def("truncate", &CandidateTree::truncate, py::arg("count"))
        .def("walk", [](const CandidateTree& tree, const Tokens& chosen) { return tree.walk(chosen); },
             py::arg("chosen"))
        .def("learn", [](CandidateTree& tree, const Tokens& chosen) { tree.learn(chosen); }, py::arg("chosen"))
        .def(
            "credit",
            [](CandidateTree& tree, const Tokens& chosen, const Source& source) {
                return tree.credit(chosen, source.features);
            },
            py::arg("chosen"), py::arg("source"));
}
