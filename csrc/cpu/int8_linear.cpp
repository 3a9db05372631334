#include "int8_linear.h"

#include <omp.h>

#include <algorithm>

#include "kernels.h"
#include "scratch.h"

namespace pruneattn::cpu {
namespace {

// The number of groups into which the threads divide the rows. Each group divides the output channels.
int row_groups(const Int8Linear& args, int threads) {
  constexpr int64_t kFewRows = 16;  // fewer rows take as long, because the weight must be read
  constexpr int64_t kQuantize = 4;  // quantizing a row takes as long as this many panels of its output
  const auto share = [](int64_t whole, int64_t parts) { return (whole + parts - 1) / parts; };
  int best = 1;
  int64_t best_time = INT64_MAX;
  for (int groups = 1; groups <= threads; ++groups) {
    const int64_t rows = std::max(share(args.rows, groups), kFewRows);
    const int64_t time = rows * (share(args.panels(), threads / groups) + kQuantize);
    if (time < best_time) {
      best = groups;
      best_time = time;
    }
  }
  return best;
}

}  // namespace

void int8_linear(const Int8Linear& args, int threads) {
  const Isa& kernels = isa();
  const int64_t weights = args.panels() * kInt8Panel * args.groups() * kInt8Group;
  const int workers = threads_for(weights * std::max<int64_t>(args.rows, 8) / 200, threads);
  const size_t per_thread = (kernels.int8_scratch(args) + 63) / 64 * 64;
  char* scratch = scratch_memory(workers * per_thread);
#pragma omp parallel num_threads(workers) if (workers > 1)
  {
    const int count = omp_get_num_threads(), thread = omp_get_thread_num();
    const int groups = row_groups(args, count), columns = count / groups;
    const int64_t row_part = thread / columns, column_part = thread % columns;
    if (row_part < groups) {
      kernels.int8_linear(args, args.rows * row_part / groups, args.rows * (row_part + 1) / groups,
                          args.panels() * column_part / columns, args.panels() * (column_part + 1) / columns,
                          scratch + thread * per_thread);
    }
  }
}

}  // namespace pruneattn::cpu
