// Small kernels for the features and errors of the emulated CUDA runtime; test_emulated_runtime.py runs them.
#include <string>

#include "cuda/launch.h"
#include "cuda/tensor_cores.cuh"

using namespace pruneattn::cuda;

namespace {

// Exchanges numbers between both ends of the block through dynamic shared memory. One thread writes `beyond` bytes
// too far.
__global__ void exchange_kernel(int* data, int bytes, int beyond) {
  int* shared = reinterpret_cast<int*>(dynamic_shared());
  const int i = threadIdx.x, last = blockDim.x - 1;
  data[i] = shared[i];
  shared[i] = i * i;
  if (i == 0 && beyond > 0) dynamic_shared()[bytes + beyond - 1] = 1;
  if (i == 0 && beyond < 0) dynamic_shared()[beyond] = 1;
  __syncthreads();
  data[blockDim.x + i] = shared[last - i];
  if (i == 0) data[2 * blockDim.x] = reinterpret_cast<uintptr_t>(dynamic_shared()) % kDynamicSharedAlignment;
}

// Copies shared memory to data before the block writes to it.
template <int kSize>
__global__ void poison_kernel(int* data) {
  __shared__ int shared[kSize];
  if (threadIdx.x < kSize) data[blockIdx.x * kSize + threadIdx.x] = shared[threadIdx.x];
  if (threadIdx.x < kSize) shared[threadIdx.x] = 1;
}

// Each half of the block uses its own barrier, a different number of times.
__global__ void halves_kernel(int* data) {
  __shared__ int values[128];
  const int i = threadIdx.x, half = i / 64;
  for (int round = 0; round <= half; ++round) {
    values[i] = i + round;
    barrier_sync(1 + half, 64);
    data[i] = values[64 * half + 63 - i % 64];
    barrier_sync(1 + half, 64);
  }
}

__global__ void barrier_kernel(int first, int second) { barrier_sync(1, threadIdx.x < 64 ? first : second); }
__global__ void half_warp_kernel() {
  if (threadIdx.x % 32 < 16) barrier_sync(3, 32);
}
__global__ void divergent_kernel() {
  if (threadIdx.x < 32) __syncthreads();
}

// data[0] counts the threads. data[1 + n] identifies the n-th thread in order of execution.
__global__ void tickets_kernel(int* data) {
  const int ticket = atomicAdd(&data[0], 1);
  data[1 + ticket] = blockIdx.z * 10000 + blockIdx.y * 1000 + blockIdx.x * 100 + threadIdx.x;
}

// data[0..8): the shared memory of two copies, one per group, after a wait that leaves at most `pending` groups.
__global__ void copies_kernel(int* data, int pending, int waits_at_the_end) {
  alignas(16) __shared__ int shared[8];
  if (threadIdx.x > 0) return;
  for (int i = 0; i < 8; ++i) shared[i] = -1;
  for (int i = 0; i < 8; i += 4) {
    copy_async(shared + i, data + 8 + i, true);
    commit_copies();
  }
  if (pending == 0) wait_copies<0>();
  if (pending == 1) wait_copies<1>();
  for (int i = 0; i < 8; ++i) data[i] = shared[i];
  if (waits_at_the_end) wait_copies<0>();
}

// data[i], data[128 + i]: whether thread i has its logit before and after it waits for the product.
__global__ void products_kernel(int* data) {
  int* tiles = reinterpret_cast<int*>(dynamic_shared());
  for (int i = threadIdx.x; i < (kTileRows + 48) * kRowBytes / 4; i += blockDim.x) tiles[i] = 0;
  __syncthreads();
  float logits[24];
  start_logits<Half, 48>(logits, dynamic_shared(), dynamic_shared() + kTileRows * kRowBytes);
  data[threadIdx.x] = logits[5] == 0;
  wait_products(logits);
  data[128 + threadIdx.x] = logits[5] == 0;
}

__global__ void stack_kernel(int* data) {
  volatile float large[16000];
  for (int i = 0; i < 16000; ++i) large[i] = static_cast<float>(i);
  data[threadIdx.x] = static_cast<int>(large[15999 - threadIdx.x]);
}

}  // namespace

// Runs a kernel by name. Returns its error, or "".
extern "C" __attribute__((visibility("default"))) const char* run(const char* kernel, int* data, int a, int b) {
  static std::string error;
  const std::string name = kernel;
  const auto describe = [&] { return name; };
  error.clear();
  try {
    if (name == "exchange") {
      launch(describe, exchange_kernel, {1, 64, static_cast<size_t>(a)}, nullptr, data, a, b);
    } else if (name == "poison") {
      launch(describe, poison_kernel<20>, {3, 32}, nullptr, data);
    } else if (name == "halves") {
      launch(describe, halves_kernel, {1, 128}, nullptr, data);
    } else if (name == "barrier") {
      launch(describe, barrier_kernel, {1, 128}, nullptr, a, b);
    } else if (name == "half_warp") {
      launch(describe, half_warp_kernel, {1, 64}, nullptr);
    } else if (name == "divergent") {
      launch(describe, divergent_kernel, {1, 64}, nullptr);
    } else if (name == "copies") {
      launch(describe, copies_kernel, {1, 32}, nullptr, data, a, b);
    } else if (name == "products") {
      launch(describe, products_kernel, {1, 128, (kTileRows + 48) * kRowBytes}, nullptr, data);
    } else if (name == "stack") {
      launch(describe, stack_kernel, {1, 64}, nullptr, data);
    } else if (name == "tickets") {
      cudaLaunchConfig_t config = {dim3(2, 1, 2), dim3(32), 0, nullptr};
      cudaLaunchKernelEx(&config, tickets_kernel, data);
    } else if (name == "attributes") {
      data[0] = shared_limit(0);
      data[1] = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, 0);
      data[2] = device_attribute(cudaDevAttrComputeCapabilityMajor, 0);
      data[3] = device_attribute(cudaDevAttrComputeCapabilityMinor, 0);
      data[4] = multiprocessors(0);
    } else if (name == "round_up") {
      data[0] = static_cast<int>(__float_as_uint(__fmul_ru(__uint_as_float(a), __uint_as_float(b))));
    } else {
      error = "no such kernel";
    }
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  return error.c_str();
}
