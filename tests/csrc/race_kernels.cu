// Kernels with and without data races; test_race.py runs them.
#include <string>

#include "cuda/device.cuh"
#include "cuda/launch.h"

using namespace pruneattn::cuda;

namespace {

// Each thread reads the number of thread `threadIdx.x ^ other`.
enum class Barrier { none, warp, block, half };

template <Barrier kBarrier>
__device__ void wait() {
  if (kBarrier == Barrier::warp) __syncwarp();
  if (kBarrier == Barrier::block) __syncthreads();
  if (kBarrier == Barrier::half) barrier_sync(1 + threadIdx.x / 64, 64);
}

template <Barrier kBarrier>
__global__ void write_read_kernel(int* data, int other) {
  int* shared = reinterpret_cast<int*>(dynamic_shared());
  shared[threadIdx.x] = threadIdx.x;
  wait<kBarrier>();
  data[threadIdx.x] = shared[threadIdx.x ^ other];
}

// The write of the second round must follow the reads of the first round.
template <bool kBarrier>
__global__ void read_write_kernel(int* data) {
  __shared__ unsigned short value;
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) value = round;
    __syncthreads();
    data[threadIdx.x] += value;
    if (kBarrier) __syncthreads();
  }
}

// A warp shuffle needs no barrier for its values, but it does not order memory accesses.
template <bool kMemory>
__global__ void exchange_kernel(int* data) {
  __shared__ int shared[32];
  shared[threadIdx.x] = threadIdx.x;
  const int next = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x), threadIdx.x + 1);
  data[threadIdx.x] = kMemory ? shared[next] : next;
}

// Threads write different bytes of the same words.
__global__ void bytes_kernel(int* data) {
  reinterpret_cast<unsigned char*>(data)[blockIdx.x * blockDim.x + threadIdx.x] = threadIdx.x;
}

__global__ void same_place_kernel(int* data) { data[threadIdx.x] = threadIdx.x; }

// Each block writes a part of data. The last block sums one number of each part.
template <bool kFenceBefore, bool kFenceAfter, bool kBarrier>
__global__ void last_block_kernel(int* data, unsigned* done) {
  __shared__ bool last;
  int* parts = data + 1;
  parts[blockIdx.x * blockDim.x + threadIdx.x] = 1 + threadIdx.x;
  if (kBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    if (kFenceBefore) __threadfence();
    last = atomicAdd(done, 1u) == gridDim.x - 1;
    if (kFenceAfter) __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == blockDim.x - 1) {
    int sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b * blockDim.x + 5];
    data[0] = sum;
  }
}

// The same, with a fence in all threads before the barrier.
__global__ void all_fence_kernel(int* data, unsigned* done) {
  __shared__ bool last;
  int* parts = data + 1;
  parts[blockIdx.x * blockDim.x + threadIdx.x] = 1 + threadIdx.x;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(done, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 0) data[0] = parts[5] + parts[(gridDim.x - 1) * blockDim.x + 5];
}

// An atomic operation and a plain access to the same number.
__global__ void plain_count_kernel(unsigned* done) {
  if (threadIdx.x == 0) ++*done;
  if (threadIdx.x == 1) atomicAdd(done, 1u);
}

}  // namespace

// Runs a kernel by name. Returns its error, or "". `data` holds 1024 zeros.
extern "C" __attribute__((visibility("default"))) const char* run(const char* kernel, int* data) {
  static std::string error;
  const std::string name = kernel;
  unsigned done = 0;
  const auto go = [&](const char* which, auto function, const Grid& grid, auto... arguments) {
    if (name == which) launch([&] { return name; }, function, grid, nullptr, arguments...);
  };
  error.clear();
  try {
    go("none", write_read_kernel<Barrier::none>, {1, 128, 512}, data, 1);
    go("own", write_read_kernel<Barrier::none>, {1, 128, 512}, data, 0);
    go("warp, in it", write_read_kernel<Barrier::warp>, {1, 128, 512}, data, 31);
    go("warp, beyond it", write_read_kernel<Barrier::warp>, {1, 128, 512}, data, 32);
    go("half, in it", write_read_kernel<Barrier::half>, {1, 128, 512}, data, 63);
    go("half, beyond it", write_read_kernel<Barrier::half>, {1, 128, 512}, data, 64);
    go("block", write_read_kernel<Barrier::block>, {1, 128, 512}, data, 127);
    go("read then write", read_write_kernel<false>, {1, 64}, data);
    go("read then write, barrier", read_write_kernel<true>, {1, 64}, data);
    go("exchange", exchange_kernel<false>, {1, 32}, data);
    go("exchange, memory", exchange_kernel<true>, {1, 32}, data);
    go("bytes", bytes_kernel, {3, 64}, data);
    go("same place", same_place_kernel, {2, 32}, data);
    go("last block", last_block_kernel<true, true, true>, {7, 64}, data, &done);
    go("last block, no fence before", last_block_kernel<false, true, true>, {7, 64}, data, &done);
    go("last block, no fence after", last_block_kernel<true, false, true>, {7, 64}, data, &done);
    go("last block, no barrier", last_block_kernel<true, true, false>, {7, 64}, data, &done);
    go("last block, all fence", all_fence_kernel, {7, 64}, data, &done);
    go("plain count", plain_count_kernel, {1, 32}, &done);
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  return error.c_str();
}
