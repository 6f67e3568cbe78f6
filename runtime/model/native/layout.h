// What Python hands over: decoder.py mirrors these structs.

#pragma once

#include <cstdint>

namespace {

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

}  // namespace
