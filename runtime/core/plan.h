// A step's rows: put together from those of its sequences, and taken apart into those that one replica runs.
// The columns are those of runtime/step.py.

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "partition.h"
#include "rows.h"

namespace outrider {

enum RowColumn { TOKEN, POSITION, PARENT, CHOOSE, SLOT, OWNER, REPLICAS, ROW_COLUMNS };
enum SequenceColumn { SEQUENCE_SLOT, ROPE_LENGTH, TEMPERATURE, NUM_COMING = 7, IS_CONTROLLED = 13, SEQUENCE_COLUMNS = 15 };

// Temperatures below are 0 (runtime/model/sampler.py).
constexpr float GREEDY_BELOW = 1e-5f;

// The rows of one sequence, and its cache slot
using Part = std::pair<std::shared_ptr<Rows>, int>;

// Rows of all parts, one behind the other, divided among so many replicas. [T, ROW_COLUMNS]
inline void assemble(const std::vector<Part>& parts, int num_replicas, int32_t* table) {
    std::vector<int> parents;
    int32_t* line = table;
    for (const auto& [rows, slot] : parts) {
        const int start = static_cast<int>(parents.size());
        for (int row = 0; row < rows->size(); ++row, line += ROW_COLUMNS) {
            parents.push_back(rows->parents[row] < 0 ? -1 : start + rows->parents[row]);
            line[TOKEN] = rows->tokens[row];
            line[POSITION] = rows->positions[row];
            line[PARENT] = parents.back();
            line[CHOOSE] = rows->choose[row];
            line[SLOT] = slot;
        }
    }
    const Partition divided(parents, num_replicas);
    const std::vector<int> owners = divided.owners();
    line = table;
    for (size_t row = 0; row < parents.size(); ++row, line += ROW_COLUMNS) {
        line[OWNER] = owners[row];
        line[REPLICAS] = divided.replicas[row];
    }
}

// What the owner of each row found for it, of every replica's results [its rows, width]. [T, width]
inline void merge(std::span<const int32_t> rows, const std::vector<const int32_t*>& results, int width, int32_t* merged) {
    std::vector<int> done(results.size());
    for (size_t start = 0; start < rows.size(); start += ROW_COLUMNS, merged += width) {
        const int32_t* line = &rows[start];
        for (size_t replica = 0; replica < results.size(); ++replica) {
            if (!(line[REPLICAS] >> replica & 1)) continue;
            const int32_t* from = results[replica] + done[replica]++ * width;
            if (line[OWNER] == static_cast<int>(replica)) std::copy_n(from, width, merged);
        }
    }
}

// The rows of a step that one replica runs, as its decoder wants them. Indices count the replica's own rows.
class Share {
   public:
    // Rows of one slot, which stand together: first .. stop - 1
    struct Run {
        int slot, start, stop;
    };

    // What a slot commits of the last step: rows that it staged, and their tokens; from which replica, -1: from this one
    struct Commit {
        int slot, source;
        std::vector<int> staged, tokens;
    };

    // `rows` [T, ROW_COLUMNS] and `sequences` [S, SEQUENCE_COLUMNS] of the plan; the rows are repeated where they are
    // fewer than `min_rows`.
    Share(std::span<const int32_t> rows, std::span<const int32_t> sequences, int replica, int min_rows) : replica_(replica) {
        const int total = static_cast<int>(rows.size() / ROW_COLUMNS);
        index_.resize(total);
        slots_.resize(total);
        tokens_.resize(total);
        for (int row = 0; row < total; ++row) {
            const int32_t* line = &rows[row * ROW_COLUMNS];
            slots_[row] = line[SLOT];
            tokens_[row] = line[TOKEN];
            index_[row] = static_cast<int>(local.size());  // of the first local row from this one on
            if (line[REPLICAS] >> replica & 1) local.push_back(row);
        }
        const int count = num_rows();
        num_padded = count ? std::max(count, min_rows) : 0;
        columns.resize(3 * num_padded);
        parents.resize(num_padded);
        int sequence = -1;
        for (int place = 0; place < num_padded; ++place) {
            const int32_t* line = &rows[local[place % count] * ROW_COLUMNS];
            if (runs.empty() || runs.back().slot != line[SLOT]) {
                if (std::ranges::any_of(runs, [&](const Run& run) { return run.slot == line[SLOT]; }))
                    throw std::invalid_argument("rows of one slot must stand together");
                sequence = find(sequences, line[SLOT]);
                runs.push_back({line[SLOT], place, place});
            }
            runs.back().stop = place + 1;
            columns[place] = line[TOKEN];
            columns[num_padded + place] = line[POSITION];
            columns[2 * num_padded + place] = sequences[sequence * SEQUENCE_COLUMNS + ROPE_LENGTH];
            parents[place] = line[PARENT] < 0 ? -1 : index_[line[PARENT]] - runs.back().start;
            if (place >= count || line[CHOOSE] == NOTHING || line[OWNER] != replica) continue;
            const float temperature = std::bit_cast<float>(sequences[sequence * SEQUENCE_COLUMNS + TEMPERATURE]);
            const bool is_controlled = sequences[sequence * SEQUENCE_COLUMNS + IS_CONTROLLED];
            if (line[CHOOSE] == SAMPLE && (temperature >= GREEDY_BELOW || is_controlled)) sampled.push_back(std::ssize(wanted));
            wanted.push_back(place);
            sequence_of.push_back(sequence);
        }
        for (size_t line = 0; line < sequences.size(); line += SEQUENCE_COLUMNS)
            if (const int coming = sequences[line + NUM_COMING]) turns.emplace_back(sequences[line + SEQUENCE_SLOT], coming);
    }

    std::vector<int64_t> local;        // [L] indices of the plan's rows
    int num_padded = 0;                // P: L, or more where rows are repeated
    std::vector<int64_t> columns;      // [3, P] token, position, and the length that dynamic RoPE scales by
    std::vector<int32_t> parents;      // [P] counted from their run's first row
    std::vector<Run> runs;
    std::vector<int64_t> wanted;       // [R] rows whose logits this replica finds
    std::vector<int64_t> sequence_of;  // [R] lines of `sequences`
    std::vector<int64_t> sampled;      // those of the R that choose by more than the largest logit

    std::vector<std::pair<int, int>> turns;  // slots in which a turn begins, and how many tokens it may bring

    // What each row gave, -1 where it chose no token, from what the wanted ones found: `results` [R, width], of which the
    // first is the token. A row without one (NOT_A_NUMBER) gives nothing else; its slot is told. [L, width]
    std::vector<int> spread(std::span<const int32_t> results, int width, int32_t* chosen) const {
        for (int row = 0; row < num_rows(); ++row) {
            std::fill_n(chosen + row * width, width, 0);
            chosen[row * width] = -1;
        }
        std::vector<int> without;
        for (size_t found = 0; found < wanted.size(); ++found) {
            const int32_t* from = &results[found * width];
            int32_t* to = chosen + wanted[found] * width;
            std::copy_n(from, from[0] < 0 ? 1 : width, to);
            if (from[0] < 0) without.push_back(slots_[local[wanted[found]]]);
        }
        return without;
    }

    int num_rows() const { return static_cast<int>(local.size()); }

    // What the lines `commits` [C, 2] (row of the plan, source) say of this replica's rows, by slot
    std::vector<Commit> commits(std::span<const int32_t> lines) const {
        std::vector<Commit> found;
        for (size_t i = 0; i + 1 < lines.size(); i += 2) {
            const int row = lines[i], slot = slots_[row];
            if (found.empty() || found.back().slot != slot) found.push_back({slot, lines[i + 1], {}, {}});
            int first = row;  // of the slot
            while (first > 0 && slots_[first - 1] == slot) --first;
            found.back().staged.push_back(index_[row] - index_[first]);
            found.back().tokens.push_back(tokens_[row]);
        }
        return found;
    }

   private:
    static int find(std::span<const int32_t> sequences, int slot) {
        for (size_t line = 0; line < sequences.size() / SEQUENCE_COLUMNS; ++line)
            if (sequences[line * SEQUENCE_COLUMNS + SEQUENCE_SLOT] == slot) return static_cast<int>(line);
        throw std::invalid_argument("a row's slot has no sequence");
    }

    int replica_;
    std::vector<int> index_, slots_, tokens_;  // of all rows of the plan
};

}  // namespace outrider
