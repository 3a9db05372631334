// Quantization of rows to 8 bits, for one instruction set: the first step of a linear layer with 8-bit weights.
#pragma once

#include "int8_linear.h"
#include "simd.h"

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define PRUNEATTN_DOT_PRODUCTS 1
#else
#define PRUNEATTN_DOT_PRODUCTS 0
#endif

namespace pruneattn::cpu::PRUNEATTN_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // 24 sums of 32 registers
#elif PRUNEATTN_DOT_PRODUCTS
constexpr int kTileRows = 6;  // 12 sums of 16 registers
#else
constexpr int kTileRows = 4;  // 8 sums of 16 registers
#endif
constexpr float kSmallestMax = 0x1p-100f;  // a row without larger numbers counts as zero

typedef Mask Ints;

inline Ints load_ints(const void* p) {
  Ints v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store_ints(int32_t* p, Ints v) { std::memcpy(p, &v, sizeof v); }
inline Ints broadcast_int(int32_t x) { return Ints{} + x; }
inline Vec to_floats(Ints v) { return __builtin_convertvector(v, Vec); }

// Rounds to nearest, ties to even.
inline Ints round_to_ints(Vec v) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtps_epi32(v);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtps_epi32(v);
#elif defined(__SSE2__)
  return (Ints)_mm_cvtps_epi32(v);
#else
  Ints rounded;
  for (int i = 0; i < kLanes; ++i) rounded[i] = static_cast<int32_t>(__builtin_rintf(v[i]));
  return rounded;
#endif
}

#if PRUNEATTN_DOT_PRODUCTS
using Quantized = int8_t;

// Writes 16 quantized inputs.
inline void store_group(Quantized* out, const Ints (&group)[kInt8Group / kLanes]) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  for (int i = 0; i < kInt8Group / kLanes; ++i) {
    const Bytes bytes = __builtin_convertvector(group[i], Bytes);
    std::memcpy(out + i * kLanes, &bytes, sizeof bytes);
  }
}
#else
// Products of 8-bit numbers do not fit into 16 bits, and the instruction that adds two of them saturates. Quantized
// numbers are therefore stored in 16 bits. Of 4 numbers, the first and third are a pair, and the second and fourth: so
// the weights need no shuffle.
using Quantized = int16_t;

inline void store_group(Quantized* out, const Ints (&group)[kInt8Group / kLanes]) {
  int32_t numbers[kInt8Group];
  std::memcpy(numbers, group, sizeof numbers);
  for (int i = 0; i < kInt8Group; i += 4) {
    const int32_t* n = numbers + i;
    const int16_t pairs[4] = {static_cast<int16_t>(n[0]), static_cast<int16_t>(n[2]), static_cast<int16_t>(n[1]),
                              static_cast<int16_t>(n[3])};
    std::memcpy(out + i, pairs, sizeof pairs);
  }
}
#endif

// What the product needs to know about a quantized row.
struct RowState {
  int64_t residual;  // offset of its residual
  float scale;       // of the quantized numbers
  int32_t start;     // of the sums
};

// A row of the input in float32.
template <class T>
struct Row {
  const T* x;

  Vec at(int64_t i) const { return load(x + i); }
  Vec first(int64_t i, int64_t count) const { return load_first(x + i, count); }
};

// A row after a layer norm.
template <class T>
struct NormalizedRow {
  const T* x;
  const float *weight, *bias;
  float mean, factor;

  Vec at(int64_t i) const { return (load(x + i) - mean) * factor * load(weight + i) + load(bias + i); }
  Vec first(int64_t i, int64_t count) const {
    const Vec centered = load_first(x + i, count) - mean;
    return centered * factor * load_first(weight + i, count) + load_first(bias + i, count);
  }
};

template <class T>
NormalizedRow<T> normalized(const T* x, const Int8Linear& args) {
  const int64_t whole = args.in / kLanes * kLanes, rest = args.in - whole;
  const float channels = static_cast<float>(args.in);
  Vec sums = load_first(x + whole, rest);
  for (int64_t i = 0; i < whole; i += kLanes) sums += load(x + i);
  const float mean = reduce_sum(sums)[0] / channels;
  Vec centered = load_first(x + whole, rest) - mean;
  for (int64_t i = rest; i < kLanes; ++i) centered[i] = 0.0f;
  Vec squares = centered * centered;
  for (int64_t i = 0; i < whole; i += kLanes) {
    centered = load(x + i) - mean;
    squares += centered * centered;
  }
  const float factor = 1.0f / __builtin_sqrtf(reduce_sum(squares)[0] / channels + args.epsilon);
  return {x, args.norm_weight, args.norm_bias, mean, factor};
}

// Returns 127 / the largest magnitude: the factor of the quantized numbers. A row without numbers above kSmallestMax
// gets the scale and the factor 0. A row with NaN or Inf gets the scale NaN and the factor 0.
template <class Source>
float factor_of(const Source& row, int64_t channels, float& scale) {
  const int64_t whole = channels / kLanes * kLanes;
  // Non-negative floats order like their bits, with Inf and NaN at the end.
  const auto larger_bits = [](Vec a, Vec b) { return (Vec)((Mask)a > (Mask)b ? (Mask)a : (Mask)b); };
  const auto magnitude = [](Vec v) { return (Vec)((Mask)v & 0x7fffffff); };
  Vec top = magnitude(row.first(whole, channels - whole));
  for (int64_t i = 0; i < whole; i += kLanes) top = larger_bits(top, magnitude(row.at(i)));
  const float largest = reduce(top, larger_bits)[0];
  if (largest >= kSmallestMax && largest <= __FLT_MAX__) {
    scale = largest / 127.0f;
    return 127.0f / largest;
  }
  scale = largest < kSmallestMax ? 0.0f : __builtin_nanf("");
  return 0.0f;
}

// Quantizes channels [begin, end) of a row to -127..127. `sum` is the sum of the row so far.
template <class Source>
void quantize(const Source& row, float factor, int64_t begin, int64_t end, Quantized* out, Ints& sum) {
  constexpr int kParts = kInt8Group / kLanes;
  int64_t i = begin;
  for (; i + kInt8Group <= end; i += kInt8Group, out += kTileRows * kInt8Group) {
    Ints group[kParts];
    for (int part = 0; part < kParts; ++part) {
      group[part] = round_to_ints(row.at(i + part * kLanes) * factor);
      sum += group[part];
    }
    store_group(out, group);
  }
  if (i < end) {
    Ints group[kParts] = {};
    for (int part = 0; part < kParts && i < end; ++part, i += kLanes) {
      group[part] = round_to_ints(row.first(i, smaller(kLanes, end - i)) * factor);
      sum += group[part];
    }
    store_group(out, group);
  }
}

// Quantizes the rows of a tile, whose sources are given, into out [groups, kTileRows, 16].
template <class Source>
void quantize_tile(const Source* sources, int64_t rows, int64_t channels, Quantized* out, RowState* states) {
  constexpr int64_t kChunk = 256;  // the output of a chunk of all rows stays in the L1 cache
  float factors[kTileRows];
  Ints sums[kTileRows] = {};
  for (int64_t r = 0; r < rows; ++r) factors[r] = factor_of(sources[r], channels, states[r].scale);
  for (int64_t begin = 0; begin < channels; begin += kChunk, out += kChunk * kTileRows) {
    const int64_t end = smaller(begin + kChunk, channels);
    for (int64_t r = 0; r < rows; ++r) {
      if (factors[r] == 0.0f) {  // NaN times 0 is not 0
        const Ints zeros[kInt8Group / kLanes] = {};
        for (int64_t i = 0; i < end - begin; i += kInt8Group) {
          store_group(out + i * kTileRows + r * kInt8Group, zeros);
        }
      } else {
        quantize(sources[r], factors[r], begin, end, out + r * kInt8Group, sums[r]);
      }
    }
  }
  const auto add_ints = [](Vec a, Vec b) { return (Vec)((Ints)a + (Ints)b); };
  for (int64_t r = 0; r < rows; ++r) states[r].start = -128 * ((Ints)reduce((Vec)sums[r], add_ints))[0];
}

inline int64_t row_offset(const TokenRows& rows, int64_t row) {
  return row / rows.rows_per_batch * rows.batch_stride + row % rows.rows_per_batch * rows.row_stride;
}

// Quantizes `rows` rows from number `row` of the input.
template <class T>
void quantize_rows(const Int8Linear& args, int64_t row, int64_t rows, Quantized* out, RowState* states) {
  const T* sources[kTileRows];
  for (int64_t r = 0; r < rows; ++r) {
    sources[r] = reinterpret_cast<const T*>(args.x.data) + row_offset(args.x, row + r);
    states[r].residual = row_offset(args.residual, row + r);
  }
  if (args.norm_weight) {
    NormalizedRow<T> rows_of_x[kTileRows];
    for (int64_t r = 0; r < rows; ++r) rows_of_x[r] = normalized(sources[r], args);
    quantize_tile(rows_of_x, rows, args.in, out, states);
  } else {
    Row<T> rows_of_x[kTileRows];
    for (int64_t r = 0; r < rows; ++r) rows_of_x[r] = {sources[r]};
    quantize_tile(rows_of_x, rows, args.in, out, states);
  }
}

}  // namespace pruneattn::cpu::PRUNEATTN_ISA
