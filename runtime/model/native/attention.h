// A step's attention: rotation, scores, weights, sums.

#pragma once

#include <vector>

#include "products.h"

namespace {

// Queries [K, T, G, d], so that those of a KV head stand together
template <class E>
struct Queries {
    E *turned, *anchored;  // at the row's position; at its slot
};

#define ALL(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#if defined(__clang__)
#define EVERY(v, f) __builtin_shufflevector(v, v, ALL(f))
#else
#define EVERY(v, f) __builtin_shuffle(v, Ints{ALL(f)})
#endif
#define EVEN(lane) ((lane) & ~1)
#define ODD(lane) ((lane) | 1)
#define OTHER(lane) ((lane) ^ 1)

// Pairs (re, im) times pairs (cosine, sine), or unchanged where those are null, to where they are kept
template <class E>
INLINE void put_head(const float* from, const float* turns, int64_t head_dim, E* to) {
    for (int64_t i = 0; i < head_dim; i += LANES) {
        Vec value = widen(from + i, head_dim - i);
        if (turns) {
            const Vec turn = widen(turns + i, head_dim - i), sine = EVERY(turn, ODD);
            value = fma(EVERY(value, OTHER), select((LANE & 1) == 0, -sine, sine), value * EVERY(turn, EVEN));
        }
        narrow(value, to + i, head_dim - i);
    }
}

INLINE void normalize_head(float* head, const float* weight, int64_t head_dim, float eps) {
    Vec squares = {};
    for (int64_t i = 0; i < head_dim; i += LANES) {
        const Vec value = widen(head + i, head_dim - i);
        squares = fma(value, value, squares);
    }
    const float scale = 1 / std::sqrt(total(squares) / head_dim + eps);
    for (int64_t i = 0; i < head_dim; ++i) head[i] = head[i] * scale * weight[i];
}

// Norm and rotation of one head's row: queries go to `queries`, keys and values behind the stored ones in the cache.
template <class E>
void place_head(const Model& model, const Layer& layer, const Step& step, const Segment& segment, int64_t index,
                int64_t row, int64_t head, float* values, const Queries<E>& queries) {
    const int64_t H = model.num_heads, K = model.num_kv_heads, G = H / K, d = model.head_dim, T = step.num_rows;
    const int64_t at = segment.start + row;
    if (layer.head_norm && head < H + K) normalize_head(values, layer.head_norm + head * d, d, (float)model.eps);
    if (head < H) {
        const int64_t to = ((head / G * T + at) * G + head % G) * d;
        put_head(values, step.query_turns + at * d, d, queries.turned + to);
        if (segment.num_anchors) put_head(values, segment.anchor_turns + row * d, d, queries.anchored + to);
        return;
    }
    const bool is_value = head >= H + K;
    E* to = (E*)segment.slot + index * segment.layer_stride + is_value * segment.side_stride +
            (head - H - is_value * K) * segment.head_stride + (segment.num_stored + row) * d;
    put_head(values, is_value ? nullptr : step.key_turns + at * d, d, to);
}

template <class E>
void place_heads(const Model& model, const Layer& layer, const Step& step, const Place& place, float* qkv,
                 const Queries<E>& queries) {
    const int64_t heads = model.num_heads + 2 * model.num_kv_heads, d = model.head_dim;
    for (int64_t s = 0; s < step.num_segments; ++s) {
        const Segment& segment = place.segments[s];
        const Range mine = share(segment.count * heads);
        for (int64_t unit = mine.start; unit < mine.stop; ++unit) {
            const int64_t row = unit % segment.count, head = unit / segment.count;  // those whose outputs it has computed
            float* values = qkv + (segment.start + row) * layer.qkv.panels * PANEL + head * d;
            place_head<E>(model, layer, step, segment, place.index, row, head, values, queries);
        }
    }
}

// Exchange lanes with bit S and vectors with bit S: the four of them transpose 16 vectors.
template <int S>
INLINE void exchange(Vec* v) {
#if defined(__clang__)
#define PICK(a, b, f) __builtin_shufflevector(a, b, ALL(f))
#else
#define PICK(a, b, f) __builtin_shuffle(a, b, Ints{ALL(f)})
#endif
#define LOWER(lane) ((lane) & S ? 16 + (lane) - S : (lane))
#define UPPER(lane) ((lane) & S ? 16 + (lane) : (lane) + S)
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
        if (i & S) continue;
        const Vec a = v[i], b = v[i + S];
        v[i] = PICK(a, b, LOWER);
        v[i + S] = PICK(a, b, UPPER);
    }
}

constexpr int64_t BLOCK = PANEL;  // columns

// The panel [words][32 columns] of a block's keys [d]; column_at(i) is a row of the slot, or -1: 0
template <class E, class Columns>
INLINE void make_key_panel(const E* keys, Columns column_at, int64_t d, uint32_t* panel) {
    const int64_t words = d * sizeof(E) / 4;
    for (int64_t half = 0; half < BLOCK; half += LANES)
        for (int64_t i = 0; i < words; i += LANES) {
            Vec v[LANES];
            for (int64_t c = 0; c < LANES; ++c) {
                const int64_t row = column_at(half + c);
                v[c] = row < 0 ? Vec{} : widen((const float*)(keys + row * d) + i, words - i);
            }
            exchange<8>(v), exchange<4>(v), exchange<2>(v), exchange<1>(v);
            for (int64_t k = 0; k < std::min<int64_t>(LANES, words - i); ++k)
                narrow(v[k], (float*)panel + (i + k) * BLOCK + half);
        }
}

// Panels [words of columns][32 features] of values [d], `stride` words from one panel to the next
template <class E>
void make_value_panels(const E* values, const int64_t* columns, int64_t num_columns, int64_t d, int64_t stride,
                       uint32_t* panels) {
    constexpr int64_t PER_WORD = 4 / sizeof(E);
    const auto value = [&](int64_t column, int64_t f) {
        const int64_t row = columns[column];
        return row < 0 || f >= d ? Words{} : (Words)widen(values + row * d + f, d - f);
    };
    for (int64_t column = 0; column < num_columns; column += PER_WORD, panels += PANEL)
        for (int64_t f = 0; f < round_up(d, PANEL); f += LANES) {
            Words word = value(column, f);
            if constexpr (PER_WORD == 2) word = word >> 16 | value(column + 1, f);
            narrow((Vec)word, (float*)panels + f / PANEL * stride + f % PANEL);
        }
}

// Put one column's value into its place there
template <class E>
void put_value(const E* value, int64_t column, int64_t d, int64_t stride, uint32_t* panels) {
    constexpr int64_t PER_WORD = 4 / sizeof(E);
    const uint32_t keep = PER_WORD == 1 ? 0 : column % 2 ? 0x0000ffffu : 0xffff0000u;
    for (int64_t f = 0; f < d; f += LANES) {
        float* to = (float*)panels + column / PER_WORD * PANEL + f / PANEL * stride + f % PANEL;
        Words word = (Words)widen(value + f, d - f);
        if (PER_WORD == 2 && column % 2 == 0) word >>= 16;
        narrow((Vec)(word | ((Words)widen(to) & keep)), to);
    }
}

// Some queries of a segment over one KV head: first to stop - 1 of the [count * G] that it has.
template <class E>
struct HeadAttention {
    const Model& model;
    const Segment& segment;
    const int64_t first, stop;
    const E *keys, *values;      // of the slot
    const E *turned, *anchored;  // [queries, d]
    const int64_t d = model.head_dim, G = model.num_heads / model.num_kv_heads, num_queries = stop - first;
    const int64_t words = d * sizeof(E) / 4, features = round_up(d, PANEL);
    const int64_t last = segment.num_stored + (stop - 1) / G;  // of the slot's rows that any of the queries sees
    const int64_t C = segment.num_columns, tail = segment.num_tail, width = C + tail;  // of a query's scores
    const int64_t shared = seen_columns();
    // In a tree the rows' own columns hold these rows of the slot. Their keys are multiplied once for all queries.
    const int64_t in_tails = tail ? std::max<int64_t>(last + 1 - segment.first_in_tails, 0) : 0;
    const int64_t tail_width = round_up(in_tails, BLOCK);
    const int64_t panel_words = std::max(C, tail) * sizeof(E) / 4 * PANEL;  // of values
    uint32_t *key_panel = nullptr, *value_panels = nullptr;
    float *scores = nullptr, *tail_scores = nullptr;  // [queries, width], [queries, tail_width]
    float* sums = nullptr;                            // [queries, features]
    Vec* wholes = nullptr;                            // [queries]

    void run(E* out, int64_t out_stride) {
        take_memory();
        for (int64_t at = 0; at < shared; at += BLOCK) score(at);
        for (int64_t at = 0; at < in_tails; at += BLOCK) score_tails(at);
        for (int64_t query = 0; query < num_queries; ++query) {
            const int64_t own = tail ? collect_tail(query) : 0;
            wholes[query] = soften(scores + query * width, shared + own);
        }
        make_value_panels(values, segment.columns, shared, d, panel_words, value_panels);
        for (int64_t f = 0; f < features; f += PANEL)
            all_tiles<E>(num_queries, value_panels + f / PANEL * panel_words, scores, width, shared * sizeof(E) / 4,
                         sums + f, features);
        if (tail) weigh_tails();
        for (int64_t query = 0; query < num_queries; ++query) {
            const float whole = total(wholes[query]);
            E* to = out + (first + query) / G * out_stride + (first + query) % G * d;
            for (int64_t f = 0; f < d; f += LANES) narrow(widen(sums + query * features + f) / whole, to + f, d - f);
        }
    }

   private:
    // The columns up to the last one that any of the queries sees
    int64_t seen_columns() const {
        const auto sees = [&](int64_t row) { return row >= 0 && row <= last; };
        int64_t count = C;
        while (count > BLOCK && std::none_of(segment.columns + count - BLOCK, segment.columns + count, sees)) count -= BLOCK;
        return count;
    }

    void take_memory() {
        static thread_local std::vector<Vec> memory;
        int64_t needed = 0;
        for (int pass = 0; pass < 2; ++pass) {
            Vec* free = memory.data();
            const auto take = [&](auto*& place, int64_t count) {
                place = (std::remove_reference_t<decltype(place)>)free;
                free += round_up(count, LANES) / LANES;
            };
            take(key_panel, words * BLOCK);
            take(value_panels, panel_words * features / PANEL);
            take(scores, num_queries * width);
            take(tail_scores, num_queries * tail_width);
            take(sums, num_queries * features);
            take(wholes, num_queries * LANES);
            needed = free - memory.data();
            if ((int64_t)memory.size() >= needed) break;
            memory.resize(needed);
        }
    }

    // Scores over a block of shared columns
    void score(int64_t at) const {
        const int64_t* columns = segment.columns + at;
        make_key_panel(keys, [&](int64_t c) { return columns[c]; }, d, key_panel);
        all_tiles<E>(num_queries, key_panel, turned, words, words, scores + at, width);
        const int64_t common = segment.num_stored + first / G;  // what all queries see
        const bool is_whole = std::all_of(columns, columns + BLOCK, [&](int64_t row) { return row >= 0 && row <= common; });
        const bool has_anchors =
            std::any_of(columns, columns + BLOCK, [&](int64_t row) { return row >= 0 && row < segment.num_anchors; });
        if (is_whole && !has_anchors && !segment.sees) return;

        Ints rows[2];
        for (int64_t c = 0; c < BLOCK; ++c) rows[c / LANES][c % LANES] = (int32_t)columns[c];
        alignas(64) float by_slot[PANEL] = {};
        for (int64_t query = 0; query < num_queries; ++query) {
            const int64_t row = (first + query) / G;
            if (has_anchors) all_tiles<E>(1, key_panel, anchored + query * d, words, words, by_slot, PANEL);
            for (int v = 0; v < 2; ++v) {
                float* to = scores + query * width + at + v * LANES;
                const Ints is_anchor = rows[v] < (int32_t)segment.num_anchors;
                const Vec score = has_anchors ? select(is_anchor, widen(by_slot + v * LANES), widen(to)) : widen(to);
                Ints visible = (rows[v] >= 0) & (rows[v] <= (int32_t)(segment.num_stored + row));
                if (segment.sees) visible &= flags(segment.sees + row * C + at + v * LANES);
                narrow(select(visible, score, splat<Vec>(-INFINITE)), to);
            }
        }
    }

    // Scores over 32 of the slot's rows that are in tails
    void score_tails(int64_t at) const {
        const auto column_at = [&](int64_t c) { return at + c < in_tails ? segment.first_in_tails + at + c : -1; };
        make_key_panel(keys, column_at, d, key_panel);
        all_tiles<E>(num_queries, key_panel, turned, words, words, tail_scores + at, tail_width);
        const int64_t anchors = segment.num_anchors - segment.first_in_tails - at;
        alignas(64) float by_slot[PANEL];
        for (int64_t query = 0; anchors > 0 && query < num_queries; ++query) {
            all_tiles<E>(1, key_panel, anchored + query * d, words, words, by_slot, PANEL);
            std::copy_n(by_slot, std::min(anchors, BLOCK), tail_scores + query * tail_width + at);
        }
    }

    const int64_t* tail_columns(int64_t query) const { return segment.tails + (first + query) / G * tail; }

    // How many of its columns a query's row needs, in whole blocks
    int64_t tail_of(int64_t query) const {
        const int64_t* columns = tail_columns(query);
        int64_t count = tail;
        while (count > 0 && columns[count - 1] < 0) --count;
        return round_up(count, BLOCK);
    }

    // Scores of a query's own columns go behind those of the shared ones; returns how many they are
    int64_t collect_tail(int64_t query) const {
        const int64_t *columns = tail_columns(query), count = tail_of(query);
        const float* from = tail_scores + query * tail_width - segment.first_in_tails;
        float* to = scores + query * width + C;
        for (int64_t c = 0; c < count; ++c) to[c] = columns[c] < 0 ? -INFINITE : from[columns[c]];
        return count;
    }

    // What the rows' own columns add to the sums. From row to row only the values in columns that differ are put in
    // place; what stays in a column that a row does not use has weight 0.
    void weigh_tails() const {
        static thread_local std::vector<int64_t> holds;
        holds.assign(tail, -1);
        for (int64_t f = 0; f < features; f += PANEL)
            std::fill_n(value_panels + f / PANEL * panel_words, tail * sizeof(E) / 4 * PANEL, 0);
        for (int64_t query = 0; query < num_queries;) {
            const int64_t *columns = tail_columns(query), count = tail_of(query);
            const int64_t next = std::min(((first + query) / G + 1) * G - first, num_queries);
            for (int64_t c = 0; c < count; ++c)
                if (columns[c] >= 0 && columns[c] != holds[c])
                    put_value(values + (holds[c] = columns[c]) * d, c, d, panel_words, value_panels);
            for (int64_t f = 0; count && f < features; f += PANEL)
                all_tiles<E>(next - query, value_panels + f / PANEL * panel_words, (E*)(scores + query * width) + C, width,
                             count * sizeof(E) / 4, sums + query * features + f, features, true);
            query = next;
        }
    }

    // `count` scores become weights in their place, one behind the other; returns the sums of those in each lane
    Vec soften(float* scores, int64_t count) const {
        Vec most = widen(scores);
        for (int64_t i = LANES; i < count; i += LANES) most = larger(widen(scores + i), most);
        const float top = maximum(most);
        Vec whole = {};
        for (int64_t i = 0; i < count; i += LANES)
            whole += narrow(weight_of(widen(scores + i) - top), (E*)scores + i);
        return whole;
    }
};

// attended [T, row_words(output)]
template <class E>
void attend(const Model& model, const Layer& layer, const Step& step, const Place& place, const Queries<E>& queries,
            void* attended) {
    constexpr int64_t FEW = 8, MOST_QUERIES = 64, MOST_SCORES = 1 << 17;  // which stay in the second cache
    const int64_t K = model.num_kv_heads, G = model.num_heads / K, d = model.head_dim, T = step.num_rows;
    const int64_t stride = row_words(layer.output) * 4 / sizeof(E);
    for (int64_t s = 0; s < step.num_segments; ++s) {
        const Segment& segment = place.segments[s];
        const int64_t num_queries = segment.count * G, fitting = MOST_SCORES / (segment.num_columns + segment.num_tail);
        const int64_t most = std::clamp<int64_t>(fitting, TILE, MOST_QUERIES), pieces = (num_queries + most - 1) / most;
        const auto run = [&](int64_t kv, int64_t first, int64_t stop) {
            const int64_t query = (kv * T + segment.start) * G + first;
            const E* keys = (const E*)segment.slot + place.index * segment.layer_stride + kv * segment.head_stride;
            HeadAttention<E> head{model, segment, first, stop, keys, keys + segment.side_stride,
                                  queries.turned + query * d, queries.anchored + query * d};
            head.run((E*)attended + segment.start * stride + kv * G * d, stride);
        };
        // What a head's queries have in common costs as much as some of them. So a thread has all of its queries one
        // behind the other where the heads' number lets threads have equal shares only if they divide a head; otherwise
        // pieces go to whichever thread is free. Who does one changes no bit.
        if (pieces == 1 && K % step.num_threads && num_queries >= FEW * step.num_threads) {
            const Range mine = share(K * num_queries);
            for (int64_t kv = mine.start / num_queries; kv * num_queries < mine.stop; ++kv)
                run(kv, std::max(mine.start - kv * num_queries, int64_t{0}), std::min(mine.stop - kv * num_queries, num_queries));
            continue;
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t unit = 0; unit < pieces * K; ++unit) {
            const int64_t piece = unit / K;
            run(unit % K, num_queries * piece / pieces, num_queries * (piece + 1) / pieces);
        }
    }
}

}  // namespace
