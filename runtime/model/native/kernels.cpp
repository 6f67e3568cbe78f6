// A step's rows through a Llama-family decoder on the CPU. Driven by decoder.py, which mirrors the structs below.
//
// The promise: a row's result is the same to the last bit whatever other rows are in the step, whether an ancestor
// stands in the cache or among the step's rows, and whether keys that the row does not see are stored in between.
// Three rules keep it:
//   1. A sum runs over its terms one by one, in the order of features or of positions, never split over tiles or
//      threads. Tiles and threads divide the outputs only. Lanes of a vector are different outputs, too.
//   2. Multiplying and adding is fused where the code says fma, and nowhere else (-ffp-contract=off), and a row takes
//      the same operations in every tile. No remainder loop rounds differently: what does not fill a vector is padded.
//   3. A hidden key has weight exactly 0, and adding 0 * value changes no sum.
//
// Letters: T rows, D hidden size, H query heads, K KV heads, G = H / K, d head size, E the type of weights and cache.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include <omp.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

// ---- What Python hands over ------------------------------------------------------------------------------------

// A weight [out, in] in panels of 32 outputs: for each word of the inputs, the word of each output side by side. A
// word is 32 bits: one float, or two neighbouring bfloat16. Outputs are padded with zeros to a whole panel.
struct Matrix {
    const uint32_t* words;  // [panels, depth, 32]
    const float* bias;      // [panels * 32], or null
    int64_t panels, depth;
};

struct Layer {
    Matrix qkv, output;
    Matrix gate_up;  // a panel has 16 outputs of gate, and the same ones of up
    Matrix down;
    const float *attention_norm, *mlp_norm;  // [D padded to 32 with zeros]
    const float* head_norm;                  // [H + K, d], or null
};

struct Model {
    int64_t is_bfloat16, hidden, num_heads, num_kv_heads, head_dim;
    double eps;
    const Layer* layers;
    const float* norm;
    Matrix head;
};

// The rows of one sequence, and its slot in the cache of one group of layers.
struct Segment {
    int64_t start, count;  // rows start .. start + count - 1 of the step
    void* slot;            // keys and values of the group's first layer
    int64_t layer_stride, side_stride, head_stride;  // elements; from keys to values it is side_stride
    int64_t num_stored;
    int64_t num_anchors;        // stored tokens, the first ones, for which queries are turned by anchor_turns
    const float* anchor_turns;  // [count, d]
    const uint8_t* sees;        // [count, num_stored + count], or null: every stored token is seen
    // Which of the segment's rows each row sees, itself included: members[offsets[row]] to members[offsets[row + 1] - 1],
    // ascending. Null in a chain, where staged rows are columns like the stored ones, and a row sees those up to itself.
    const int64_t *offsets, *members;
};

struct Place {  // of a layer
    const Segment* segments;
    int64_t index;  // among the layers of its group
};

struct Step {
    int64_t num_rows, num_segments, num_threads;
    const Place* places;                    // one per layer
    const float *query_turns, *key_turns;   // [T, d], pairs of cosine and sine; scale included for queries
    float* residual;                        // [T, D padded to 32]: the hidden states
    float* partial;                         // the same shape: what the last half layer is yet to add to them
    void* scratch;                          // outrider_scratch bytes
};

// ---- Vectors ---------------------------------------------------------------------------------------------------

constexpr int LANES = 16, PANEL = 2 * LANES;
#if defined(__AVX512F__)
constexpr int TILE = 12;  // rows of a tile: with two vectors of sums each they fill most of the 32 registers
#else
constexpr int TILE = 3;
#endif

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint16_t BF16;

#define INLINE static inline __attribute__((always_inline))

constexpr float INFINITE = std::numeric_limits<float>::infinity();
const Ints LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <class V, class X>
INLINE V splat(X x) {
    return V{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

INLINE int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) || defined(__aarch64__)
    for (int lane = 0; lane < LANES; ++lane) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return c;
#else
    return a * b + c;
#endif
}

// sum += weight * x over the one or two features of a word
template <class E>
INLINE Vec multiply_add(Vec sum, Words weights, uint32_t x) {
    if constexpr (std::is_same_v<E, float>) return fma((Vec)weights, (Vec)splat<Words>(x), sum);
#if defined(__AVX512BF16__)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)splat<Words>(x));
#else
    sum = fma((Vec)(weights << 16), (Vec)splat<Words>(x << 16), sum);
    return fma((Vec)(weights & 0xffff0000u), (Vec)splat<Words>(x & 0xffff0000u), sum);
#endif
}

template <class V>
INLINE V load(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// 16 numbers as float, and back, rounded to nearest even
INLINE Vec widen(const float* from) { return load<Vec>(from); }
INLINE Vec widen(const BF16* from) { return (Vec)(__builtin_convertvector(load<Halves>(from), Words) << 16); }
INLINE void narrow(Vec value, float* to) { std::memcpy(to, &value, sizeof value); }
INLINE void narrow(Vec value, BF16* to) {
    Words bits = (Words)value;
    bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Halves halves = __builtin_convertvector(bits, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

// The same for the first `count` of them; the others read as 0 and are not written
template <class E>
INLINE Vec widen(const E* from, int64_t count) {
    if (count >= LANES) return widen(from);
    E padded[LANES] = {};
    std::memcpy(padded, from, count * sizeof(E));
    return widen(padded);
}
template <class E>
INLINE void narrow(Vec value, E* to, int64_t count) {
    if (count >= LANES) return narrow(value, to);
    E all[LANES];
    narrow(value, all);
    std::memcpy(to, all, count * sizeof(E));
}

INLINE Vec select(Ints condition, Vec yes, Vec no) { return (Vec)(((Ints)yes & condition) | ((Ints)no & ~condition)); }

INLINE float total(Vec values) {
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += values[lane];
    return sum;
}

// e^x within 2 units in the last place; x is clamped to where the result is a normal number
INLINE Vec exponential(Vec x) {
    x = select(x < -87.0f, splat<Vec>(-87.0f), select(x > 88.0f, splat<Vec>(88.0f), x));
    const Vec shifted = fma(x, splat<Vec>(1.44269504f), splat<Vec>(12582912.0f));  // its low bits are the exponent
    const Vec whole = shifted - 12582912.0f;
    Vec rest = fma(whole, splat<Vec>(-0.693359375f), x);
    rest = fma(whole, splat<Vec>(2.12194440e-4f), rest);
    Vec result = splat<Vec>(1.9875691500e-4f);
    for (float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        result = fma(result, rest, splat<Vec>(factor));
    result = fma(result, rest * rest, rest + 1.0f);
    return (Vec)((Ints)result + ((Ints)shifted << 23));
}

// ---- Threads ---------------------------------------------------------------------------------------------------

struct Range {
    int64_t start, stop;
};

// This thread's share of `count` pieces of work
INLINE Range share(int64_t count) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return {count * thread / threads, count * (thread + 1) / threads};
}

// Where threads wait for each other. Who waits long sleeps, so that on a machine with other work the thread that is
// waited for may have its core: OpenMP's own barrier spins for milliseconds there.
class Barrier {
    std::atomic<int> arrived{0}, phase{0};

   public:
    void wait() {
        const int current = phase.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == omp_get_num_threads()) {
            arrived.store(0, std::memory_order_relaxed);
            phase.store(current + 1, std::memory_order_release);
            phase.notify_all();
            return;
        }
        for (int spin = 0; spin < 2000; ++spin) {  // some 30 microseconds
            if (phase.load(std::memory_order_acquire) != current) return;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        phase.wait(current, std::memory_order_acquire);
    }
};

// ---- Products --------------------------------------------------------------------------------------------------

// Words from one row of a product's input to the next: an odd number of cache lines keeps rows in different sets
INLINE int64_t row_words(const Matrix& m) { return round_up(m.depth, 2 * LANES) + LANES; }

// R rows times one panel. `ahead` is fetched meanwhile, `stride` bytes per word: the panel that comes next.
template <class E, int R>
void tile(const uint32_t* panel, const uint32_t* x, int64_t x_stride, int64_t depth, const char* ahead, int64_t stride,
          Vec (*sums)[2]) {
    Vec sum[R][2] = {};
    for (int64_t word = 0; word < depth; ++word, panel += PANEL, ahead += stride) {
        const Words low = load<Words>(panel), high = load<Words>(panel + LANES);
        if (R > 4) __builtin_prefetch(ahead, 0, 2), __builtin_prefetch(ahead + 64, 0, 2);
#pragma GCC unroll 16
        for (int row = 0; row < R; ++row) {
            const uint32_t input = x[row * x_stride + word];
            sum[row][0] = multiply_add<E>(sum[row][0], low, input);
            sum[row][1] = multiply_add<E>(sum[row][1], high, input);
        }
    }
    for (int row = 0; row < R; ++row) sums[row][0] = sum[row][0], sums[row][1] = sum[row][1];
}

template <class E, int R = TILE>
INLINE void any_tile(int64_t rows, const uint32_t* panel, const uint32_t* x, int64_t x_stride, int64_t depth,
                     const char* ahead, int64_t stride, Vec (*sums)[2]) {
    if constexpr (R > 1)
        if (rows < R) return any_tile<E, R - 1>(rows, panel, x, x_stride, depth, ahead, stride, sums);
    tile<E, R>(panel, x, x_stride, depth, ahead, stride, sums);
}

// x [rows, in] times the matrix; finish(row, panel, sums) takes 32 outputs of a row at a time.
template <class E, class Finish>
INLINE void product(const Matrix& m, const void* x, int64_t rows, Finish finish) {
    const Range mine = share(m.panels);
    const int64_t tiles = (rows + TILE - 1) / TILE, stride = row_words(m), words = m.depth * PANEL;
    for (int64_t panel = mine.start; panel < mine.stop; ++panel)
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
            Vec sums[TILE][2];
            const uint32_t* weights = m.words + panel * words;
            const char* ahead = (const char*)(weights + words) + t * (words * 4 / tiles);
            any_tile<E>(count, weights, (const uint32_t*)x + first * stride, stride, m.depth, ahead, 128 / tiles, sums);
            for (int64_t row = 0; row < count; ++row) finish(first + row, panel, sums[row]);
        }
}

// y [rows, panels * 32] = x times the matrix, plus bias
template <class E>
void linear(const Matrix& m, const void* x, int64_t rows, float* y) {
    product<E>(m, x, rows, [&](int64_t row, int64_t panel, const Vec* sums) {
        for (int half = 0; half < 2; ++half) {
            const int64_t out = panel * PANEL + half * LANES;
            const Vec sum = m.bias ? sums[half] + widen(m.bias + out) : sums[half];
            narrow(sum, y + row * m.panels * PANEL + out);
        }
    });
}

// inner [rows, row_words(down)] = silu(gate) * up
template <class E>
void gated(const Layer& layer, const void* x, int64_t rows, void* inner) {
    const int64_t stride = row_words(layer.down) * 4 / sizeof(E);
    product<E>(layer.gate_up, x, rows, [&](int64_t row, int64_t panel, const Vec* sums) {
        const Vec gate = sums[0], up = sums[1];
        narrow(gate / (1.0f + exponential(-gate)) * up, (E*)inner + row * stride + panel * LANES);
    });
}

// x [rows, row_words(next)] = RMS norm of hidden [rows, D padded], to which `partial` is added first
template <class E>
void norm(const Model& model, int64_t rows, float* hidden, const float* partial, const float* weight,
          const Matrix& next, void* x) {
    const int64_t width = round_up(model.hidden, PANEL), stride = row_words(next) * 4 / sizeof(E);
    const Range mine = share(rows);
    for (int64_t row = mine.start; row < mine.stop; ++row) {
        float* values = hidden + row * width;
        Vec squares = {};
        for (int64_t i = 0; i < width; i += LANES) {
            Vec value = widen(values + i);
            if (partial) narrow(value = value + widen(partial + row * width + i), values + i);
            squares = fma(value, value, squares);
        }
        const float scale = 1 / std::sqrt(total(squares) / model.hidden + (float)model.eps);
        for (int64_t i = 0; i < width; i += LANES)
            narrow(widen(values + i) * scale * widen(weight + i), (E*)x + row * stride + i);
    }
}

// ---- Attention -------------------------------------------------------------------------------------------------

// Queries [K, T, G, d], so that those of a KV head stand together
struct Queries {
    float *turned, *anchored;  // at the row's position; at its slot
};

// Pairs (re, im) times pairs (cosine, sine)
INLINE void turn(const float* from, const float* turns, int64_t head_dim, float* to) {
    for (int64_t i = 0; i < head_dim; i += 2) {
        to[i] = __builtin_fmaf(-from[i + 1], turns[i + 1], from[i] * turns[i]);
        to[i + 1] = __builtin_fmaf(from[i + 1], turns[i], from[i] * turns[i + 1]);
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
                int64_t row, int64_t head, float* values, const Queries& queries, std::vector<float>& buffer) {
    const int64_t H = model.num_heads, K = model.num_kv_heads, G = H / K, d = model.head_dim, T = step.num_rows;
    const int64_t at = segment.start + row;
    if (layer.head_norm && head < H + K) normalize_head(values, layer.head_norm + head * d, d, (float)model.eps);
    if (head < H) {
        const int64_t to = ((head / G * T + at) * G + head % G) * d;
        turn(values, step.query_turns + at * d, d, queries.turned + to);
        if (segment.num_anchors) turn(values, segment.anchor_turns + row * d, d, queries.anchored + to);
        return;
    }
    const bool is_value = head >= H + K;
    E* to = (E*)segment.slot + index * segment.layer_stride + is_value * segment.side_stride +
            (head - H - is_value * K) * segment.head_stride + (segment.num_stored + row) * d;
    if (!is_value) turn(values, step.key_turns + at * d, d, buffer.data());
    const float* from = is_value ? values : buffer.data();
    for (int64_t i = 0; i < d; i += LANES) narrow(widen(from + i, d - i), to + i, d - i);
}

template <class E>
void place_heads(const Model& model, const Layer& layer, const Step& step, const Place& place, float* qkv,
                 const Queries& queries) {
    const int64_t heads = model.num_heads + 2 * model.num_kv_heads, d = model.head_dim;
    std::vector<float> buffer(d);
    for (int64_t s = 0; s < step.num_segments; ++s) {
        const Segment& segment = place.segments[s];
        const Range mine = share(segment.count * heads);
        for (int64_t unit = mine.start; unit < mine.stop; ++unit) {
            const int64_t row = unit / heads, head = unit % heads;
            float* values = qkv + (segment.start + row) * layer.qkv.panels * PANEL + head * d;
            place_head<E>(model, layer, step, segment, place.index, row, head, values, queries, buffer);
        }
    }
}

// Exchange lanes with bit S and vectors with bit S: the four of them transpose 16 vectors.
template <int S>
INLINE void exchange(Vec* v) {
#if defined(__clang__)
#define PICK(a, b, f) __builtin_shufflevector(a, b, f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15))
#else
#define PICK(a, b, f) __builtin_shuffle(a, b, Ints{f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)})
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

// Up to 16 rows of the cache as floats
template <class E>
struct Block {
    const E* rows[LANES];
    int64_t count;

    // [d][16 rows]; missing rows are 0. What changes places is words, of one float or two bfloat16.
    void transpose(int64_t head_dim, Vec* to) const {
        const int64_t words = head_dim * sizeof(E) / 4;
        for (int64_t i = 0; i < words; i += LANES) {
            Vec v[LANES] = {};
            for (int64_t row = 0; row < count; ++row) v[row] = widen((const float*)rows[row] + i, words - i);
            exchange<8>(v), exchange<4>(v), exchange<2>(v), exchange<1>(v);
            for (int64_t k = 0; k < std::min<int64_t>(LANES, words - i); ++k) {
                if constexpr (std::is_same_v<E, float>) {
                    *to++ = v[k];
                } else {
                    *to++ = (Vec)((Words)v[k] << 16);
                    *to++ = (Vec)((Words)v[k] & 0xffff0000u);
                }
            }
        }
    }

    // [d / 16][16 rows][16 features], and behind the last feature a 1, whose weighted sum is the sum of weights
    void append_one(int64_t head_dim, Vec* to) const {
        for (int64_t i = 0; i <= head_dim; i += LANES)
            for (int64_t row = 0; row < LANES; ++row, ++to) {
                *to = row < count && i < head_dim ? widen(rows[row] + i, head_dim - i) : Vec{};
                if (head_dim - i < LANES) *to = select(LANE == (int32_t)(head_dim - i), splat<Vec>(1.0f), *to);
            }
    }
};

// sums[n * sum_stride] += factors[n][i] * vectors[i], over i in order, for N rows of factors
template <int N>
void accumulate(const float* factors, int64_t factor_stride, const Vec* vectors, int64_t count, Vec* sums,
                int64_t sum_stride) {
    Vec sum[N];
    for (int n = 0; n < N; ++n) sum[n] = sums[n * sum_stride];
    for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sum[n] = fma(splat<Vec>(factors[n * factor_stride + i]), vectors[i], sum[n]);
    for (int n = 0; n < N; ++n) sums[n * sum_stride] = sum[n];
}

template <int N = 8>
void accumulate_rows(int64_t rows, const float* factors, int64_t factor_stride, const Vec* vectors, int64_t count,
                     Vec* sums, int64_t sum_stride) {
    if constexpr (N > 1)
        if (rows < N) return accumulate_rows<N - 1>(rows, factors, factor_stride, vectors, count, sums, sum_stride);
    for (; rows >= N; rows -= N, factors += N * factor_stride, sums += N * sum_stride)
        accumulate<N>(factors, factor_stride, vectors, count, sums, sum_stride);
    if (rows > 0) accumulate_rows<N>(rows, factors, factor_stride, vectors, count, sums, sum_stride);
}

// The attention of some rows of a segment over one KV head. The keys are the columns that the rows share, and then,
// in a tree, each row's own ancestors among the staged rows, itself the last: the order of positions for every row.
template <class E>
struct HeadAttention {
    const Model& model;
    const Segment& segment;
    const int64_t first, stop;  // rows of the segment
    const E *keys, *values;
    const float *queries, *anchored;  // [rows * G, d]
    const int64_t d = model.head_dim, G = model.num_heads / model.num_kv_heads, num_queries = (stop - first) * G;
    const int64_t shared = segment.num_stored + (segment.offsets ? 0 : stop);
    const int64_t shared_width = round_up(shared, LANES);
    int64_t width = shared_width;  // of a query's scores
    Vec *block = nullptr, *found = nullptr, *by_slot = nullptr, *sums = nullptr, *scores = nullptr;  // scratch memory

    void run(E* out, int64_t out_stride) {
        const int64_t features = d / LANES + 1;  // the 1 behind them included
        for (int64_t row = first; segment.offsets && row < stop; ++row)
            width = std::max(width, shared_width + round_up(own(row), LANES));
        const int64_t block_size = std::max(d, features * LANES);
        static thread_local std::vector<Vec> memory;
        const size_t needed = block_size + num_queries * (2 + features + width / LANES);
        if (memory.size() < needed) memory.resize(needed);
        block = memory.data();
        found = block + block_size;
        by_slot = found + num_queries;
        sums = by_slot + num_queries;
        scores = sums + num_queries * features;
        score();
        for (int64_t query = 0; query < num_queries; ++query) soften(scores + query * width / LANES);
        std::fill_n(sums, num_queries * features, Vec{});
        weigh(features);
        for (int64_t query = 0; query < num_queries; ++query) {
            const Vec* sum = sums + query * features;
            const float weight = ((const float*)sum)[d];
            E* to = out + (query / G) * out_stride + (query % G) * d;
            for (int64_t i = 0; i < d; i += LANES) narrow(sum[i / LANES] / weight, to + i, d - i);
        }
    }

   private:
    int64_t own(int64_t row) const { return segment.offsets[row + 1] - segment.offsets[row]; }

    // Shared columns `at` to `at` + 15
    Block<E> columns(const E* from, int64_t at) const {
        Block<E> found = {{}, std::min<int64_t>(LANES, shared - at)};
        for (int64_t i = 0; i < found.count; ++i) found.rows[i] = from + (at + i) * d;
        return found;
    }

    // 16 of the staged rows that a row sees, from its member `at` on
    Block<E> ancestors(const E* from, int64_t row, int64_t at) const {
        Block<E> found = {{}, std::min<int64_t>(LANES, own(row) - at)};
        const int64_t* members = segment.members + segment.offsets[row] + at;
        for (int64_t i = 0; i < found.count; ++i) found.rows[i] = from + (segment.num_stored + members[i]) * d;
        return found;
    }

    void score() {
        std::fill_n(scores, num_queries * width / LANES, splat<Vec>(-INFINITE));
        for (int64_t at = 0; at < shared; at += LANES) {
            columns(keys, at).transpose(d, block);
            std::fill_n(found, num_queries, Vec{});
            accumulate_rows(num_queries, queries, d, block, d, found, 1);
            const int64_t anchors = segment.num_anchors - at;
            if (anchors > 0) {
                std::fill_n(by_slot, num_queries, Vec{});
                accumulate_rows(num_queries, anchored, d, block, d, by_slot, 1);
            }
            Vec* to = scores + at / LANES;
            int64_t query = 0;
            for (int64_t row = first; row < stop; ++row) {
                const Ints hidden = hides(row, at);
                for (int64_t g = 0; g < G; ++g, ++query, to += width / LANES) {
                    const Ints at_slot = LANE < (int32_t)anchors;
                    const Vec score = anchors > 0 ? select(at_slot, by_slot[query], found[query]) : found[query];
                    *to = select(hidden, splat<Vec>(-INFINITE), score);
                }
            }
        }
        for (int64_t row = first; segment.offsets && row < stop; ++row)
            for (int64_t at = 0; at < own(row); at += LANES) {
                const Block<E> own_keys = ancestors(keys, row, at);
                own_keys.transpose(d, block);
                const int64_t query = (row - first) * G;
                Vec* to = scores + (query * width + shared_width + at) / LANES;
                for (int64_t g = 0; g < G; ++g) to[g * width / LANES] = Vec{};
                accumulate_rows(G, queries + query * d, d, block, d, to, width / LANES);
                for (int64_t g = 0; g < G; ++g) {
                    Vec& score = to[g * width / LANES];
                    score = select(LANE < (int32_t)own_keys.count, score, splat<Vec>(-INFINITE));
                }
            }
    }

    // Which of the columns `at` to `at` + 15 the row does not see
    Ints hides(int64_t row, int64_t at) const {
        const int64_t limit = segment.num_stored + (segment.offsets ? 0 : row + 1) - at;
        Ints hidden = LANE >= (int32_t)limit;
        if (segment.sees) {
            const uint8_t* sees = segment.sees + row * (segment.num_stored + segment.count) + at;
            for (int64_t i = 0; i < std::min<int64_t>(LANES, shared - at); ++i)
                if (!sees[i]) hidden[i] = -1;
        }
        return hidden;
    }

    // Scores of a query become weights, whose sum is still to be divided by
    void soften(Vec* score) const {
        Vec most = score[0];
        for (int64_t i = 1; i < width / LANES; ++i) most = select(score[i] > most, score[i], most);
        float top = -INFINITE;
        for (int lane = 0; lane < LANES; ++lane) top = std::max(top, most[lane]);
        for (int64_t i = 0; i < width / LANES; ++i) {
            const Vec below = score[i] - top;
            score[i] = select(below < -87.0f, Vec{}, exponential(below));
        }
    }

    void weigh(int64_t features) {
        const float* weights = (const float*)scores;
        for (int64_t at = 0; at < shared; at += LANES) {
            columns(values, at).append_one(d, block);
            for (int64_t i = 0; i < features; ++i)
                accumulate_rows(num_queries, weights + at, width, block + i * LANES, LANES, sums + i, features);
        }
        for (int64_t row = first; segment.offsets && row < stop; ++row)
            for (int64_t at = 0; at < own(row); at += LANES) {
                ancestors(values, row, at).append_one(d, block);
                const int64_t query = (row - first) * G;
                for (int64_t i = 0; i < features; ++i)
                    accumulate_rows(G, weights + query * width + shared_width + at, width, block + i * LANES,
                                    LANES, sums + query * features + i, features);
            }
    }
};

// attended [T, row_words(output)]. Pieces of work go to whichever thread is free: who does one changes no bit.
template <class E>
void attend(const Model& model, const Layer& layer, const Step& step, const Place& place, const Queries& queries,
            void* attended) {
    const int64_t K = model.num_kv_heads, G = model.num_heads / K, d = model.head_dim, T = step.num_rows;
    const int64_t stride = row_words(layer.output) * 4 / sizeof(E);
    for (int64_t s = 0; s < step.num_segments; ++s) {
        const Segment& segment = place.segments[s];
        // Pieces for all threads, but rows enough in each to share the keys' conversion, and scores that stay in L2
        const int64_t even = std::max<int64_t>(4, segment.count * K / (2 * step.num_threads));
        const int64_t fitting = (1 << 17) / (G * (segment.num_stored + segment.count));
        const int64_t rows = std::max<int64_t>(1, std::min({even, int64_t(32), fitting}));
        const int64_t blocks = (segment.count + rows - 1) / rows;
#pragma omp for schedule(dynamic) nowait
        for (int64_t unit = 0; unit < blocks * K; ++unit) {
            const int64_t kv = unit % K, first = unit / K * rows, stop = std::min(first + rows, segment.count);
            const int64_t query = (kv * T + segment.start + first) * G * d;
            const E* keys = (const E*)segment.slot + place.index * segment.layer_stride + kv * segment.head_stride;
            HeadAttention<E> head{model, segment, first, stop, keys, keys + segment.side_stride,
                                  queries.turned + query, queries.anchored + query};
            head.run((E*)attended + (segment.start + first) * stride + kv * G * d, stride);
        }
    }
}

// ---- Layers ----------------------------------------------------------------------------------------------------

// Where the pieces of a step's scratch memory begin, and how large it is
struct Scratch {
    float* qkv;
    Queries queries;
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
        queries.turned = take(num_queries);
        queries.anchored = take(num_queries);
        x = take(std::max(row_words(layer.qkv), row_words(layer.output)));
        inner = take(row_words(layer.down));
    }
};

// Half layers 2i are the attention of layer i, 2i + 1 its MLP. Each starts with what the half before left in `partial`.
template <class E>
void run_halves(const Model& model, const Step& step, int64_t first, int64_t stop, Barrier& barrier) {
    const Scratch scratch(model, step.num_rows, step.scratch);
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
            place_heads<E>(model, layer, step, place, scratch.qkv, scratch.queries);
            barrier.wait();
            attend<E>(model, layer, step, place, scratch.queries, scratch.x);
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
}

template <class E>
void run_head(const Model& model, int64_t rows, float* hidden, void* x, float* logits, Barrier& barrier) {
    norm<E>(model, rows, hidden, nullptr, model.norm, model.head, x);
    barrier.wait();
    linear<E>(model.head, x, rows, logits);
}

}  // namespace

extern "C" {

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

// hidden [rows, D padded to 32] -> logits [rows, panels * 32 of the head]
void outrider_logits(const Model* model, int64_t rows, float* hidden, void* scratch, float* logits, int64_t threads) {
    Barrier barrier;
#pragma omp parallel num_threads((int)threads)
    if (model->is_bfloat16)
        run_head<BF16>(*model, rows, hidden, scratch, logits, barrier);
    else
        run_head<float>(*model, rows, hidden, scratch, logits, barrier);
}

}
