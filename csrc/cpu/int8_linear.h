// Linear layers with 8-bit weights. Each row of the input is quantized to 8 bits with its own scale.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../tokens.h"

namespace pruneattn::cpu {

constexpr int64_t kInt8Panel = 32;      // output channels that are next to each other in the packed weight
constexpr int64_t kInt8Group = 16;      // input channels are padded to a multiple of this
constexpr int64_t kInt8MaxIn = 131072;  // the sum of this many products fits into 32 bits

// The rows of a [batch, rows_per_batch, channels] tensor: strides in elements, channels contiguous.
struct TokenRows {
  char* data;
  int64_t rows_per_batch, batch_stride, row_stride;
};

// y = act(quantized(norm(x)) weight^T * scales + bias) + residual
struct Int8Linear {
  Dtype dtype;               // of x, residual and y
  int64_t rows, in, out;     // of all batches; input and output channels
  TokenRows x, residual;     // residual.data can be null
  char* y;                   // [rows, out]
  const uint8_t* weight;     // 128 more than the quantized weight: [out / kInt8Panel, in / 4, kInt8Panel, 4]
  const float* scale;        // [out]
  const float* bias;         // [out], can be null
  const float* norm_weight;  // of a layer norm before the quantization: [in], can be null
  const float* norm_bias;    // [in]
  float epsilon;             // of the layer norm
  bool gelu;

  int64_t groups() const;  // of input channels
  int64_t panels() const;  // of output channels
};

}  // namespace pruneattn::cpu
