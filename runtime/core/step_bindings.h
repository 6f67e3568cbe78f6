// Bindings: what a cache keeps, and a step's rows as they are put together and taken apart.

#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "arrays.h"
#include "history.h"
#include "keys.h"
#include "plan.h"
#include "retention.h"

namespace outrider {

inline std::pair<Out<int32_t>, Out<int32_t>> partitioned(const Int32s& parents, int num_replicas) {
    const Partition parts(span_of(parents), num_replicas);
    return {copied(parts.owners()), copied(parts.replicas)};
}

inline Out<int32_t> assembled(const std::vector<Part>& parts, int num_replicas) {
    size_t count = 0;
    for (const auto& [rows, slot] : parts) count += rows->size();
    return made<int32_t>({count, ROW_COLUMNS}, [&](int32_t* table) { assemble(parts, num_replicas, table); });
}

// The lines [C, 2] (row of the plan, source) with which the next plan commits these rows of a sequence's, of which the first
// is the plan's row `start`.
//
// The owner of the last accepted row has run all its ancestors, so it is the source of them all; nobody copies what every
// replica has run.
inline Out<int32_t> commit_lines(const Int32s& plan, int start, const Tokens& accepted, int num_replicas) {
    const int everywhere = static_cast<int>((1u << num_replicas) - 1);
    const auto row_of = [&](int row) {
        const size_t at = static_cast<size_t>(start + row) * ROW_COLUMNS;
        if (at >= plan.size()) throw std::out_of_range("a row of the plan");
        return plan.data() + at;
    };
    bool shared = true;
    for (const int row : accepted) shared &= row_of(row)[REPLICAS] == everywhere;
    return made<int32_t>({accepted.size(), 2}, [&](int32_t* line) {
        for (const int row : accepted) {
            *line++ = start + row;
            *line++ = shared ? -1 : row_of(accepted.back())[OWNER];
        }
    });
}

inline nb::object visible(const Retention& retained, const Int64s& queries, const Int64s& keys, const Bools& anchored) {
    bool all = true;
    const auto sees = made<bool>({queries.size(), keys.size()}, [&](bool* to) {
        for (const int64_t query : span_of(queries))
            for (size_t key = 0; key < keys.size(); ++key)
                all &= *to++ = retained.sees(query, keys.data()[key], anchored.data()[key]);
    });
    return all ? nb::none() : nb::cast(sees);
}

// In memory of this process, blocks of rows: row `start` + i of each block becomes what its row start + rows[i] was, rows
// being ascending.
inline void pull_rows(uintptr_t address, int64_t num_blocks, int64_t block_bytes, int64_t row_bytes, int64_t start,
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
inline void bind_retention(nb::module_& module) {
    nb::class_<Compaction>(module, "Compaction")
        .def_prop_ro("kept", [](const Compaction& change) { return copied(change.kept); }, nb::rv_policy::automatic)
        .def_prop_ro("turns", [](const Compaction& change) { return copied(change.turns); }, nb::rv_policy::automatic)
        .def_ro("num_turned_before", &Compaction::num_turned_before);

    nb::class_<Retention>(module, "Retention")
        .def_ro("slot", &Retention::slot)
        .def_ro("num_initial", &Retention::num_initial)
        .def_prop_ro("separators", &Retention::separators)
        .def_ro("max_stored", &Retention::max_stored)
        .def_ro("max_turned", &Retention::max_turned)
        .def_rw("length", &Retention::length)
        .def_prop_ro("positions", [](const Retention& retained) { return copied(retained.positions); }, nb::rv_policy::automatic)
        .def_prop_ro(
            "anchored", [](const Retention& retained) { return flags(retained.anchored, {retained.anchored.size()}); },
            nb::rv_policy::automatic)
        .def_prop_ro("num_stored", &Retention::num_stored)
        .def_prop_ro("horizon", &Retention::horizon)
        .def_prop_ro("num_slot_anchors", &Retention::num_slot_anchors)
        .def("reset", &Retention::reset)
        .def("state", [](const Retention& retained) { return copied(retained.state()); })
        .def("restore", &Retention::restore, nb::arg("state"))
        .def("commit", [](Retention& retained, const Tokens& tokens) { return retained.commit(tokens); }, nb::arg("tokens"))
        .def("begin_turn", &Retention::begin_turn, nb::arg("num_coming"))
        .def(
            "may_anchor",
            [](const Retention& retained, const Int64s& positions, const Int64s& tokens) {
                return made<bool>({positions.size()}, [&](bool* may) {
                    for (size_t i = 0; i < positions.size(); ++i)
                        may[i] = retained.may_anchor(positions.data()[i], static_cast<int>(tokens.data()[i]));
                });
            },
            nb::arg("positions"), nb::arg("tokens"))
        .def(
            "slots",
            [](const Retention& retained, const Int64s& positions) {
                return made<int64_t>({positions.size()}, [&](int64_t* slots) {
                    for (size_t i = 0; i < positions.size(); ++i) slots[i] = retained.slot_of(positions.data()[i]);
                });
            },
            nb::arg("positions"))
        .def("sees", &visible, nb::arg("queries"), nb::arg("keys"), nb::arg("anchored"))
        .def(
            "num_seen",
            [](const Retention& retained, const Tokens& tokens) {
                Longs counts;
                retained.num_seen(tokens, counts);
                return copied(counts);
            },
            nb::arg("tokens"));

    module.def("pull_rows", &pull_rows, nb::arg("address"), nb::arg("num_blocks"), nb::arg("block_bytes"), nb::arg("row_bytes"),
               nb::arg("start"), nb::arg("rows"));

    nb::class_<Sliding, Retention>(module, "Sliding")
        .def(nb::init<std::optional<int64_t>, int64_t, bool, Tokens, int64_t>(), nb::arg("window"), nb::arg("max_kept"),
             nb::arg("slot"), nb::arg("separators") = Tokens(), nb::arg("num_initial") = 0)
        .def_ro("window", &Sliding::window)
        .def_prop_ro("interval", &Sliding::interval);

    nb::class_<Compacting, Retention>(module, "Compacting")
        .def(nb::init<int64_t, std::optional<int64_t>, bool, Tokens, int64_t, int64_t, bool, bool>(), nb::arg("size"),
             nb::arg("local"), nb::arg("slot"), nb::arg("separators") = Tokens(), nb::arg("num_initial") = 0,
             nb::arg("max_separators") = 0, nb::arg("compact_after_attention") = false, nb::arg("per_turn") = false)
        .def_ro("max_separators", &Compacting::max_separators)
        .def_prop_ro("num_anchors", &Compacting::num_anchors);

    nb::class_<Ledger>(module, "Ledger")
        .def(nb::init<std::vector<Ledger::Group>, std::optional<int64_t>>(), nb::arg("groups"), nb::arg("capacity"))
        .def_prop_ro("length", &Ledger::length)
        .def_prop_ro("horizon", &Ledger::horizon)
        .def_prop_ro("kept_last", &Ledger::kept_last)
        .def_prop_ro("kept_sum", &Ledger::kept_sum)
        .def("full_at", [](const Ledger& ledger, const Tokens& tokens) { return ledger.full_at(tokens); }, nb::arg("tokens"))
        .def("begin_turn", &Ledger::begin_turn, nb::arg("num_coming"))
        .def("commit", [](Ledger& ledger, const Tokens& tokens) { ledger.commit(tokens); }, nb::arg("tokens"));
}

inline void bind_history(nb::module_& module) {
    module.attr("MOST_TEXT") = History::MOST_TEXT;
    nb::class_<History>(module, "History")
        .def(nb::init<>())
        .def_prop_ro("length", &History::length)
        .def("begin", &History::begin, nb::arg("output_start"))
        .def("first", &History::first, nb::arg("count"))
        .def("state", [](const History& history) { return copied(history.state()); })
        .def_static("restored", [](const Longs& words) { return History::restored(words); }, nb::arg("state"))
        .def("commit", [](History& history, const Tokens& tokens) { history.commit(tokens); }, nb::arg("tokens"))
        .def(
            "at",
            [](History& history, const Int32s& rows, int row) {
                if (row < 0 || static_cast<size_t>(row) >= rows.shape(0)) throw std::out_of_range("no such row");
                const auto found = history.at(span_of(rows), row);
                return std::pair(copied(found.tokens), copied(found.counts));
            },
            nb::arg("rows"), nb::arg("row"));
}

inline void bind_plan(nb::module_& module) {
    module.def("partition", &partitioned, nb::arg("parents"), nb::arg("num_replicas"));
    module.def("assemble", &assembled, nb::arg("parts"), nb::arg("num_replicas"));
    module.def("commit_lines", &commit_lines, nb::arg("rows"), nb::arg("start"), nb::arg("accepted"), nb::arg("num_replicas"));
    module.def(
        "merge",
        [](const Int32s& rows, const std::vector<Int32s>& results, int width) {
            std::vector<const int32_t*> starts;
            for (const Int32s& result : results) starts.push_back(result.data());
            return made<int32_t>({rows.shape(0), static_cast<size_t>(width)},
                                 [&](int32_t* merged) { merge(span_of(rows), starts, width, merged); });
        },
        nb::arg("rows"), nb::arg("results"), nb::arg("width"));
    module.def(
        "ancestry",
        [](const Int32s& parents) { return flags(ancestry(span_of(parents)), {parents.size(), parents.size()}); },
        nb::arg("parents"));

    nb::class_<Share> share(module, "Share");
    share
        .def(
            "__init__",
            [](Share* self, const Int32s& rows, const Int32s& sequences, int replica, int min_rows) {
                new (self) Share(span_of(rows), span_of(sequences), replica, min_rows);
            },
            nb::arg("rows"), nb::arg("sequences"), nb::arg("replica") = 0, nb::arg("min_rows") = 1)
        .def_prop_ro("num_rows", &Share::num_rows)
        .def_prop_ro("runs",
                               [](const Share& share) {
                                   std::vector<std::tuple<int, int, int>> runs;
                                   for (const auto& [slot, start, stop] : share.runs) runs.emplace_back(slot, start, stop);
                                   return runs;
                               })
        .def_ro("turns", &Share::turns)
        .def(
            "spread",
            [](const Share& share, const Int32s& results) {
                if (results.ndim() != 2 || results.shape(0) != share.wanted.size())
                    throw std::invalid_argument("one result per wanted row");
                const size_t width = results.shape(1);
                std::vector<int> without;
                auto chosen = made<int32_t>({static_cast<size_t>(share.num_rows()), width}, [&](int32_t* to) {
                    without = share.spread(span_of(results), static_cast<int>(width), to);
                });
                return std::pair(std::move(chosen), std::move(without));
            },
            nb::arg("results"))
        .def(
            "commits",
            [](const Share& share, const Int32s& lines) {
                std::vector<std::tuple<int, int, Tokens, Tokens>> found;
                for (auto& commit : share.commits(span_of(lines)))
                    found.emplace_back(commit.slot, commit.source, std::move(commit.staged), std::move(commit.tokens));
                return found;
            },
            nb::arg("lines"));

    bind_view(share, "local", &Share::local);
    bind_view(share, "columns", &Share::columns, 3);
    bind_view(share, "parents", &Share::parents);
    bind_view(share, "wanted", &Share::wanted);
    bind_view(share, "sequence_of", &Share::sequence_of);
    bind_view(share, "sampled", &Share::sampled);

    nb::class_<Keys> keys(module, "Keys");
    keys
        .def(
            "__init__",
            [](Keys* self, const Retention& retained, const Int64s& positions, const Int64s& tokens, const Int32s& parents,
               std::optional<int64_t> window, int64_t block) {
                new (self) Keys(Sight(retained, span_of(positions), span_of(tokens), span_of(parents), window), block);
            },
            nb::arg("retained"), nb::arg("positions"), nb::arg("tokens"), nb::arg("parents"), nb::arg("window").none(),
            nb::arg("block"))
        .def_ro("num_tail", &Keys::num_tail)
        .def_ro("num_shared", &Keys::num_shared)
        .def("addresses",
             [](const Keys& keys) {
                 const auto address = [](const auto& values) {
                     return values.empty() ? uintptr_t{0} : reinterpret_cast<uintptr_t>(values.data());
                 };
                 return std::tuple(address(keys.columns), address(keys.tails), address(keys.visible));
             })
        .def_prop_ro("num_columns", [](const Keys& keys) { return std::ssize(keys.columns); });
    bind_view(keys, "columns", &Keys::columns);
    bind_view(keys, "tails", &Keys::tails);
    bind_view(keys, "visible", &Keys::visible);
}

}  // namespace outrider
