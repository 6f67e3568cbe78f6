// The Python module: what a step takes per row, node and token, compiled. __init__.pyi says what each function gives.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
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
#include "history.h"
#include "keys.h"
#include "partition.h"
#include "plan.h"
#include "planner.h"
#include "recycling.h"
#include "retention.h"
#include "rows.h"
#include "sources.h"
#include "tree.h"

namespace py = pybind11;
using namespace outrider;

namespace {

using Tokens = std::vector<int>;
using Int32s = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Int64s = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Bools = py::array_t<bool, py::array::c_style | py::array::forcecast>;
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

// A constraint that is written in Python
class PythonConstraint : public Constraint, public py::trampoline_self_life_support {
   public:
    using Constraint::Constraint;

    Mask mask(const Tokens& path) override {
        const py::function mask = py::get_override(static_cast<const Constraint*>(this), "mask");
        if (!mask) throw std::runtime_error("a constraint must have a method mask(path)");
        const auto words = mask(path).cast<Int32s>();
        return Mask(words.data(), words.data() + words.size());
    }
};

// Remember the likeliest tokens, packed [T, k], behind each row that chose one.
void learn_rows(RecycleTable& table, const Rows& rows, const Tokens& before, const Int32s& chosen, const Int32s& top) {
    if (chosen.size() != rows.size() || top.ndim() != 2 || top.shape(0) != rows.size())
        throw std::invalid_argument("one result per row");
    const auto tails = rows.tails(Tail(before));
    const auto width = static_cast<size_t>(top.shape(1));
    for (int row = 0; row < rows.size(); ++row)
        if (chosen.data()[row] >= 0) table.update(tails[row], {top.data() + row * width, width});
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

template <class T, int Flags>
std::span<const T> span_of(const py::array_t<T, Flags>& array) {
    return {array.data(), static_cast<size_t>(array.size())};
}

// An array of a vector's own memory, which lives as long as `owner`
template <class T>
py::array_t<T> view(const std::vector<T>& values, std::vector<py::ssize_t> shape, const py::handle& owner) {
    return py::array_t<T>(std::move(shape), values.data(), owner);
}

template <class T>
py::array_t<T> copied(const std::vector<T>& values) {
    return py::array_t<T>(std::ssize(values), values.data());
}

Bools flags(const std::vector<uint8_t>& values, std::vector<py::ssize_t> shape) {
    Bools array(std::move(shape));
    std::copy(values.begin(), values.end(), array.mutable_data());
    return array;
}

Int32s assembled(const std::vector<Part>& parts, int num_replicas) {
    py::ssize_t count = 0;
    for (const auto& [rows, slot] : parts) count += rows->size();
    Int32s table({count, py::ssize_t{ROW_COLUMNS}});
    assemble(parts, num_replicas, table.mutable_data());
    return table;
}

// The lines [C, 2] (row of the plan, source) with which the next plan commits these rows of a sequence's, of which the first
// is the plan's row `start`.
//
// The owner of the last accepted row has run all its ancestors, so it is the source of them all; nobody copies what every
// replica has run.
Int32s commit_lines(const Int32s& plan, int start, const Tokens& accepted, int num_replicas) {
    const int everywhere = static_cast<int>((1u << num_replicas) - 1);
    const auto rows = plan.unchecked<2>();
    bool shared = true;
    for (const int row : accepted) shared &= rows(start + row, REPLICAS) == everywhere;
    Int32s lines({std::ssize(accepted), py::ssize_t{2}});
    auto* line = lines.mutable_data();
    for (const int row : accepted) {
        *line++ = start + row;
        *line++ = shared ? -1 : rows(start + accepted.back(), OWNER);
    }
    return lines;
}

py::object visible(const Retention& retained, const Int64s& queries, const Int64s& keys, const Bools& anchored) {
    Bools sees({queries.size(), keys.size()});
    bool* to = sees.mutable_data();
    bool all = true;
    for (const int64_t query : span_of(queries))
        for (py::ssize_t key = 0; key < keys.size(); ++key)
            all &= *to++ = retained.sees(query, keys.data()[key], anchored.data()[key]);
    return all ? py::none() : py::object(sees);
}

// In memory of this process, blocks of rows: row `start` + i of each block becomes what its row start + rows[i] was, rows
// being ascending.
void pull_rows(uintptr_t address, int64_t num_blocks, int64_t block_bytes, int64_t row_bytes, int64_t start,
               const Longs& rows) {
    size_t in_place = 0;
    while (in_place < rows.size() && rows[in_place] == static_cast<int64_t>(in_place)) ++in_place;
    for (size_t i = in_place; i < rows.size(); ++i)
        if (rows[i] <= (i ? rows[i - 1] : -1)) throw std::invalid_argument("rows out of order");
    if (in_place == rows.size()) return;
    auto* block = reinterpret_cast<std::byte*>(address) + start * row_bytes;
    for (int64_t number = 0; number < num_blocks; ++number, block += block_bytes)
        for (size_t i = in_place; i < rows.size(); ++i)
            std::memcpy(block + i * row_bytes, block + rows[i] * row_bytes, row_bytes);
}

// For tests, and for decoders that make masks of it
void bind_retention(py::module_& module) {
    py::class_<Compaction>(module, "Compaction")
        .def_property_readonly("kept", [](const Compaction& change) { return copied(change.kept); })
        .def_property_readonly("turns", [](const Compaction& change) { return copied(change.turns); })
        .def_readonly("num_turned_before", &Compaction::num_turned_before);

    py::classh<Retention>(module, "Retention")
        .def_readonly("slot", &Retention::slot)
        .def_readonly("num_initial", &Retention::num_initial)
        .def_property_readonly("separators", &Retention::separators)
        .def_readonly("max_stored", &Retention::max_stored)
        .def_readonly("max_turned", &Retention::max_turned)
        .def_readwrite("length", &Retention::length)
        .def_property_readonly("positions", [](const Retention& retained) { return copied(retained.positions); })
        .def_property_readonly(
            "anchored", [](const Retention& retained) { return flags(retained.anchored, {retained.num_stored()}); })
        .def_property_readonly("num_stored", &Retention::num_stored)
        .def_property_readonly("horizon", &Retention::horizon)
        .def_property_readonly("num_slot_anchors", &Retention::num_slot_anchors)
        .def("reset", &Retention::reset)
        .def("commit", [](Retention& retained, const Tokens& tokens) { return retained.commit(tokens); }, py::arg("tokens"))
        .def("begin_turn", &Retention::begin_turn, py::arg("num_coming"))
        .def(
            "may_anchor",
            [](const Retention& retained, const Int64s& positions, const Int64s& tokens) {
                Bools may(positions.size());
                for (py::ssize_t i = 0; i < positions.size(); ++i)
                    may.mutable_data()[i] = retained.may_anchor(positions.data()[i], static_cast<int>(tokens.data()[i]));
                return may;
            },
            py::arg("positions"), py::arg("tokens"))
        .def(
            "slots",
            [](const Retention& retained, const Int64s& positions) {
                Int64s slots(positions.size());
                for (py::ssize_t i = 0; i < positions.size(); ++i)
                    slots.mutable_data()[i] = retained.slot_of(positions.data()[i]);
                return slots;
            },
            py::arg("positions"))
        .def("sees", &visible, py::arg("queries"), py::arg("keys"), py::arg("anchored"))
        .def(
            "num_seen",
            [](const Retention& retained, const Tokens& tokens) {
                Longs counts;
                retained.num_seen(tokens, counts);
                return copied(counts);
            },
            py::arg("tokens"));

    module.def("pull_rows", &pull_rows, py::arg("address"), py::arg("num_blocks"), py::arg("block_bytes"), py::arg("row_bytes"),
               py::arg("start"), py::arg("rows"));

    py::classh<Sliding, Retention>(module, "Sliding")
        .def(py::init<std::optional<int64_t>, int64_t, bool, Tokens, int64_t>(), py::arg("window"), py::arg("max_kept"),
             py::arg("slot"), py::arg("separators") = Tokens(), py::arg("num_initial") = 0)
        .def_readonly("window", &Sliding::window)
        .def_property_readonly("interval", &Sliding::interval);

    py::classh<Compacting, Retention>(module, "Compacting")
        .def(py::init<int64_t, std::optional<int64_t>, bool, Tokens, int64_t, int64_t, bool, bool>(), py::arg("size"),
             py::arg("local"), py::arg("slot"), py::arg("separators") = Tokens(), py::arg("num_initial") = 0,
             py::arg("max_separators") = 0, py::arg("compact_after_attention") = false, py::arg("per_turn") = false)
        .def_readonly("max_separators", &Compacting::max_separators)
        .def_property_readonly("num_anchors", &Compacting::num_anchors);

    py::classh<Ledger>(module, "Ledger")
        .def(py::init<std::vector<Ledger::Group>, std::optional<int64_t>>(), py::arg("groups"), py::arg("capacity"))
        .def_property_readonly("length", &Ledger::length)
        .def_property_readonly("horizon", &Ledger::horizon)
        .def_property_readonly("kept_last", &Ledger::kept_last)
        .def_property_readonly("kept_sum", &Ledger::kept_sum)
        .def("full_at", [](const Ledger& ledger, const Tokens& tokens) { return ledger.full_at(tokens); }, py::arg("tokens"))
        .def("begin_turn", &Ledger::begin_turn, py::arg("num_coming"))
        .def("commit", [](Ledger& ledger, const Tokens& tokens) { ledger.commit(tokens); }, py::arg("tokens"));
}

void bind_plan(py::module_& module) {
    module.def("partition", &partitioned, py::arg("parents"), py::arg("num_replicas"));
    module.def("assemble", &assembled, py::arg("parts"), py::arg("num_replicas"));
    module.def("commit_lines", &commit_lines, py::arg("rows"), py::arg("start"), py::arg("accepted"), py::arg("num_replicas"));
    module.def(
        "merge",
        [](const Int32s& rows, const std::vector<Int32s>& results, int width) {
            std::vector<const int32_t*> starts;
            for (const Int32s& result : results) starts.push_back(result.data());
            Int32s merged({rows.shape(0), py::ssize_t{width}});
            merge(span_of(rows), starts, width, merged.mutable_data());
            return merged;
        },
        py::arg("rows"), py::arg("results"), py::arg("width"));
    module.def(
        "ancestry",
        [](const Int32s& parents) { return flags(ancestry(span_of(parents)), {parents.size(), parents.size()}); },
        py::arg("parents"));

    py::classh<Share>(module, "Share")
        .def(py::init([](const Int32s& rows, const Int32s& sequences, int replica, int min_rows) {
                 return Share(span_of(rows), span_of(sequences), replica, min_rows);
             }),
             py::arg("rows"), py::arg("sequences"), py::arg("replica") = 0, py::arg("min_rows") = 1)
        .def_property_readonly("num_rows", &Share::num_rows)
        .def_property_readonly("local",
                               [](const py::object& self) {
                                   const auto& share = self.cast<const Share&>();
                                   return view(share.local, {share.num_rows()}, self);
                               })
        .def_property_readonly("columns",
                               [](const py::object& self) {
                                   const auto& share = self.cast<const Share&>();
                                   return view(share.columns, {3, share.num_padded}, self);
                               })
        .def_property_readonly("parents",
                               [](const py::object& self) {
                                   const auto& share = self.cast<const Share&>();
                                   return view(share.parents, {share.num_padded}, self);
                               })
        .def_property_readonly("wanted",
                               [](const py::object& self) {
                                   const auto& share = self.cast<const Share&>();
                                   return view(share.wanted, {std::ssize(share.wanted)}, self);
                               })
        .def_property_readonly("sequence_of",
                               [](const py::object& self) {
                                   const auto& share = self.cast<const Share&>();
                                   return view(share.sequence_of, {std::ssize(share.sequence_of)}, self);
                               })
        .def_property_readonly("sampled",
                               [](const py::object& self) {
                                   const auto& share = self.cast<const Share&>();
                                   return view(share.sampled, {std::ssize(share.sampled)}, self);
                               })
        .def_property_readonly("runs",
                               [](const Share& share) {
                                   std::vector<std::tuple<int, int, int>> runs;
                                   for (const auto& [slot, start, stop] : share.runs) runs.emplace_back(slot, start, stop);
                                   return runs;
                               })
        .def_readonly("turns", &Share::turns)
        .def(
            "spread",
            [](const Share& share, const Int32s& results) {
                if (results.ndim() != 2 || results.shape(0) != std::ssize(share.wanted))
                    throw std::invalid_argument("one result per wanted row");
                const auto width = static_cast<int>(results.shape(1));
                Int32s chosen({share.num_rows(), width});
                auto without = share.spread(span_of(results), width, chosen.mutable_data());
                return std::pair(chosen, std::move(without));
            },
            py::arg("results"))
        .def(
            "commits",
            [](const Share& share, const Int32s& lines) {
                std::vector<std::tuple<int, int, Tokens, Tokens>> found;
                for (auto& commit : share.commits(span_of(lines)))
                    found.emplace_back(commit.slot, commit.source, std::move(commit.staged), std::move(commit.tokens));
                return found;
            },
            py::arg("lines"));

    py::classh<Keys>(module, "Keys")
        .def(py::init([](const Retention& retained, const Int64s& positions, const Int64s& tokens, const Int32s& parents,
                         std::optional<int64_t> window, int64_t block) {
                 return Keys(Sight(retained, span_of(positions), span_of(tokens), span_of(parents), window), block);
             }),
             py::arg("retained"), py::arg("positions"), py::arg("tokens"), py::arg("parents"), py::arg("window"),
             py::arg("block"))
        .def_readonly("num_tail", &Keys::num_tail)
        .def_readonly("num_shared", &Keys::num_shared)
        .def("addresses",
             [](const Keys& keys) {
                 const auto address = [](const auto& values) {
                     return values.empty() ? uintptr_t{0} : reinterpret_cast<uintptr_t>(values.data());
                 };
                 return std::tuple(address(keys.columns), address(keys.tails), address(keys.visible));
             })
        .def_property_readonly("num_columns", [](const Keys& keys) { return std::ssize(keys.columns); })
        .def_property_readonly("columns",
                               [](const py::object& self) {
                                   const auto& keys = self.cast<const Keys&>();
                                   return view(keys.columns, {std::ssize(keys.columns)}, self);
                               })
        .def_property_readonly("tails",
                               [](const py::object& self) {
                                   const auto& keys = self.cast<const Keys&>();
                                   return view(keys.tails, {std::ssize(keys.tails)}, self);
                               })
        .def_property_readonly("visible", [](const py::object& self) {
            const auto& keys = self.cast<const Keys&>();
            return view(keys.visible, {std::ssize(keys.visible)}, self);
        });
}

void bind_history(py::module_& module) {
    module.attr("MOST_TEXT") = History::MOST_TEXT;
    py::classh<History>(module, "History")
        .def(py::init<>())
        .def_property_readonly("length", &History::length)
        .def("begin", &History::begin, py::arg("output_start"))
        .def("first", &History::first, py::arg("count"))
        .def("commit", [](History& history, const Tokens& tokens) { history.commit(tokens); }, py::arg("tokens"))
        .def(
            "at",
            [](History& history, const Int32s& rows, int row) {
                if (row < 0 || row >= rows.shape(0)) throw std::out_of_range("no such row");
                const auto found = history.at(span_of(rows), row);
                return std::pair(copied(found.tokens), copied(found.counts));
            },
            py::arg("rows"), py::arg("row"));
}

}  // namespace

PYBIND11_MODULE(core, module, py::mod_gil_not_used()) {
    module.attr("TAIL") = Tail::MOST;
    module.attr("BIAS") = BIAS;
    module.attr("RUN") = RUN;
    module.attr("GREEDY_BELOW") = GREEDY_BELOW;
    module.def("prior", &prior, py::arg("probability"));
    module.def("gumbel", &gumbel, py::arg("seed"), py::arg("position"), py::arg("token"));
    module.def("grow", &grow_trees, py::arg("trees"), py::arg("num_rows"), py::arg("seconds"));
    bind_retention(module);

    py::classh<Rows>(module, "SequenceRows")
        .def(py::init<int>(), py::arg("first_position"))
        .def("__len__", &Rows::size)
        .def_readonly("root", &Rows::root)
        .def_readonly("tokens", &Rows::tokens)
        .def_readonly("positions", &Rows::positions)
        .def_readonly("parents", &Rows::parents)
        .def_readonly("choose", &Rows::choose)
        .def_property_readonly("root_position", [](const Rows& rows) { return rows.positions.at(rows.root); })
        .def("tokens_of", &Rows::tokens_of, py::arg("rows"))
        .def("add", &Rows::add, py::arg("token"), py::arg("parent"), py::arg("choose"))
        .def("score", &Rows::score, py::arg("start"), py::arg("stop"))
        .def("add_chain", &Rows::add_chain, py::arg("tokens"), py::arg("reaches_end"));
    bind_plan(module);
    bind_history(module);

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
                std::sort(guesses.begin(), guesses.end());
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
        .def(
            "sample_by",
            [](RecycleSource& source, int64_t seed, double temperature, int64_t top_k, double top_p, double min_p) {
                source.sampling = {seed, temperature < GREEDY_BELOW ? 0.0 : temperature, top_k, top_p, min_p};
            },
            py::arg("seed"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"))
        .attr("PRIORS") = RecycleSource::priors();

    py::classh<Constraint, PythonConstraint>(module, "Constraint")
        .def(py::init<>())
        .def_readonly("forced", &Constraint::forced)
        .def("mask", [](Constraint& constraint, const Tokens& path) { return copied(constraint.mask(path)); }, py::arg("path"));
    py::classh<GrammarSource, Source>(module, "GrammarSource")
        .def(py::init<int>(), py::arg("first_feature"))
        .def("follow", &GrammarSource::follow, py::arg("constraint").none(true))
        .attr("PRIORS") = GrammarSource::priors();

    py::classh<CandidateTree>(module, "CandidateTree")
        .def(py::init([](std::shared_ptr<Rows> rows, const Tokens& tail, int max_depth,
                         std::vector<std::shared_ptr<Source>> sources, std::shared_ptr<Judge> judge,
                         std::shared_ptr<Constraint> constraint) {
                 return CandidateTree(std::move(rows), Tail(tail), max_depth, std::move(sources), std::move(judge),
                                      std::move(constraint));
             }),
             py::arg("rows"), py::arg("tail"), py::arg("max_depth"), py::arg("sources"), py::arg("judge"),
             py::arg("constraint") = nullptr)
        .def_readonly("first_row", &CandidateTree::first_row)
        .def("masks",
             [](const CandidateTree& tree) {
                 const auto& masks = tree.masks();
                 Int32s found({std::ssize(masks), masks.empty() ? py::ssize_t{0} : std::ssize(masks[0])});
                 auto* to = found.mutable_data();
                 for (const Mask& mask : masks) to = std::copy(mask.begin(), mask.end(), to);
                 return found;
             })
        .def_readonly("rows", &CandidateTree::rows)
        .def_property_readonly("num_candidates", &CandidateTree::num_candidates)
        .def_property_readonly("margin", &CandidateTree::margin)
        .def_property_readonly("next_probability", &CandidateTree::next_probability)
        .def("fill", &CandidateTree::fill, py::arg("room"))
        .def("truncate", &CandidateTree::truncate, py::arg("count"))
        .def("walk", [](const CandidateTree& tree, const Int32s& chosen) { return tree.walk(span_of(chosen)); },
             py::arg("chosen"))
        .def("learn", [](CandidateTree& tree, const Int32s& chosen) { tree.learn(span_of(chosen)); }, py::arg("chosen"))
        .def(
            "credit",
            [](CandidateTree& tree, const Int32s& chosen, const Source& source) {
                return tree.credit(span_of(chosen), source.features);
            },
            py::arg("chosen"), py::arg("source"));
}
