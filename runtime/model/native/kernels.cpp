// A step's rows through a Llama-family decoder on the CPU. Driven by decoder.py, which mirrors the structs below.
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

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include <omp.h>
#include <sched.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
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
    int64_t is_bfloat16, hidden, num_heads, num_kv_heads, head_dim, vocabulary;  // of this shard
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
    // Columns hold rows of the slot, of which the segment's own stand behind the stored ones; -1 holds none. The rows
    // share the first `num_columns`, and then, in a tree, each has `num_tail` of its own. Both in blocks of 32.
    const int64_t *columns, *tails;  // [num_columns], [count, num_tail]
    int64_t num_columns, num_tail;
    int64_t first_in_tails;  // of the slot's rows
    const uint8_t* sees;  // [count, num_columns], or null: of the shared columns a row sees all that hold rows up to itself
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
typedef uint8_t Bytes __attribute__((vector_size(16)));
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
INLINE Vec widen(Halves halves) {
#if defined(__AVX512F__)
    return (Vec)((Words)_mm512_cvtepu16_epi32((__m256i)halves) << 16);
#else
    return (Vec)(__builtin_convertvector(halves, Words) << 16);
#endif
}
INLINE Vec widen(const BF16* from) { return widen(load<Halves>(from)); }
INLINE Halves halves(Vec value) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)value);
#else
    const Words bits = (Words)value;
    return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
#endif
}
// Both return what `to` now holds
INLINE Vec narrow(Vec value, float* to) { return std::memcpy(to, &value, sizeof value), value; }
INLINE Vec narrow(Vec value, BF16* to) {
    const Halves rounded = halves(value);
    std::memcpy(to, &rounded, sizeof rounded);
    return widen(rounded);
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
    if (count >= LANES) return (void)narrow(value, to);
    E all[LANES];
    narrow(value, all);
    std::memcpy(to, all, count * sizeof(E));
}

// 16 truth values as masks
INLINE Ints flags(const uint8_t* from) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepu8_epi32(load<__m128i>(from)) != 0;
#else
    return __builtin_convertvector(load<Bytes>(from), Ints) != 0;
#endif
}

INLINE Vec select(Ints condition, Vec yes, Vec no) { return (Vec)(((Ints)yes & condition) | ((Ints)no & ~condition)); }

INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return select(a > b, a, b);
#endif
}
INLINE Vec smaller(Vec a, Vec b) { return -larger(-a, -b); }

INLINE float maximum(Vec values) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)values);
#else
    float most = values[0];
    for (int lane = 1; lane < LANES; ++lane) most = std::max(most, values[lane]);
    return most;
#endif
}

INLINE float total(Vec values) {
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += values[lane];
    return sum;
}

// e^x within 2 units in the last place, where that is a normal number: x from -87 to 88
INLINE Vec exponential(Vec x) {
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

// ---- The matrix unit -------------------------------------------------------------------------------------------

constexpr int MOST_ROWS = 32;  // of a tile, on any machine

#if defined(__AMX_BF16__)
// Tiles 0 to 3 are sums (rows 0 to 15 times two vectors, rows 16 to 31), 4 and 5 inputs, 6 and 7 weights.
struct TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
};

// Linux lends the unit's registers to processes that ask for them.
bool ask_for_matrix_unit() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
const bool MATRIX_UNIT = ask_for_matrix_unit();

thread_local int64_t rows_in_use = 0;

// Shape this thread's tiles for so many rows, 1 to 32
INLINE void use_rows(int64_t rows) {
    if (rows == rows_in_use) return;
    const uint8_t low = std::min<int64_t>(rows, LANES), high = std::max<int64_t>(rows - LANES, 1);
    TileShapes shapes;
    for (int sums : {0, 1, 4}) shapes.rows[sums] = low;
    for (int sums : {2, 3, 5}) shapes.rows[sums] = high;
    shapes.rows[6] = shapes.rows[7] = LANES;
    _tile_loadconfig(&shapes);
    rows_in_use = rows;
}

// A thread that keeps its tiles makes every switch to another one dearer.
INLINE void release_matrix_unit() {
    if (rows_in_use) _tile_release();
    rows_in_use = 0;
}
#else
constexpr bool MATRIX_UNIT = false;
INLINE void release_matrix_unit() {}
#endif

// ---- Products --------------------------------------------------------------------------------------------------

// Words from one row of a product's input to the next: an odd number of cache lines keeps rows in different sets
INLINE int64_t row_words(const Matrix& m) { return round_up(m.depth, 2 * LANES) + LANES; }

constexpr int64_t AHEAD = 14 * LANES * PANEL * 4;  // bytes; measured

// y [R, 32], or 0 unless `more`, + R rows times one panel -> y. `ahead` is fetched meanwhile, `stride` bytes per word: what
// comes next.
template <class E, int R>
void tile(const uint32_t* panel, const uint32_t* x, int64_t x_stride, int64_t depth, const char* ahead, int64_t stride,
          float* y, int64_t y_stride, bool more) {
    Vec sum[R][2] = {};
    if (more) {
#pragma GCC unroll 16
        for (int row = 0; row < R; ++row)
            sum[row][0] = widen(y + row * y_stride), sum[row][1] = widen(y + row * y_stride + LANES);
    }
    for (int64_t word = 0; word < depth; ++word, panel += PANEL, ahead += stride) {
        const Words low = load<Words>(panel), high = load<Words>(panel + LANES);
        if (R > 4 && stride) __builtin_prefetch(ahead, 0, 2), __builtin_prefetch(ahead + 64, 0, 2);
#pragma GCC unroll 16
        for (int row = 0; row < R; ++row) {
            const uint32_t input = x[row * x_stride + word];
            sum[row][0] = multiply_add<E>(sum[row][0], low, input);
            sum[row][1] = multiply_add<E>(sum[row][1], high, input);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < R; ++row)
        narrow(sum[row][0], y + row * y_stride), narrow(sum[row][1], y + row * y_stride + LANES);
}

template <class E, int R = TILE>
INLINE void vector_tile(int64_t rows, const uint32_t* panel, const uint32_t* x, int64_t x_stride, int64_t depth,
                        const char* ahead, int64_t stride, float* y, int64_t y_stride, bool more) {
    if constexpr (R > 1)
        if (rows < R) return vector_tile<E, R - 1>(rows, panel, x, x_stride, depth, ahead, stride, y, y_stride, more);
    tile<E, R>(panel, x, x_stride, depth, ahead, stride, y, y_stride, more);
}

#if defined(__AMX_BF16__)
// The same on the matrix unit, 16 words and up to 32 rows at a time. What it adds up for a row depends on that row only.
// `ahead` moves along with the panel.
void matrix_tile(int64_t rows, const uint32_t* panel, const uint32_t* x, int64_t x_stride, int64_t depth,
                 const char* ahead, int64_t stride, float* y, int64_t y_stride, bool more) {
    constexpr int BYTES = PANEL * 4;  // of a word of the panel
    use_rows(rows);
    const bool two = rows > LANES;
    if (more) {
        _tile_loadd(0, y, y_stride * 4);
        _tile_loadd(1, y + LANES, y_stride * 4);
        if (two) _tile_loadd(2, y + LANES * y_stride, y_stride * 4);
        if (two) _tile_loadd(3, y + LANES * y_stride + LANES, y_stride * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    // Fetched between the products, since a core can wait for a dozen lines only
    const auto fetch = [&](int part) {
        for (int64_t line = part * 4 * stride; line < (part + 1) * 4 * stride; line += 64)
            __builtin_prefetch(ahead + line, 0, 2);
    };
    for (int64_t word = 0; word < depth; word += LANES, ahead += LANES * PANEL * 4) {
        _tile_loadd(4, x + word, x_stride * 4);
        _tile_loadd(6, panel + word * PANEL, BYTES);
        fetch(0);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + word * PANEL + LANES, BYTES);
        fetch(1);
        _tile_dpbf16ps(1, 4, 7);
        if (!two) continue;
        _tile_loadd(5, x + LANES * x_stride + word, x_stride * 4);
        fetch(2);
        _tile_dpbf16ps(2, 5, 6);
        fetch(3);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, y, y_stride * 4);
    _tile_stored(1, y + LANES, y_stride * 4);
    if (two) _tile_stored(2, y + LANES * y_stride, y_stride * 4);
    if (two) _tile_stored(3, y + LANES * y_stride + LANES, y_stride * 4);
}
#endif

// Which of the two does a product; it depends on nothing but the model and the machine.
template <class E>
INLINE bool suits_matrix_unit(int64_t depth) {
    return std::is_same_v<E, BF16> && MATRIX_UNIT && depth % LANES == 0;
}

// Most rows that `any_tile` takes
template <class E>
INLINE int64_t tile_rows(int64_t depth) {
    return suits_matrix_unit<E>(depth) ? MOST_ROWS : TILE;
}

template <class E>
INLINE void any_tile(int64_t rows, const uint32_t* panel, const void* x, int64_t x_stride, int64_t depth,
                     const char* ahead, int64_t stride, float* y, int64_t y_stride, bool more = false) {
    const uint32_t* words = (const uint32_t*)x;
#if defined(__AMX_BF16__)
    if (suits_matrix_unit<E>(depth)) return matrix_tile(rows, panel, words, x_stride, depth, ahead, stride, y, y_stride, more);
#endif
    vector_tile<E>(rows, panel, words, x_stride, depth, ahead, stride, y, y_stride, more);
}

// The same for any number of rows
template <class E>
INLINE void all_tiles(int64_t rows, const uint32_t* panel, const void* x, int64_t x_stride, int64_t depth,
                      float* y, int64_t y_stride, bool more = false) {
    const int64_t most = tile_rows<E>(depth);
    for (int64_t first = 0; first < rows; first += most)
        any_tile<E>(std::min(most, rows - first), panel, (const uint32_t*)x + first * x_stride, x_stride, depth,
                    (const char*)panel, 0, y + first * y_stride, y_stride, more);
}

// x [rows, in] times the matrix; finish(row, panel, its 32 outputs)
template <class E, class Finish>
INLINE void product(const Matrix& m, const void* x, int64_t rows, Finish finish) {
    const Range mine = share(m.panels);
    const int64_t most = tile_rows<E>(m.depth), tiles = (rows + most - 1) / most;
    const int64_t stride = row_words(m), words = m.depth * PANEL;
    alignas(64) float found[MOST_ROWS * PANEL];
    for (int64_t panel = mine.start; panel < mine.stop; ++panel)
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
            const uint32_t* weights = m.words + panel * words;
            const char* ahead = suits_matrix_unit<E>(m.depth) ? (const char*)weights + AHEAD
                                                              : (const char*)(weights + words) + t * (words * 4 / tiles);
            any_tile<E>(count, weights, (const uint32_t*)x + first * stride, stride, m.depth, ahead, 128 / tiles, found,
                        PANEL);
            for (int64_t row = 0; row < count; ++row) finish(first + row, panel, found + row * PANEL);
        }
}

// y [rows, panels * 32] = x times the matrix, plus bias
template <class E>
void linear(const Matrix& m, const void* x, int64_t rows, float* y) {
    product<E>(m, x, rows, [&](int64_t row, int64_t panel, const float* sums) {
        for (int64_t i = 0; i < PANEL; i += LANES) {
            const int64_t out = panel * PANEL + i;
            narrow(m.bias ? widen(sums + i) + widen(m.bias + out) : widen(sums + i), y + row * m.panels * PANEL + out);
        }
    });
}

// inner [rows, row_words(down)] = silu(gate) * up
template <class E>
void gated(const Layer& layer, const void* x, int64_t rows, void* inner) {
    const int64_t stride = row_words(layer.down) * 4 / sizeof(E);
    product<E>(layer.gate_up, x, rows, [&](int64_t row, int64_t panel, const float* sums) {
        const Vec gate = widen(sums), up = widen(sums + LANES);
        const Vec power = larger(splat<Vec>(-87.0f), smaller(splat<Vec>(88.0f), -gate));
        narrow(gate / (1.0f + exponential(power)) * up, (E*)inner + row * stride + panel * LANES);
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
    const int64_t C = segment.num_columns, tail = segment.num_tail, width = C + tail;  // of a query's scores
    const int64_t shared = seen_columns();
    // In a tree the rows' own columns hold these rows of the slot. Their keys are multiplied once for all queries.
    const int64_t in_tails = tail ? segment.num_stored + (stop - 1) / G + 1 - segment.first_in_tails : 0;
    const int64_t tail_width = round_up(in_tails, BLOCK);
    const int64_t panel_words = std::max(C, tail) * sizeof(E) / 4 * PANEL;  // of values
    uint32_t *key_panel = nullptr, *value_panels = nullptr;
    float *scores = nullptr, *tail_scores = nullptr, *sums = nullptr;  // [queries, width], [queries, tail_width], [queries, features]
    Vec* wholes = nullptr;  // [queries]

    void run(E* out, int64_t out_stride) {
        take_memory();
        for (int64_t at = 0; at < shared; at += BLOCK) score(at);
        for (int64_t at = 0; at < in_tails; at += BLOCK) score_tails(at);
        for (int64_t query = 0; query < num_queries; ++query) {
            if (tail) collect_tail(query);
            wholes[query] = soften(scores + query * width, shared + (tail ? tail_of(query) : 0));
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
        const int64_t last = segment.num_stored + (stop - 1) / G;
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
        const int64_t last = segment.num_stored + first / G;  // what all queries see
        const bool is_whole = std::all_of(columns, columns + BLOCK, [&](int64_t row) { return row >= 0 && row <= last; });
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

    void collect_tail(int64_t query) const {
        const int64_t *columns = tail_columns(query), count = tail_of(query);
        const float* from = tail_scores + query * tail_width - segment.first_in_tails;
        float* to = scores + query * width + C;
        for (int64_t c = 0; c < count; ++c) to[c] = columns[c] < 0 ? -INFINITE : from[columns[c]];
    }

    // What the rows' own columns add to the sums. From row to row only the values in columns that differ are put in
    // place; what stays in a column that a row does not use has weight 0.
    void weigh_tails() const {
        static thread_local std::vector<int64_t> holds;
        holds.assign(tail, -1);
        std::fill_n(value_panels, panel_words * features / PANEL, 0);
        for (int64_t query = 0; query < num_queries;) {
            const int64_t *columns = tail_columns(query), count = tail_of(query);
            const int64_t next = std::min(((first + query) / G + 1) * G - first, num_queries);
            for (int64_t c = 0; c < count; ++c)
                if (columns[c] >= 0 && columns[c] != holds[c])
                    put_value(values + (holds[c] = columns[c]) * d, c, d, panel_words, value_panels);
            for (int64_t f = 0; f < features; f += PANEL)
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
        for (int64_t i = 0; i < count; i += LANES) {
            const Vec below = widen(scores + i) - top;
            whole += narrow(select(below < -87.0f, Vec{}, exponential(below)), (E*)scores + i);
        }
        return whole;
    }
};

// attended [T, row_words(output)]. Pieces of work go to whichever thread is free: who does one changes no bit.
template <class E>
void attend(const Model& model, const Layer& layer, const Step& step, const Place& place, const Queries<E>& queries,
            void* attended) {
    constexpr int64_t FEW = 8, MOST_QUERIES = 64, MOST_SCORES = 1 << 17;  // which stay in the second cache
    const int64_t K = model.num_kv_heads, G = model.num_heads / K, d = model.head_dim, T = step.num_rows;
    const int64_t stride = row_words(layer.output) * 4 / sizeof(E);
    for (int64_t s = 0; s < step.num_segments; ++s) {
        const Segment& segment = place.segments[s];
        const int64_t num_queries = segment.count * G, fitting = MOST_SCORES / (segment.num_columns + segment.num_tail);
        const int64_t most = std::clamp<int64_t>(fitting, TILE, MOST_QUERIES);
        const int64_t needed = std::max((num_queries + most - 1) / most, (step.num_threads + K - 1) / K);
        const bool is_even = needed * K % step.num_threads == 0 || num_queries < FEW * (needed + 1);
        const int64_t pieces = std::min(needed + !is_even, num_queries);
#pragma omp for schedule(dynamic) nowait
        for (int64_t unit = 0; unit < pieces * K; ++unit) {
            const int64_t kv = unit % K, piece = unit / K;
            const int64_t first = num_queries * piece / pieces, stop = num_queries * (piece + 1) / pieces;
            const int64_t query = (kv * T + segment.start) * G + first;
            const E* keys = (const E*)segment.slot + place.index * segment.layer_stride + kv * segment.head_stride;
            HeadAttention<E> head{model, segment, first, stop, keys, keys + segment.side_stride,
                                  queries.turned + query * d, queries.anchored + query * d};
            head.run((E*)attended + segment.start * stride + kv * G * d, stride);
        }
    }
}

// ---- Layers ----------------------------------------------------------------------------------------------------

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

// largest [rows, panels, room for a multiple of 16]: of each panel's logits, of which the last panel may have fewer than 32
template <class E>
void run_head(const Model& model, int64_t rows, float* hidden, void* x, float* logits, float* largest, Barrier& barrier) {
    norm<E>(model, rows, hidden, nullptr, model.norm, model.head, x);
    barrier.wait();
    const int64_t panels = model.head.panels, vocabulary = model.vocabulary;
    product<E>(model.head, x, rows, [&](int64_t row, int64_t panel, const float* sums) {
        const int64_t first = panel * PANEL;
        float* to = logits + row * panels * PANEL + first;
        Vec most = splat<Vec>(-INFINITE);
        for (int64_t i = 0; i < PANEL; i += LANES) {
            const Ints real = LANE < (int32_t)std::clamp<int64_t>(vocabulary - first - i, 0, LANES);
            most = larger(narrow(select(real, widen(sums + i), splat<Vec>(-INFINITE)), to + i), most);
        }
        largest[row * round_up(panels, LANES) + panel] = maximum(most);
    });
    release_matrix_unit();
}

// Where the largest of some numbers is, a multiple of 16 of them: the first of equals
INLINE int64_t first_largest(const float* values, int64_t count) {
    Vec most = widen(values);
    for (int64_t i = LANES; i < count; i += LANES) most = larger(widen(values + i), most);
    return std::find(values, values + count, maximum(most)) - values;
}

// The k largest logits of a row, largest first, and of equals the first one; rest: the log-sum-exp of the largest of each
// panel that holds none of them. `largest` [panels, room for a multiple of 16] is written over.
void find_top(const float* logits, float* largest, int64_t panels, int64_t k, float* values, int64_t* places, float* rest) {
    static thread_local std::vector<float> found;
    static thread_local std::vector<int64_t> from;
    found.clear(), from.clear();
    const int64_t count = round_up(panels, LANES);
    std::fill(largest + panels, largest + count, -INFINITE);
    const float top = largest[first_largest(largest, count)];
    for (int64_t i = 0; i < std::min(k, panels); ++i) {
        const int64_t best = first_largest(largest, count);
        from.push_back(best * PANEL);
        found.insert(found.end(), logits + best * PANEL, logits + (best + 1) * PANEL);
        largest[best] = -INFINITE;
    }
    for (int64_t i = 0; i < k; ++i) {
        const int64_t best = first_largest(found.data(), found.size());
        values[i] = found[best];
        places[i] = values[i] == -INFINITE ? 0 : from[best / PANEL] + best % PANEL;
        found[best] = -INFINITE;
    }
    Vec sum = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const Vec below = widen(largest + i) - top;
        sum += select(below < -87.0f, Vec{}, exponential(below));
    }
    *rest = top + std::log(total(sum));
}

}  // namespace

// Where processes meet, in memory that they share and that is 0 to begin with
struct Meeting {
    alignas(64) std::atomic<uint32_t> arrived;
    alignas(64) std::atomic<uint32_t> number;  // of meetings that are over
};

extern "C" {

void outrider_arrive(Meeting* meeting, int64_t ranks) {
    if (meeting->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < ranks) return;
    meeting->arrived.store(0, std::memory_order_relaxed);
    meeting->number.fetch_add(1, std::memory_order_release);
}

// Whether the meeting of this number is over, which is waited for so long
int64_t outrider_met(Meeting* meeting, int64_t number, int64_t microseconds) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
    for (int64_t turn = 0;; ++turn) {
        if (meeting->number.load(std::memory_order_acquire) != (uint32_t)number) return 1;
        if (turn % 64 == 63 && std::chrono::steady_clock::now() > deadline) return 0;
        if (turn > 4000) sched_yield();  // others may need this core to arrive
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
    }
}

// sum [count] = the parts [ranks], one behind the other, `stride` bytes from each to the next
void outrider_sum(const char* parts, int64_t ranks, int64_t stride, float* sum, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        float value = 0;
        for (int64_t rank = 0; rank < ranks; ++rank) value += ((const float*)(parts + rank * stride))[i];
        sum[i] = value;
    }
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

// hidden [rows, D padded to 32] -> logits [rows, panels * 32 of the head], and the largest [rows, panels] of each panel
void outrider_logits(const Model* model, int64_t rows, float* hidden, void* scratch, float* logits, float* largest,
                     int64_t threads) {
    Barrier barrier;
#pragma omp parallel num_threads((int)threads)
    if (model->is_bfloat16)
        run_head<BF16>(*model, rows, hidden, scratch, logits, largest, barrier);
    else
        run_head<float>(*model, rows, hidden, scratch, logits, largest, barrier);
}

// What find_top says, of each row: values and places [rows, k], rest [rows]
void outrider_top(const float* logits, float* largest, int64_t rows, int64_t panels, int64_t k, float* values,
                  int64_t* places, float* rest, int64_t threads) {
#pragma omp parallel for num_threads((int)threads)
    for (int64_t row = 0; row < rows; ++row)
        find_top(logits + row * panels * PANEL, largest + row * round_up(panels, LANES), panels, k, values + row * k, places + row * k,
                 rest + row);
}

}
