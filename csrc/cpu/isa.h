// The attention kernels, compiled once per instruction set and chosen at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../tokens.h"

namespace pruneattn::cpu {

struct Attention {
  Dtype dtype;
  int64_t batch, heads, queries, tokens, channels;
  Heads q, k, v, out;
  float* lse;  // log of the sum of exp(logit): [B, H, queries]
  float scale;
  // Column sums of the softmax matrix over each unit's rows from `first_scored` on: [B, H, units of a head, N];
  // null: not wanted.
  float* column_sums;
  int64_t first_scored;

  // The rows of one head are shared out in units, whose size depends on nothing but the shape, so that the sums are
  // added up in the same order whatever the threads. At most 8 a head: their sums stay small beside q, k and v.
  // (Defined in isa.cpp: an inline function could end up with one set's instructions.)
  int64_t rows_per_unit() const;
  int64_t units_per_head() const;
  int64_t units() const;
};

constexpr int64_t kKeyBlock = 16;

struct ClassScores {
  Dtype dtype;
  int64_t batch, heads, tokens, channels;
  Heads q, k;     // of q, token_stride is not used
  float scale;
  float* weights;  // the class token's row of the softmax matrix: [B, H, N]

  int64_t key_blocks() const;
};

struct Isa {
  const char* name;
  // Floats of scratch memory that a thread needs.
  size_t (*attention_scratch)(const Attention&);
  // Units [first, last) of the work. `scratch` is aligned to 64 bytes.
  void (*attention)(const Attention&, int64_t first, int64_t last, float* scratch);
  // Logits (times log2(e)) into the weights: blocks [first, last) of batch * key_blocks().
  void (*class_logits)(const ClassScores&, int64_t first, int64_t last);
  // Their softmax in place: heads [first, last) of batch * heads.
  void (*class_softmax)(const ClassScores&, int64_t first, int64_t last);
};

// The instruction sets that this machine has, the best one first, and the one in use.
std::vector<std::string> isas();
const Isa& isa();
// Throws std::invalid_argument for one that this machine lacks. Not while kernels run.
void use_isa(const std::string& name);

}  // namespace pruneattn::cpu
