// Attention with column sums of the softmax matrix, for one instruction set.
//
// The kernel processes a few rows of the softmax matrix at a time, so that they stay in the cache: logits (a
// product), exponentials, column sums, output (a product). One routine computes both products over packed panels.
// Operands consist of 32-bit words: floats, or pairs of bfloat16 for the dot product instruction.
#pragma once

#include "isa.h"
#include "simd.h"

namespace pruneattn::cpu::PRUNEATTN_ISA {

// A tile of kRows x kVecs vectors is accumulated in registers.
constexpr int kRows = 6;
#if defined(__AVX512F__)
constexpr int kVecs = 4;
#else
constexpr int kVecs = 2;
#endif
constexpr int64_t kPanel = kVecs * kLanes;
constexpr int64_t kChain = 192;   // maximum number of products in a chain of additions
constexpr int64_t kLastKeys = 4;  // maximum number of keys after the last whole vector that are multiplied singly
constexpr int64_t kBlockBytes = 48 << 10;  // of logits, which share the L2 cache with the keys and values of a head

// Words are floats. Elements of type T are converted during packing.
template <class T>
struct FloatWords {
  static constexpr int kElements = 1;
  static Vec multiply_add(Vec sum, Vec a, Vec b) { return sum + a * b; }
  static Vec words(const T* p) { return load(p); }
  static Vec first_words(const T* p, int64_t count) { return load_first(p, count); }
};

#if defined(__AVX512BF16__)
// Words are pairs of bfloat16. Products are exact, sums are in float32.
struct PairWords {
  static constexpr int kElements = 2;
  static Vec multiply_add(Vec sum, Vec a, Vec b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
  static Vec words(const bf16* p) { return load(reinterpret_cast<const float*>(p)); }
  static Vec first_words(const bf16* p, int64_t count) {
    bf16 pairs[2 * kLanes] = {};
    std::memcpy(pairs, p, count * sizeof(bf16));
    return words(pairs);
  }
};
#endif

// sum[row][column] += a[row][i] * b[i][column] over begin <= i < end, for Rows rows and Columns vectors of columns.
// a: [Rows, depth] with stride a_stride, b: [depth, Columns * kLanes]
template <class Words, int Rows, int Columns>
inline void add_products(Vec (&sum)[Rows][Columns], const float* a, int64_t a_stride, const float* b, int64_t begin,
                         int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    Vec column[Columns];
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) column[c] = load(b + (i * Columns + c) * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      const Vec row = broadcast(a[r * a_stride + i]);
#pragma GCC unroll 4
      for (int c = 0; c < Columns; ++c) sum[r][c] = Words::multiply_add(sum[r][c], row, column[c]);
    }
  }
}

// The product over i < depth. Long sums are split into chains, so that rounding errors do not grow with the number of
// tokens.
template <class Words, int Rows, int Columns, class Store>
inline void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t depth, const Store& store_vec) {
  Vec sum[Rows][Columns] = {};
  if (depth <= kChain) {
    add_products<Words>(sum, a, a_stride, b, 0, depth);
  } else {
    const int64_t chains = (depth + kChain - 1) / kChain, chain = (depth + chains - 1) / chains;
    for (int64_t begin = 0; begin < depth; begin += chain) {
      Vec part[Rows][Columns] = {};
      add_products<Words>(part, a, a_stride, b, begin, smaller(begin + chain, depth));
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < Columns; ++c) sum[r][c] += part[r][c];
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) store_vec(r, c, sum[r][c]);
  }
}

template <class Words, int Rows = kRows, int Columns = kVecs, class Store>
inline void multiply(int64_t rows, int64_t columns, const float* a, int64_t a_stride, const float* b, int64_t depth,
                     const Store& store_vec) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return multiply<Words, Rows - 1, Columns>(rows, columns, a, a_stride, b, depth, store_vec);
  }
  if constexpr (Columns > 1) {
    if (columns < Columns) return multiply<Words, Rows, Columns - 1>(rows, columns, a, a_stride, b, depth, store_vec);
  }
  multiply_tile<Words, Rows, Columns>(a, a_stride, b, depth, store_vec);
}

template <class T, class Words>
class HeadAttention {
 public:
  HeadAttention(const Attention& args, float* scratch)
      : args_(args),
        words_(round_up(args.channels, Words::kElements) / Words::kElements),
        query_stride_(round_up(words_, kLanes)),
        padded_tokens_(round_up(args.tokens, kLanes)),
        last_keys_(args.tokens > kLanes && args.tokens % kLanes <= kLastKeys ? args.tokens % kLanes : 0),
        panel_tokens_(last_keys_ ? args.tokens - last_keys_ : padded_tokens_),
        value_words_(round_up(args.tokens, Words::kElements) / Words::kElements),
        stride_(padded_stride(args.tokens)),
        block_(block_rows(args)) {
    const auto take = [&](int64_t floats) {
      float* start = scratch ? scratch + size_ : nullptr;
      size_ += round_up(floats, 16);
      return start;
    };
    keys_ = take(panel_tokens_ * words_);
    last_ = take(last_keys_ * query_stride_);
    values_ = take(value_words_ * round_up(args.channels, kLanes));
    queries_ = take(block_ * query_stride_);
    weights_ = take(block_ * stride_);
    pairs_ = Words::kElements == 1 ? weights_ : take(block_ * stride_ / 2);
    sums_ = take(padded_tokens_);
    inverse_ = take(block_);
  }

  // The number of floats of scratch memory.
  size_t size() const { return size_; }

  void run(int64_t first, int64_t last) {
    const int64_t per_head = args_.units_per_head();
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t head = unit / per_head;
      if (unit == first || unit % per_head == 0) {
        pack_keys(at(args_.k, head));
        pack_values(at(args_.v, head));
      }
      const int64_t begin = unit % per_head * args_.rows_per_unit();
      const int64_t end = smaller(begin + args_.rows_per_unit(), args_.queries);
      std::memset(sums_, 0, padded_tokens_ * sizeof(float));
      for (int64_t row = begin; row < end; row += block_) run_block(head, row, smaller(block_, end - row));
      if (args_.column_sums) {
        std::memcpy(args_.column_sums + unit * args_.tokens, sums_, args_.tokens * sizeof(float));
      }
    }
  }

 private:
  // Avoids strides that are multiples of a large power of two, which cause conflict misses in the cache.
  static int64_t padded_stride(int64_t tokens) {
    const int64_t stride = round_up(tokens, 16);
    return stride % 256 == 0 ? stride + 16 : stride;
  }
  static int64_t block_rows(const Attention& args) {
    const int64_t fit = kBlockBytes / (padded_stride(args.tokens) * 4) / kRows * kRows;
    return smaller(larger(fit, kRows), round_up(args.rows_per_unit(), kRows));
  }

  T* at(const Heads& x, int64_t head) const {
    return reinterpret_cast<T*>(x.data) + head / args_.heads * x.batch_stride + head % args_.heads * x.head_stride;
  }

  // The words of a row from `word` on. Words beyond the end are zero.
  Vec row_words(const T* row, int64_t word) const {
    const int64_t element = word * Words::kElements, left = args_.channels - element;
    const T* p = row + element;
    return left >= kLanes * Words::kElements ? Words::words(p) : Words::first_words(p, left);
  }

  // Packs k [N, D] into panels of up to kPanel keys, each [words, keys]. The last few keys stay [keys, words].
  void pack_keys(const T* k) {
    for (int64_t panel = 0; panel < panel_tokens_; panel += kPanel) {
      const int64_t width = smaller(kPanel, panel_tokens_ - panel);
      for (int64_t key = panel; key < panel + width; key += kLanes) {
        for (int64_t word = 0; word < words_; word += kLanes) {
          Vec square[kLanes];
          for (int64_t i = 0; i < kLanes; ++i) {
            square[i] = key + i < args_.tokens ? row_words(k + (key + i) * args_.k.token_stride, word) : Vec{};
          }
          transpose(square);
          float* panel_words = keys_ + panel * words_ + word * width + key - panel;
          for (int64_t i = 0; i < smaller(kLanes, words_ - word); ++i) store(panel_words + i * width, square[i]);
        }
      }
    }
    for (int64_t i = 0; i < last_keys_; ++i) {
      const T* row = k + (panel_tokens_ + i) * args_.k.token_stride;
      for (int64_t word = 0; word < words_; word += kLanes) {
        store(last_ + i * query_stride_ + word, row_words(row, word));
      }
    }
  }

  // Packs v [N, D] into panels of up to kPanel channels, each [words of adjacent tokens, channels].
  void pack_values(const T* v) {
    const int64_t padded = round_up(args_.channels, kLanes);
    for (int64_t panel = 0; panel < padded; panel += kPanel) {
      const int64_t width = smaller(kPanel, padded - panel);
      float* to = values_ + panel * value_words_;
      for (int64_t word = 0; word < value_words_; ++word) {
        const T* row = v + word * Words::kElements * args_.v.token_stride;
        for (int64_t channel = panel; channel < panel + width; channel += kLanes, to += kLanes) {
          store(to, value_word(row, word, channel));
        }
      }
    }
  }
  Vec value_word(const T* row, int64_t word, int64_t channel) const {
    const int64_t left = args_.channels - channel;
    if constexpr (Words::kElements == 1) {
      return left >= kLanes ? load(row + channel) : load_first(row + channel, left);
    } else {
      const auto bits = [&](const T* p) { return (Bits)(left >= kLanes ? load(p) : load_first(p, left)); };
      const bool pair = 2 * word + 1 < args_.tokens;
      const Bits high = pair ? bits(row + args_.v.token_stride + channel) : Bits{};
      return (Vec)(bits(row + channel) >> 16 | high);
    }
  }

  // Packs q [rows, D]. Floats are multiplied by the scale. Pairs are multiplied only by its sign, to avoid rounding.
  void pack_queries(const T* q, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row, q += args_.q.token_stride) {
      for (int64_t word = 0; word < words_; word += kLanes) {
        Vec x = row_words(q, word);
        if constexpr (Words::kElements == 1) {
          x *= args_.scale;
        } else if (args_.scale < 0) {
          x = (Vec)((Bits)x ^ 0x80008000u);
        }
        store(queries_ + row * query_stride_ + word, x);
      }
    }
  }

  // In a packed qkv, the rows of a head are pages apart, and hardware prefetchers do not cross pages.
  void prefetch(const Heads& x, int64_t head, int64_t first, int64_t rows) const {
    const T* row = at(x, head) + first * x.token_stride;
    for (int64_t i = 0; i < rows; ++i, row += x.token_stride) {
      for (int64_t channel = 0; channel < args_.channels; channel += 64 / sizeof(T)) __builtin_prefetch(row + channel);
    }
  }
  void prefetch_next_head(int64_t head, int64_t first, int64_t rows) const {
    if (head + 1 == args_.batch * args_.heads) return;
    prefetch(args_.q, head + 1, first, rows);
    const int64_t keys = smaller(rows, args_.tokens - first);
    prefetch(args_.k, head + 1, first, keys);
    prefetch(args_.v, head + 1, first, keys);
  }

  void run_block(int64_t head, int64_t first, int64_t rows) {
    prefetch_next_head(head, first, rows);
    pack_queries(at(args_.q, head) + first * args_.q.token_stride, rows);
    for (int64_t panel = 0; panel < panel_tokens_; panel += kPanel) {
      const int64_t columns = smaller(kPanel, panel_tokens_ - panel) / kLanes;
      for (int64_t row = 0; row < rows; row += kRows) {
        float* to = weights_ + row * stride_ + panel;
        const auto put = [=](int r, int c, Vec sum) { store(to + r * stride_ + c * kLanes, sum); };
        multiply<Words>(rows - row, columns, queries_ + row * query_stride_, query_stride_, keys_ + panel * words_,
                        words_, put);
      }
    }
    if (last_keys_) {
      for (int64_t row = 0; row < rows; ++row) multiply_last(row);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float lse = exponentiate(row);
      args_.lse[head * args_.queries + first + row] = lse;
      if (args_.column_sums && first + row >= args_.first_scored) add_columns(row);
    }
    const int64_t padded = round_up(args_.channels, kLanes);
    const int64_t pairs_stride = stride_ / Words::kElements;
    T* out = at(args_.out, head) + first * args_.out.token_stride;
    for (int64_t row = 0; row < rows; row += kRows) {
      for (int64_t panel = 0; panel < padded; panel += kPanel) {
        const auto put = [=](int r, int c, Vec sum) {
          const int64_t channel = panel + c * kLanes, left = args_.channels - channel;
          T* to = out + (row + r) * args_.out.token_stride + channel;
          sum *= inverse_[row + r];
          if (left >= kLanes) {
            store(to, sum);
          } else {
            store_first(to, sum, left);
          }
        };
        multiply<Words>(rows - row, smaller(kPanel, padded - panel) / kLanes, pairs_ + row * pairs_stride, pairs_stride,
                        values_ + panel * value_words_, value_words_, put);
      }
    }
  }

  // Computes the logits of the last few keys in the first lanes of a vector.
  void multiply_last(int64_t row) {
    float logits[kLanes] = {};
    for (int64_t i = 0; i < last_keys_; ++i) {
      Vec sum = {};
      for (int64_t word = 0; word < words_; word += kLanes) {
        const Vec query = load(queries_ + row * query_stride_ + word), key = load(last_ + i * query_stride_ + word);
        sum = Words::multiply_add(sum, query, key);
      }
      logits[i] = reduce_sum(sum)[0];
    }
    store(weights_ + row * stride_ + panel_tokens_, load(logits));
  }

  // Replaces logits by exp(logit - maximum). Computes the inverse of their sum. Returns the log-sum-exp of the
  // logits.
  float exponentiate(int64_t row) {
    float* x = weights_ + row * stride_;
    const int64_t last = padded_tokens_ - kLanes;
    if (args_.tokens < padded_tokens_) store(x + last, load(x + last) + padding());
    Vec lane_max = load(x + last);
    for (int64_t i = 0; i < last; i += kLanes) lane_max = max(lane_max, load(x + i));
    const Vec largest = reduce_max(lane_max);
    float scale = 1.0f;
    if constexpr (Words::kElements == 2) {
      scale = args_.scale < 0 ? -args_.scale : args_.scale;
      if (scale < 0x1p-126f) scale = 0x1p-126f;  // with a scale of 0, the padding's 0 * -Inf would be NaN
    }
    const float slope = scale * 1.44269504f;  // log2(e)
    Vec sum = {};
    for (int64_t begin = 0; begin < padded_tokens_; begin += kChain * kLanes) {
      const int64_t end = smaller(begin + kChain * kLanes, padded_tokens_);
      Vec part = {};
      for (int64_t i = begin; i < end; i += kLanes) {
        // Subtracts before it scales: otherwise the largest weight of large logits would be inexact.
        const Vec weight = exp2_of_nonpositive((load(x + i) - largest) * slope);
        part += weight;
        store(x + i, weight);
        if constexpr (Words::kElements == 2) store(reinterpret_cast<bf16*>(pairs_) + row * stride_ + i, weight);
      }
      sum += part;
    }
    const float total = reduce_sum(sum)[0];
    inverse_[row] = 1.0f / total;
    return __builtin_log2f(total) * 0.693147181f + largest[0] * scale;  // ln(2)
  }

  void add_columns(int64_t row) {
    const float* x = weights_ + row * stride_;
    const Vec inverse = broadcast(inverse_[row]);
    for (int64_t i = 0; i < padded_tokens_; i += kLanes) store(sums_ + i, load(sums_ + i) + load(x + i) * inverse);
  }

  // The addend for the last logits of a row: -Inf for padding.
  Vec padding() const {
    float lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      lanes[i] = padded_tokens_ - kLanes + i < args_.tokens ? 0.0f : -__builtin_inff();
    }
    return load(lanes);
  }

  const Attention& args_;
  const int64_t words_, query_stride_, padded_tokens_, last_keys_, panel_tokens_, value_words_, stride_, block_;
  float *keys_, *last_, *values_, *queries_, *weights_, *pairs_, *sums_, *inverse_;
  int64_t size_ = 0;
};

#if defined(__AVX512BF16__)
using Bf16Attention = HeadAttention<bf16, PairWords>;
#else
using Bf16Attention = HeadAttention<bf16, FloatWords<bf16>>;
#endif

inline size_t attention_scratch(const Attention& args) {
  if (args.dtype == Dtype::bfloat16) return Bf16Attention(args, nullptr).size();
  return HeadAttention<float, FloatWords<float>>(args, nullptr).size();
}

inline void attention(const Attention& args, int64_t first, int64_t last, float* scratch) {
  if (args.dtype == Dtype::bfloat16) return Bf16Attention(args, scratch).run(first, last);
  HeadAttention<float, FloatWords<float>>(args, scratch).run(first, last);
}

}  // namespace pruneattn::cpu::PRUNEATTN_ISA
