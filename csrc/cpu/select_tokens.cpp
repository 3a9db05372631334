#include <omp.h>

#include <vector>

#include "kernels.h"

namespace pruneattn::cpu {
namespace {

int64_t count_at_least(const uint32_t* keys, int64_t patches, uint32_t bound) {
  int64_t count = 0;
  for (int64_t i = 0; i < patches; ++i) count += keys[i] >= bound;
  return count;
}

// Determines the keep-th largest key from the highest bit down: a bit is set if at least `keep` keys reach the
// resulting value. The scores of a clip are close to each other, so few bits differ and few passes are needed.
// scores: [patches] -> index: [keep]
void select_clip(const float* scores, int64_t patches, int64_t keep, uint32_t* keys, int64_t* index) {
  uint32_t all = 0xffffffffu, any = 0;
  for (int64_t i = 0; i < patches; ++i) {
    keys[i] = score_key(scores[i]);
    all &= keys[i];
    any |= keys[i];
  }
  uint32_t threshold = all;  // invariant: at least `keep` keys reach it
  int64_t above = 0;         // number of keys greater than the final threshold
  for (uint32_t open = all ^ any; open != 0;) {
    uint32_t bit = 0x80000000u;
    while (!(open & bit)) bit >>= 1;
    open ^= bit;
    const int64_t count = count_at_least(keys, patches, threshold | bit);
    if (count >= keep) {
      threshold |= bit;
      if (count == keep) break;
    } else {
      above = count;
    }
  }
  int64_t ties = keep - above;  // number of kept keys that are equal to the threshold: the first of them
  for (int64_t i = 0; i < patches; ++i) {
    if (keys[i] > threshold || (keys[i] == threshold && ties-- > 0)) *index++ = i;
  }
}

}  // namespace

void select_tokens(const float* scores, int64_t batch, int64_t patches, int64_t batch_stride, int64_t keep,
                   int64_t* index, int threads) {
  const int workers = threads_for(3 * batch * patches, threads);
  std::vector<uint32_t> keys(workers * patches);
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
  for (int64_t clip = 0; clip < batch; ++clip) {
    select_clip(scores + clip * batch_stride, patches, keep, keys.data() + omp_get_thread_num() * patches,
                index + clip * keep);
  }
}

}  // namespace pruneattn::cpu
