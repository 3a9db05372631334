// Linear layers with 8-bit weights, for one instruction set.
//
// A block of rows is quantized into a buffer in the cache. Its products with each panel of the weight are accumulated
// in registers, a tile at a time. The weight is stored with an offset of 128, because the dot product instruction
// multiplies unsigned by signed numbers. The start value of each sum removes the offset: it is -128 times the sum of
// the quantized row. The sums are exact, so all instruction sets give the same.
#pragma once

#include "int8_quantize_kernel.h"

namespace pruneattn::cpu::PRUNEATTN_ISA {

constexpr int kTileColumns = 2 * kLanes;
constexpr int64_t kQuantizedBytes = 384 << 10;  // of a block of rows, which stays in the L2 cache
constexpr int64_t kMostTiles = 8;               // in a block of rows

#if PRUNEATTN_DOT_PRODUCTS
// sums[i] += the dot product of 4 weights and 4 quantized numbers.
inline void add_products(Ints& sums, Ints weights, Ints inputs) {
#if defined(__AVX512VNNI__)
  sums = (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, (__m512i)inputs);
#else
  sums = (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)weights, (__m256i)inputs);
#endif
}

template <int Rows>
void add_quad(Ints (&sums)[Rows][2], const uint8_t* weight, const Quantized* x) {
  const Ints weights[2] = {load_ints(weight), load_ints(weight + 4 * kLanes)};
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    int32_t four;
    std::memcpy(&four, x + r * kInt8Group, sizeof four);
    const Ints inputs = broadcast_int(four);
    add_products(sums[r][0], weights[0], inputs);
    add_products(sums[r][1], weights[1], inputs);
  }
}

#else
// sums[i] += the dot product of 2 pairs.
inline Ints add_pairs(Ints sums, Ints weights, Ints inputs) {
#if defined(__AVX512F__)
  return sums + (Ints)_mm512_madd_epi16((__m512i)weights, (__m512i)inputs);
#elif defined(__AVX2__)
  return sums + (Ints)_mm256_madd_epi16((__m256i)weights, (__m256i)inputs);
#elif defined(__SSE2__)
  return sums + (Ints)_mm_madd_epi16((__m128i)weights, (__m128i)inputs);
#else
  return sums + (weights & 0xffff) * ((Ints)((Bits)inputs << 16) >> 16) + (weights >> 16) * (inputs >> 16);
#endif
}

// Makes the compiler compute the sum here. It would reorder the additions, and run out of registers.
inline void compute([[maybe_unused]] Ints& sums) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(sums));
#elif defined(__SSE2__)
  __asm__("" : "+x"(sums));
#endif
}

template <int Rows>
void add_quad(Ints (&sums)[Rows][2], const uint8_t* weight, const Quantized* x) {
  const Ints weights[2] = {load_ints(weight), load_ints(weight + 4 * kLanes)};
  const Ints even[2] = {weights[0] & 0x00ff00ff, weights[1] & 0x00ff00ff};
  const Ints odd[2] = {(Ints)((Bits)weights[0] >> 8) & 0x00ff00ff, (Ints)((Bits)weights[1] >> 8) & 0x00ff00ff};
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    int32_t first, second;
    std::memcpy(&first, x + r * kInt8Group, sizeof first);
    std::memcpy(&second, x + r * kInt8Group + 2, sizeof second);
    const Ints pairs[2] = {broadcast_int(first), broadcast_int(second)};
    sums[r][0] = add_pairs(add_pairs(sums[r][0], even[0], pairs[0]), odd[0], pairs[1]);
    sums[r][1] = add_pairs(add_pairs(sums[r][1], even[1], pairs[0]), odd[1], pairs[1]);
    compute(sums[r][0]);
    compute(sums[r][1]);
  }
}
#endif

// x: [groups, kTileRows, 16], weight: [4 * groups, kInt8Panel, 4] -> sums [Rows, kTileColumns]
template <int Rows>
void multiply(const Quantized* x, const uint8_t* weight, int64_t groups, const int32_t* start, int32_t* out) {
  Ints sums[Rows][2];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) sums[r][0] = sums[r][1] = broadcast_int(start[r]);
  for (int64_t group = 0; group < groups; ++group) {
#pragma GCC unroll 4
    for (int quad = 0; quad < 4; ++quad) {
      add_quad<Rows>(sums, weight, x + 4 * quad);
      weight += 4 * kInt8Panel;
    }
    x += kTileRows * kInt8Group;
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    store_ints(out + r * kTileColumns, sums[r][0]);
    store_ints(out + r * kTileColumns + kLanes, sums[r][1]);
  }
}

template <int Rows = kTileRows>
void multiply_rows(int64_t rows, const Quantized* x, const uint8_t* weight, int64_t groups, const int32_t* start,
                   int32_t* out) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return multiply_rows<Rows - 1>(rows, x, weight, groups, start, out);
  }
  multiply<Rows>(x, weight, groups, start, out);
}

// x times the distribution function of the normal distribution, which is 0.5 + x * polynomial(x^2) for |x| < 5.
// Absolute error below 5e-7 * |x|. The polynomial is slightly too steep, so that the results beyond are 0 and x.
inline Vec gelu(Vec x) {
  const Vec inside = min(max(x, broadcast(-5.0f)), broadcast(5.0f));
  const Vec s = inside * inside * 0x1.47ae14p-4f - 1.0f;  // in [-1, 1]
  Vec p = broadcast(0x1.3f2604p-11f);
  p = p * s + broadcast(-0x1.a6e86cp-10f);
  p = p * s + broadcast(0x1.c39f26p-10f);
  p = p * s + broadcast(-0x1.6000f8p-9f);
  p = p * s + broadcast(0x1.a41e8ap-8f);
  p = p * s + broadcast(-0x1.6dd54ap-7f);
  p = p * s + broadcast(0x1.0cbbbap-6f);
  p = p * s + broadcast(-0x1.7d3bd4p-6f);
  p = p * s + broadcast(0x1.019308p-5f);
  p = p * s + broadcast(-0x1.4b4e5p-5f);
  p = p * s + broadcast(0x1.a60e64p-5f);
  p = p * s + broadcast(-0x1.1fef02p-4f);
  p = p * s + broadcast(0x1.21835cp-3f);
  return x * max(inside * p + 0.5f, Vec{});
}

// Writes the results of a tile: rows from `row`, channels from `column`.
template <class T, bool Gelu>
void finish(const Int8Linear& args, int64_t row, int64_t rows, int64_t column, const RowState* states,
            const int32_t* sums) {
  for (int64_t c = 0; c < kTileColumns; c += kLanes, column += kLanes) {
    const int64_t count = args.out - column;
    if (count <= 0) break;
    const auto get = [count](const auto* p) { return count >= kLanes ? load(p) : load_first(p, count); };
    const Vec scale = get(args.scale + column), bias = args.bias ? get(args.bias + column) : Vec{};
    const T* residual = reinterpret_cast<const T*>(args.residual.data);
    T* y = reinterpret_cast<T*>(args.y) + row * args.out + column;
    for (int64_t r = 0; r < rows; ++r, y += args.out) {
      Vec v = to_floats(load_ints(sums + r * kTileColumns + c)) * scale * states[r].scale + bias;
      if constexpr (Gelu) v = gelu(v);
      if (residual) v += get(residual + states[r].residual + column);
      count >= kLanes ? store(y, v) : store_first(y, v, count);
    }
  }
}

inline int64_t int8_block_rows(const Int8Linear& args) {
  const int64_t row_bytes = args.groups() * kInt8Group * static_cast<int64_t>(sizeof(Quantized));
  return larger(1, smaller(kMostTiles, kQuantizedBytes / (row_bytes * kTileRows))) * kTileRows;
}

// Scratch: the states of a block's rows, then the quantized rows [tiles, groups, kTileRows, 16].
inline size_t int8_scratch(const Int8Linear& args) {
  const int64_t rows = int8_block_rows(args), header = round_up(rows * sizeof(RowState), 64);
  return header + rows * args.groups() * kInt8Group * sizeof(Quantized);
}

template <class T, bool Gelu>
void int8_linear_of(const Int8Linear& args, int64_t first_row, int64_t last_row, int64_t first_panel,
                    int64_t last_panel, char* scratch) {
  const int64_t block_rows = int8_block_rows(args), groups = args.groups();
  RowState* states = reinterpret_cast<RowState*>(scratch);
  Quantized* quantized = reinterpret_cast<Quantized*>(scratch + round_up(block_rows * sizeof(RowState), 64));
  const int64_t tile_size = groups * kTileRows * kInt8Group;
  for (int64_t begin = first_row; begin < last_row; begin += block_rows) {
    const int64_t rows = smaller(block_rows, last_row - begin);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      quantize_rows<T>(args, begin + r, smaller(kTileRows, rows - r), quantized + r / kTileRows * tile_size,
                       states + r);
    }
    const int64_t last_column = smaller(last_panel * kInt8Panel, args.out);
    for (int64_t column = first_panel * kInt8Panel; column < last_column; column += kTileColumns) {
      const int64_t panel = column / kInt8Panel;
      const uint8_t* weight = args.weight + panel * kInt8Panel * groups * kInt8Group + column % kInt8Panel * 4;
      for (int64_t r = 0; r < rows; r += kTileRows) {
        alignas(64) int32_t sums[kTileRows * kTileColumns];
        const int64_t count = smaller(kTileRows, rows - r);
        int32_t start[kTileRows];
        for (int64_t i = 0; i < count; ++i) start[i] = states[r + i].start;
        multiply_rows(count, quantized + r / kTileRows * tile_size, weight, groups, start, sums);
        finish<T, Gelu>(args, begin + r, count, column, states + r, sums);
      }
    }
  }
}

inline void int8_linear(const Int8Linear& args, int64_t first_row, int64_t last_row, int64_t first_panel,
                        int64_t last_panel, char* scratch) {
  const auto run = args.dtype == Dtype::bfloat16
                       ? (args.gelu ? int8_linear_of<bf16, true> : int8_linear_of<bf16, false>)
                       : (args.gelu ? int8_linear_of<float, true> : int8_linear_of<float, false>);
  run(args, first_row, last_row, first_panel, last_panel, scratch);
}

}  // namespace pruneattn::cpu::PRUNEATTN_ISA
