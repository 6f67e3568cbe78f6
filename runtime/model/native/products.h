// Rows times matrices: in tiles of vectors, or on the processor's matrix unit.

#pragma once

#include "layout.h"
#include "threads.h"
#include "vectors.h"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

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

// Where the sums of some rows and one panel go, and how far apart those of two rows are
struct Target {
    float* sums;
    int64_t stride;
};

// x [rows, in] times the matrix. target(first row, panel) says where a tile's sums go; then comes finish(first row, how
// many rows, panel, that target).
template <class E, class Where, class Finish>
INLINE void product(const Matrix& m, const void* x, int64_t rows, Where target, Finish finish) {
    const Range mine = share(m.panels);
    const int64_t most = tile_rows<E>(m.depth), tiles = (rows + most - 1) / most;
    const int64_t stride = row_words(m), words = m.depth * PANEL;
    for (int64_t panel = mine.start; panel < mine.stop; ++panel)
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
            const uint32_t* weights = m.words + panel * words;
            const char* ahead = suits_matrix_unit<E>(m.depth) ? (const char*)weights + AHEAD
                                                              : (const char*)(weights + words) + t * (words * 4 / tiles);
            const Target to = target(first, panel);
            any_tile<E>(count, weights, (const uint32_t*)x + first * stride, stride, m.depth, ahead, 128 / tiles, to.sums,
                        to.stride);
            finish(first, count, panel, to);
        }
}

// The same where finish(row, panel, its 32 sums) puts them where they belong
template <class E, class Finish>
INLINE void product(const Matrix& m, const void* x, int64_t rows, Finish finish) {
    alignas(64) float found[MOST_ROWS * PANEL];
    const auto target = [&](int64_t, int64_t) { return Target{found, PANEL}; };
    product<E>(m, x, rows, target, [&](int64_t first, int64_t count, int64_t panel, const Target& to) {
        for (int64_t row = 0; row < count; ++row) finish(first + row, panel, to.sums + row * to.stride);
    });
}

// y [rows, panels * 32] = x times the matrix, plus bias
template <class E>
void linear(const Matrix& m, const void* x, int64_t rows, float* y) {
    const int64_t stride = m.panels * PANEL;
    const auto target = [&](int64_t first, int64_t panel) { return Target{y + first * stride + panel * PANEL, stride}; };
    product<E>(m, x, rows, target, [&](int64_t, int64_t count, int64_t panel, const Target& to) {
        for (int64_t row = 0; m.bias && row < count; ++row)
            for (int64_t i = 0; i < PANEL; i += LANES) {
                float* sums = to.sums + row * stride + i;
                narrow(widen(sums) + widen(m.bias + panel * PANEL + i), sums);
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

}  // namespace
