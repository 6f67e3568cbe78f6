// A step's rows through a Llama-family decoder on the CPU. Driven by decoder.py, which mirrors the structs of layout.h.
//
// The promise: a row's result is the same to the last bit whatever other rows are in the step, whether an ancestor
// stands in the cache or among the step's rows, and whether keys that the row does not see are stored in between.
// Three rules keep it:
//   1. A sum runs over its terms in one order: features, or keys by their position in the text. Those that an
//      instruction adds up at once (two words' halves, or 16 words on a matrix unit) are the same ones for every row:
//      keys stand in columns, and a key's column within its block of 32 is its position modulo 32.
//   2. Tiles and threads divide the outputs only, and a row takes the same operations in every tile. Multiplying and
//      adding is fused where the code says fma, and nowhere else (-ffp-contract=off). What does not fill a vector is
//      padded: no remainder loop rounds differently.
//   3. A hidden key, or a column without one, has weight exactly 0, and adding 0 * value changes no sum.
//
// Letters: T rows, D hidden size, H query heads, K KV heads, G = H / K, d head size, E the type of weights and cache.

#include <bit>
#include <tuple>
#include <utility>

#include "attention.h"
#include "drawing.h"

namespace {

// Where the pieces of a step's scratch memory begin, and how large it is
struct Scratch {
    float* qkv;
    float *turned, *anchored;  // queries
    void *x, *inner;
    int64_t size = 0;

    Scratch(const Model& model, int64_t rows, void* memory) {
        const Layer& layer = model.layers[0];
        const int64_t num_queries = model.num_heads * model.head_dim;
        const auto take = [&](int64_t words) {
            char* place = (char*)memory + size;
            size += round_up(rows * words * 4, 64);
            return (float*)place;
        };
        qkv = take(layer.qkv.panels * PANEL);
        turned = take(num_queries);
        anchored = take(num_queries);
        x = take(std::max(row_words(layer.qkv), row_words(layer.output)));
        inner = take(row_words(layer.down));
    }
};

// Half layers 2i are the attention of layer i, 2i + 1 its MLP. Each starts with what the half before left in `partial`.
template <class E>
void run_halves(const Model& model, const Step& step, int64_t first, int64_t stop, Barrier& barrier) {
    const Scratch scratch(model, step.num_rows, step.scratch);
    const Queries<E> queries{(E*)scratch.turned, (E*)scratch.anchored};
    const int64_t T = step.num_rows;
    for (int64_t half = first; half < stop; ++half) {
        const Layer& layer = model.layers[half / 2];
        const Place& place = step.places[half / 2];
        const float* partial = half ? step.partial : nullptr;
        if (half % 2 == 0) {
            norm<E>(model, T, step.residual, partial, layer.attention_norm, layer.qkv, scratch.x);
            barrier.wait();
            linear<E>(layer.qkv, scratch.x, T, scratch.qkv);
            barrier.wait();
            place_heads<E>(model, layer, step, place, scratch.qkv, queries);
            barrier.wait();
            attend<E>(model, layer, step, place, queries, scratch.x);
            barrier.wait();
            linear<E>(layer.output, scratch.x, T, step.partial);
        } else {
            norm<E>(model, T, step.residual, partial, layer.mlp_norm, layer.gate_up, scratch.x);
            barrier.wait();
            gated<E>(layer, scratch.x, T, scratch.inner);
            barrier.wait();
            linear<E>(layer.down, scratch.inner, T, step.partial);
        }
        barrier.wait();
    }
    release_matrix_unit();
}

// Of the panels of logits that one thread computes, those k of each row that have the largest. The others are not stored:
// a step's rows have many megabytes of them.
class Kept {
   public:
    Kept(int64_t rows, int64_t k) : k(k), least(rows, k ? -INFINITE : INFINITE), entries(rows * k), logits(rows * k * PANEL) {}

    // `most`: the largest of them; of equals the first one stays. NaN is not kept.
    void offer(int64_t row, int64_t panel, float most, const float* values) {
        if (!(most > least[row])) return;
        const auto first = entries.begin() + row * k;
        const auto entry = std::min_element(first, first + k);
        *entry = {panel, most};
        std::copy_n(values, PANEL, logits.begin() + (entry - entries.begin()) * PANEL);
        least[row] = std::min_element(first, first + k)->most;
    }

    // Null where it has not been kept
    const float* of(int64_t row, int64_t panel) const {
        for (int64_t i = row * k; i < (row + 1) * k; ++i)
            if (entries[i].panel == panel) return &logits[i * PANEL];
        return nullptr;
    }

   private:
    struct Entry {
        int64_t panel = -1;
        float most = -INFINITE;

        // The one that goes first: of equals the last panel
        bool operator<(const Entry& other) const { return std::pair(most, -panel) < std::pair(other.most, -other.panel); }
    };

    int64_t k;
    std::vector<float> least;  // per row, what a panel must exceed
    std::vector<Entry> entries;
    std::vector<float> logits;
};

// largest [rows, panels, room for a multiple of 16]: of each panel's logits, of which the last panel may have fewer than 32,
// NaN where one of them is; logits [rows, panels * 32], or null where nobody asks for all
template <class E>
void run_head(const Model& model, int64_t rows, float* hidden, void* x, float* logits, float* largest, Kept& kept,
              Barrier& barrier) {
    norm<E>(model, rows, hidden, nullptr, model.norm, model.head, x);
    barrier.wait();
    const int64_t panels = model.head.panels, vocabulary = model.vocabulary;
    product<E>(model.head, x, rows, [&](int64_t row, int64_t panel, const float* sums) {
        alignas(64) float values[PANEL];
        Vec most = splat<Vec>(-INFINITE);
        bool is_number = true;
        for (int64_t i = 0; i < PANEL; i += LANES) {
            const Ints real = LANE < (int32_t)std::clamp<int64_t>(vocabulary - panel * PANEL - i, 0, LANES);
            const Vec some = narrow(select(real, widen(sums + i), splat<Vec>(-INFINITE)), values + i);
            most = larger(some, most);
            is_number &= !has_nan(some);
        }
        if (logits) std::copy_n(values, PANEL, logits + (row * panels + panel) * PANEL);
        const float found = is_number ? maximum(most) : NOT_A_NUMBER;
        kept.offer(row, panel, largest[row * round_up(panels, LANES) + panel] = found, values);
    });
    release_matrix_unit();
}

// Where the largest of some numbers is, a multiple of 16 of them: the first of equals
INLINE int64_t first_largest(const float* values, int64_t count) {
    Vec most = widen(values);
    for (int64_t i = LANES; i < count; i += LANES) most = larger(widen(values + i), most);
    return std::find(values, values + count, maximum(most)) - values;
}

// The k largest logits of a row, largest first, and of equals the first one; NaN where one of the row's is, or all are
// -inf. Returns the log-sum-exp of them and of the largest of each panel that is not one of the k with the largest.
// `largest` [panels, room for a multiple of 16] is written over.
float find_top(const std::vector<Kept>& kept, int64_t row, float* largest, int64_t panels, int64_t k, float* values,
               int64_t* places) {
    static thread_local std::vector<float> found;
    static thread_local std::vector<int64_t> from;
    found.clear(), from.clear();
    const int64_t count = round_up(panels, LANES);
    std::fill(largest + panels, largest + count, -INFINITE);
    bool is_number = true;
    for (int64_t i = 0; i < count; i += LANES) is_number &= !has_nan(widen(largest + i));
    if (!is_number || largest[first_largest(largest, count)] == -INFINITE) {
        std::fill_n(values, k, NOT_A_NUMBER), std::fill_n(places, k, 0);
        return NOT_A_NUMBER;
    }
    for (int64_t i = 0; i < std::min(k, panels); ++i) {
        const int64_t best = first_largest(largest, count);
        if (largest[best] == -INFINITE) break;
        const float* logits = nullptr;
        for (auto thread = kept.begin(); !logits; ++thread) logits = thread->of(row, best);
        from.push_back(best * PANEL);
        found.insert(found.end(), logits, logits + PANEL);
        largest[best] = -INFINITE;
    }
    for (int64_t i = 0; i < k; ++i) {
        const int64_t best = first_largest(found.data(), found.size());
        const bool is_one = found[best] > -INFINITE;
        values[i] = is_one ? std::exchange(found[best], -INFINITE) : -INFINITE;
        places[i] = is_one ? from[best / PANEL] + best % PANEL : 0;
    }
    Vec sum = {};
    for (int64_t i = 0; i < count; i += LANES) sum += weight_of(widen(largest + i) - values[0]);
    float whole = total(sum);
    for (int64_t i = 0; i < k; ++i) whole += std::exp(values[i] - values[0]);
    return values[0] + std::log(whole);
}

}  // namespace

// Of runtime/step.py
constexpr int32_t NO_TOKEN = -2;
constexpr int TOP_BITS = 8;

extern "C" {

// What multiplies here
const char* outrider_units() {
#if defined(__AVX512BF16__)
    return MATRIX_UNIT ? "AMX bfloat16, AVX-512" : "AVX-512 bfloat16";
#elif defined(__AVX512F__)
    return "AVX-512";
#else
    return "plain vectors";
#endif
}

// Bytes of scratch memory for a step of so many rows
int64_t outrider_scratch(const Model* model, int64_t rows) { return Scratch(*model, rows, nullptr).size; }

// Bytes of scratch memory for the logits of so many rows
int64_t outrider_head_scratch(const Model* model, int64_t rows) { return rows * row_words(model->head) * 4; }

void outrider_forward(const Model* model, const Step* step, int64_t first, int64_t stop) {
    Barrier barrier;
#pragma omp parallel num_threads((int)step->num_threads)
    if (model->is_bfloat16)
        run_halves<BF16>(*model, *step, first, stop, barrier);
    else
        run_halves<float>(*model, *step, first, stop, barrier);
}

// hidden [rows, D padded to 32] -> what find_top says of each row: values and places [rows, k], wholes [rows]; and logits
// [rows, panels * 32 of the head], if that is not null. `largest` [rows, panels] is scratch memory, like `scratch`.
void outrider_search(const Model* model, int64_t rows, float* hidden, void* scratch, float* logits, float* largest, int64_t k,
                     float* values, int64_t* places, float* wholes, int64_t threads) {
    Barrier barrier;
    std::vector<Kept> kept(threads, Kept(rows, k));
    const int64_t panels = model->head.panels;
#pragma omp parallel num_threads((int)threads)
    {
        Kept& mine = kept[omp_get_thread_num()];
        if (model->is_bfloat16)
            run_head<BF16>(*model, rows, hidden, scratch, logits, largest, mine, barrier);
        else
            run_head<float>(*model, rows, hidden, scratch, logits, largest, mine, barrier);
        barrier.wait();
        const Range range = share(k ? rows : 0);
        for (int64_t row = range.start; row < range.stop; ++row)
            wholes[row] = find_top(kept, row, largest + row * round_up(panels, LANES), panels, k, values + row * k, places + row * k);
    }
}

// Of `wanted` rows of hidden states, `stride` apart, what runtime.model.sampler says of rows that choose greedily where the
// vocabulary is whole: the token, or NOT_A_NUMBER, and the k likeliest, packed. results [rows, 1 + k]
void outrider_choose(const Model* model, int64_t rows, const float* hidden, int64_t stride, const int64_t* wanted, int64_t k,
                     int32_t* results, int64_t threads) {
    const int64_t width = round_up(model->hidden, PANEL), found = std::max<int64_t>(k, 1);
    std::vector<float> states(rows * width), largest(rows * round_up(model->head.panels, LANES)), values(rows * found), wholes(rows);
    std::vector<int64_t> places(rows * found);
    std::vector<char> scratch(outrider_head_scratch(model, rows) + 64);
    for (int64_t row = 0; row < rows; ++row) std::copy_n(hidden + wanted[row] * stride, model->hidden, &states[row * width]);
    void* aligned = (void*)round_up((int64_t)scratch.data(), 64);
    outrider_search(model, rows, states.data(), aligned, nullptr, largest.data(), found, values.data(), places.data(),
                    wholes.data(), threads);
    for (int64_t row = 0; row < rows; ++row) {
        const float* value = &values[row * found];
        int32_t* result = results + row * (1 + k);
        result[0] = std::isfinite(*value) ? (int32_t)places[row * found] : NO_TOKEN;
        for (int64_t i = 0; i < k && result[0] >= 0; ++i) {
            const float sixteenths = std::nearbyint((wholes[row] - value[i]) * 16);
            result[1 + i] = (int32_t)places[row * found + i] << TOP_BITS | (int32_t)std::clamp(sixteenths, 0.f, 255.f);
        }
    }
}

// The best scores of rows over `count` tokens from id `first` on, and where they are: values and places [rows]
void outrider_draw(const Draw* draws, int64_t rows, int64_t first, int64_t count, double* values, int64_t* places,
                   int64_t threads) {
#pragma omp parallel for num_threads((int)threads) schedule(dynamic)
    for (int64_t row = 0; row < rows; ++row) {
        static thread_local Row scratch;
        std::tie(values[row], places[row]) = draw_one(scratch, draws[row], first, count);
    }
}

// Rows' logits behind mask, biases and penalties [rows, count], where the filters want the whole vocabulary's
void outrider_adjust(const Draw* draws, int64_t rows, int64_t first, int64_t count, float* adjusted) {
    Row scratch;
    for (int64_t row = 0; row < rows; ++row) {
        scratch.load(draws[row], first, count);
        std::copy_n(scratch.logits(), count, adjusted + row * count);
    }
}

// The smallest logits [rows] that stay under the filters, of adjusted ones [rows, count] over the whole vocabulary, in any
// order
void outrider_least(const Draw* draws, int64_t rows, const float* adjusted, int64_t count, double* least) {
    Row scratch;
    for (int64_t row = 0; row < rows; ++row) {
        scratch.load(adjusted + row * count, count);
        const float most = scratch.largest().first;
        scratch.weigh(most, draws[row].temperature);
        least[row] = scratch.least_kept(most, draws[row]);
    }
}

// What rows at these positions are rotated by, as Rotary.turns says: factors [2, rows, 2 * half], for queries times `scale`
// and for keys. One at a time, so that a row's do not depend on which others there are.
void outrider_turns(const double* frequencies, int64_t half, double scaling, double scale, const int64_t* positions,
                    int64_t rows, float* factors) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < half; ++i) {
            const double angle = (double)positions[row] * frequencies[i];
            const double turn[2] = {scaling * std::cos(angle), scaling * std::sin(angle)};
            for (int64_t part = 0; part < 2; ++part) {
                float* to = factors + (row * half + i) * 2 + part;
                to[0] = (float)(turn[part] * scale);
                to[rows * half * 2] = (float)turn[part];
            }
        }
}

// Token vectors of this shard's part of the vocabulary, `count` from id `first` on, to residual [rows, D padded to 32]
void outrider_embed(const Model* model, const void* table, int64_t first, int64_t count, const int64_t* tokens, int64_t rows,
                    float* residual) {
    const int64_t width = round_up(model->hidden, PANEL);
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t token = tokens[row] - first;
        float* to = residual + row * width;
        std::fill_n(to, width, 0.f);
        if (token < 0 || token >= count) continue;
        if (!model->is_bfloat16) {
            std::copy_n((const float*)table + token * model->hidden, model->hidden, to);
            continue;
        }
        const BF16* from = (const BF16*)table + token * model->hidden;
        for (int64_t i = 0; i < model->hidden; ++i) to[i] = std::bit_cast<float>((uint32_t)from[i] << 16);
    }
}

}
