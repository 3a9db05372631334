// The attention and matrix kernels, which are compiled once per instruction set and chosen at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../tokens.h"
#include "int8_linear.h"

namespace pruneattn::cpu {

struct Attention {
  Dtype dtype;
  int64_t batch, heads, queries, tokens, channels;
  Heads q, k, v, out;  // [B, H, queries or N, D]
  float* lse;          // log of the sum of exp(logit): [B, H, queries]
  float scale;
  // Column sums of the softmax matrix over the rows of each unit, without rows before `first_scored`:
  // [B, H, units per head, N]. Not computed if null.
  float* column_sums;
  int64_t first_scored;

  // The rows of a head are divided into units. The unit size depends only on the shape, so that the order of
  // summation does not depend on the number of threads. At most 8 units per head keep the sums small compared with q,
  // k and v. These functions are defined in isa.cpp, because the linker could choose an inline copy with unsupported
  // instructions.
  int64_t rows_per_unit() const;
  int64_t units_per_head() const;
  int64_t units() const;
};

constexpr int64_t kKeyBlock = 16;

struct ClsScores {
  Dtype dtype;
  int64_t batch, heads, tokens, channels;
  Heads q, k;  // q.token_stride is not used
  float scale;
  float* weights;  // the class token's row of the softmax matrix: [B, H, N]

  int64_t key_blocks() const;
};

struct Isa {
  const char* name;
  // The number of floats of scratch memory per thread.
  size_t (*attention_scratch)(const Attention&);
  // Computes units [first, last). `scratch` must be aligned to 64 bytes.
  void (*attention)(const Attention&, int64_t first, int64_t last, float* scratch);
  // Writes the logits, times log2(e), to the weights: blocks [first, last) of batch * key_blocks().
  void (*cls_logits)(const ClsScores&, int64_t first, int64_t last);
  // Computes the softmax of the weights in place: heads [first, last) of batch * heads.
  void (*cls_softmax)(const ClsScores&, int64_t first, int64_t last);
  // The number of bytes of scratch memory per thread.
  size_t (*int8_scratch)(const Int8Linear&);
  // Computes rows [first_row, last_row) of output panels [first_panel, last_panel). `scratch` must be aligned to 64
  // bytes.
  void (*int8_linear)(const Int8Linear&, int64_t first_row, int64_t last_row, int64_t first_panel, int64_t last_panel,
                      char* scratch);
};

// The instruction sets that this machine supports, best first, and the instruction set in use.
std::vector<std::string> isas();
const Isa& isa();
// Throws std::invalid_argument for an unsupported instruction set. Must not be called while kernels run.
void use_isa(const std::string& name);

}  // namespace pruneattn::cpu
