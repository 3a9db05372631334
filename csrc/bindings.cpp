// pruneattn._C takes pointers, sizes and strides as integers. It needs no torch to build and does not depend on
// torch's ABI. The ops in Python handle allocation, dtypes and devices. The functions here check arguments and
// release the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "build_config.h"
#include "cpu/kernels.h"
#ifdef PRUNEATTN_CUDA
#include "cuda/kernels.h"
#endif

namespace py = pybind11;
using namespace pruneattn;

namespace {

// (source pointer, destination pointer, batch stride, token stride, row bytes), all strides in bytes
using RowsArgument = std::vector<std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t>>;

RowsList rows_of(const RowsArgument& argument, int64_t extra_tokens) {
  check(!argument.empty() && argument.size() <= kMaxTensors,
        "rows must describe 1.." + std::to_string(kMaxTensors) + " tensors, got " + std::to_string(argument.size()));
  RowsList list = {};
  for (const auto& [src, dst, batch_stride, token_stride, row_bytes] : argument) {
    list.tensor[list.count++] = {reinterpret_cast<const char*>(src), reinterpret_cast<char*>(dst), batch_stride,
                                 token_stride, row_bytes};
  }
  check_rows(list, extra_tokens);
  return list;
}

const float* scores_of(uintptr_t pointer) { return reinterpret_cast<const float*>(pointer); }
int64_t* index_of(uintptr_t pointer) { return reinterpret_cast<int64_t*>(pointer); }

void check_threads(int threads) { check(threads >= 1, "threads must be at least 1, got " + std::to_string(threads)); }

void cpu_select_tokens(uintptr_t scores, int64_t batch, int64_t patches, int64_t batch_stride, int64_t keep,
                       uintptr_t index, int threads) {
  check_selection(batch, patches, keep);
  check_threads(threads);
  cpu::select_tokens(scores_of(scores), batch, patches, batch_stride, keep, index_of(index), threads);
}

void cpu_gather_tokens(uintptr_t index, int64_t batch, int64_t patches, int64_t keep, int64_t extra_tokens,
                       const RowsArgument& rows, int threads) {
  check_selection(batch, patches, keep);
  check_threads(threads);
  cpu::gather_tokens(index_of(index), batch, patches, keep, extra_tokens, rows_of(rows, extra_tokens), threads);
}

void cpu_prune_tokens(uintptr_t scores, int64_t batch, int64_t patches, int64_t batch_stride, int64_t keep,
                      uintptr_t index, int64_t extra_tokens, const RowsArgument& rows, int threads) {
  const RowsList list = rows_of(rows, extra_tokens);
  cpu_select_tokens(scores, batch, patches, batch_stride, keep, index, threads);
  cpu::gather_tokens(index_of(index), batch, patches, keep, extra_tokens, list, threads);
}

// (pointer, batch stride, head stride, token stride), all strides in elements
using HeadsArgument = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

Heads heads_of(const HeadsArgument& argument) {
  const auto& [pointer, batch_stride, head_stride, token_stride] = argument;
  return {reinterpret_cast<char*>(pointer), batch_stride, head_stride, token_stride};
}

Dtype cpu_dtype_of(const std::string& name) {
  check(name == "float32" || name == "bfloat16", "dtype must be float32 or bfloat16, got " + name);
  return name == "float32" ? Dtype::float32 : Dtype::bfloat16;
}

void check_sizes(int64_t batch, int64_t heads, int64_t queries, int64_t tokens, int64_t channels) {
  check(batch >= 0 && heads >= 1 && queries >= 1 && tokens >= 1 && channels >= 1,
        "expected batch >= 0 and heads, queries, tokens and channels >= 1, got " + std::to_string(batch) + ", " +
            std::to_string(heads) + ", " + std::to_string(queries) + ", " + std::to_string(tokens) + ", " +
            std::to_string(channels));
}

void check_extra_tokens(int64_t extra_tokens, int64_t tokens) {
  check(extra_tokens >= 0 && extra_tokens < tokens,
        "extra_tokens must be in 0.." + std::to_string(tokens - 1) + ", got " + std::to_string(extra_tokens));
}

void cpu_attention(const std::string& dtype, int64_t batch, int64_t heads, int64_t queries, int64_t tokens,
                   int64_t channels, const HeadsArgument& q, const HeadsArgument& k, const HeadsArgument& v,
                   const HeadsArgument& out, uintptr_t lse, double scale, int threads) {
  check_sizes(batch, heads, queries, tokens, channels);
  check_threads(threads);
  cpu::attention({cpu_dtype_of(dtype), batch, heads, queries, tokens, channels, heads_of(q), heads_of(k), heads_of(v),
                  heads_of(out), reinterpret_cast<float*>(lse), static_cast<float>(scale), nullptr, 0},
                 threads);
}

void cpu_column_mean_attention(const std::string& dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t channels,
                               const HeadsArgument& q, const HeadsArgument& k, const HeadsArgument& v,
                               const HeadsArgument& out, uintptr_t lse, double scale, int64_t extra_tokens,
                               uintptr_t scores, int threads) {
  check_sizes(batch, heads, tokens, tokens, channels);
  check_extra_tokens(extra_tokens, tokens);
  check_threads(threads);
  cpu::column_mean_attention(
      {cpu_dtype_of(dtype), batch, heads, tokens, tokens, channels, heads_of(q), heads_of(k), heads_of(v),
       heads_of(out), reinterpret_cast<float*>(lse), static_cast<float>(scale), nullptr, 0},
      extra_tokens, reinterpret_cast<float*>(scores), threads);
}

void cpu_cls_scores(const std::string& dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t channels,
                    const HeadsArgument& q, const HeadsArgument& k, double scale, int64_t extra_tokens,
                    uintptr_t scores, int threads) {
  check_sizes(batch, heads, 1, tokens, channels);
  check_extra_tokens(extra_tokens, tokens);
  check_threads(threads);
  cpu::cls_scores({cpu_dtype_of(dtype), batch, heads, tokens, channels, heads_of(q), heads_of(k),
                   static_cast<float>(scale), nullptr},
                  extra_tokens, reinterpret_cast<float*>(scores), threads);
}

// (pointer, rows per batch, batch stride, row stride), all strides in elements
using TokenRowsArgument = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

cpu::TokenRows token_rows_of(const char* name, const TokenRowsArgument& argument) {
  const auto& [pointer, rows_per_batch, batch_stride, row_stride] = argument;
  check(rows_per_batch >= 1,
        std::string(name) + ": expected at least 1 row per batch, got " + std::to_string(rows_per_batch));
  return {reinterpret_cast<char*>(pointer), rows_per_batch, batch_stride, row_stride};
}

void cpu_int8_linear(const std::string& dtype, int64_t rows, int64_t channels, int64_t out, const TokenRowsArgument& x,
                     const TokenRowsArgument& residual, uintptr_t y, uintptr_t weight, uintptr_t scale, uintptr_t bias,
                     uintptr_t norm_weight, uintptr_t norm_bias, double epsilon, bool gelu, int threads) {
  check(rows >= 0 && channels >= 1 && channels <= cpu::kInt8MaxIn && out >= 1,
        "expected rows >= 0, channels in 1.." + std::to_string(cpu::kInt8MaxIn) + " and out >= 1, got " +
            std::to_string(rows) + ", " + std::to_string(channels) + ", " + std::to_string(out));
  check_threads(threads);
  cpu::int8_linear(
      {cpu_dtype_of(dtype), rows, channels, out, token_rows_of("x", x), token_rows_of("residual", residual),
       reinterpret_cast<char*>(y), reinterpret_cast<const uint8_t*>(weight), scores_of(scale), scores_of(bias),
       scores_of(norm_weight), scores_of(norm_bias), static_cast<float>(epsilon), gelu},
      threads);
}

#ifdef PRUNEATTN_CUDA
void check_cuda_selection(int64_t batch, int64_t patches, int64_t keep) {
  check_selection(batch, patches, keep);
  check(patches <= kMaxPatches,
        "patches must be at most " + std::to_string(kMaxPatches) + " on CUDA, got " + std::to_string(patches));
}

cuda::Stream stream_of(uintptr_t stream) { return reinterpret_cast<cuda::Stream>(stream); }

void cuda_select_tokens(uintptr_t scores, int64_t batch, int64_t patches, int64_t batch_stride, int64_t keep,
                        uintptr_t index, int device, uintptr_t stream) {
  check_cuda_selection(batch, patches, keep);
  cuda::select_tokens(scores_of(scores), batch, patches, batch_stride, keep, index_of(index), device,
                      stream_of(stream));
}

void cuda_gather_tokens(uintptr_t index, int64_t batch, int64_t patches, int64_t keep, int64_t extra_tokens,
                        const RowsArgument& rows, int device, uintptr_t stream) {
  check_cuda_selection(batch, patches, keep);
  cuda::gather_tokens(index_of(index), batch, patches, keep, extra_tokens, rows_of(rows, extra_tokens), device,
                      stream_of(stream));
}

void cuda_prune_epilogue(uintptr_t partials, int64_t batch, int64_t partial_rows, int64_t patches, int64_t batch_stride,
                         int64_t row_stride, int64_t keep, uintptr_t scores, uintptr_t index, int64_t extra_tokens,
                         const RowsArgument& rows, int device, uintptr_t stream) {
  check_cuda_selection(batch, patches, keep);
  check(partial_rows >= 1 && partial_rows <= INT32_MAX,
        "partial_rows must be in 1..2147483647, got " + std::to_string(partial_rows));
  cuda::prune_epilogue({scores_of(partials), static_cast<int>(partial_rows), batch_stride, row_stride}, batch, patches,
                       keep, reinterpret_cast<float*>(scores), index_of(index), extra_tokens,
                       rows_of(rows, extra_tokens), device, stream_of(stream));
}

void cuda_prune_tokens(uintptr_t scores, int64_t batch, int64_t patches, int64_t batch_stride, int64_t keep,
                       uintptr_t index, int64_t extra_tokens, const RowsArgument& rows, int device, uintptr_t stream) {
  cuda_prune_epilogue(scores, batch, 1, patches, batch_stride, 0, keep, 0, index, extra_tokens, rows, device, stream);
}

Dtype cuda_dtype_of(const std::string& name) {
  if (name == "float16") return Dtype::float16;
  check(name == "float32" || name == "bfloat16", "dtype must be float32, float16 or bfloat16, got " + name);
  return cpu_dtype_of(name);
}

void cuda_cls_scores(const std::string& dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t channels,
                     const HeadsArgument& q, const HeadsArgument& k, double scale, int64_t extra_tokens,
                     uintptr_t partials, int device, uintptr_t stream) {
  check_sizes(batch, heads, 1, tokens, channels);
  check_extra_tokens(extra_tokens, tokens);
  check(tokens <= kMaxTokens,
        "tokens must be at most " + std::to_string(kMaxTokens) + " on CUDA, got " + std::to_string(tokens));
  cuda::cls_scores(cuda_dtype_of(dtype), batch, heads, tokens, channels, heads_of(q), heads_of(k),
                   static_cast<float>(scale), extra_tokens, reinterpret_cast<float*>(partials), device,
                   stream_of(stream));
}

Heads aligned_heads_of(const char* name, const HeadsArgument& argument) {
  const auto& [pointer, batch_stride, head_stride, token_stride] = argument;
  check(pointer % 16 == 0 && batch_stride % 8 == 0 && head_stride % 8 == 0 && token_stride % 8 == 0,
        std::string(name) + ": pointer and strides must be multiples of 16 bytes");
  return heads_of(argument);
}

void cuda_column_mean_attention(const std::string& dtype, int64_t batch, int64_t heads, int64_t tokens,
                                int64_t channels, const HeadsArgument& q, const HeadsArgument& k,
                                const HeadsArgument& v, const HeadsArgument& out, uintptr_t lse, double scale,
                                int64_t extra_tokens, uintptr_t partials, int parts, int device, uintptr_t stream) {
  check_sizes(batch, heads, tokens, tokens, channels);
  check_extra_tokens(extra_tokens, tokens);
  check(channels == 64, "channels must be 64 on CUDA, got " + std::to_string(channels));
  check(tokens <= cuda::kMaxAttentionTokens, "tokens must be at most " + std::to_string(cuda::kMaxAttentionTokens) +
                                                 " on CUDA, got " + std::to_string(tokens));
  check(dtype == "float16" || dtype == "bfloat16", "dtype must be float16 or bfloat16, got " + dtype);
  check(scale > 0, "scale must be positive on CUDA, got " + std::to_string(scale));
  constexpr double kLog2E = 1.4426950408889634;
  const cuda::Attention attention = {
      aligned_heads_of("q", q), aligned_heads_of("k", k), aligned_heads_of("v", v), aligned_heads_of("out", out),
      reinterpret_cast<float*>(lse),
      // Not 0: the padding's 0 * -Inf would be NaN.
      std::max(static_cast<float>(scale * kLog2E), std::numeric_limits<float>::min()), static_cast<int>(heads),
      static_cast<int>(tokens), static_cast<int>(extra_tokens),
      static_cast<float>(1.0 / (static_cast<double>(heads) * static_cast<double>(tokens - extra_tokens)))};
  cuda::column_mean_attention(cuda_dtype_of(dtype), batch, attention, reinterpret_cast<float*>(partials), parts, device,
                              stream_of(stream));
}
#endif

py::dict build_info() {
  py::dict info;
#ifdef PRUNEATTN_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_architectures"] = PRUNEATTN_CUDA_ARCHITECTURES;
  info["cuda_reason"] = PRUNEATTN_CUDA_REASON;
  info["compiler"] = PRUNEATTN_COMPILER;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of pruneattn; used through pruneattn.ops.";
  m.attr("MAX_PATCHES") = kMaxPatches;
  m.attr("MAX_TOKENS") = kMaxTokens;
  m.def("build_info", &build_info, "How the extension was compiled: cuda, cuda_architectures, cuda_reason, compiler.");

  using py::arg;
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("cpu_select_tokens", &cpu_select_tokens, nogil, arg("scores_ptr"), arg("batch"), arg("patches"),
        arg("batch_stride"), arg("keep"), arg("index_ptr"), arg("threads"),
        "Writes the numbers of the `keep` best patches of each clip, ascending. Strides of scores are in elements.");
  m.def("cpu_gather_tokens", &cpu_gather_tokens, nogil, arg("index_ptr"), arg("batch"), arg("patches"), arg("keep"),
        arg("extra_tokens"), arg("rows"), arg("threads"),
        "Copies the extra tokens and kept rows of 1..4 tensors. Raises IndexError for a patch number out of range.");
  m.def("cpu_prune_tokens", &cpu_prune_tokens, nogil, arg("scores_ptr"), arg("batch"), arg("patches"),
        arg("batch_stride"), arg("keep"), arg("index_ptr"), arg("extra_tokens"), arg("rows"), arg("threads"),
        "Calls cpu_select_tokens, then cpu_gather_tokens.");
  m.def("cpu_attention", &cpu_attention, nogil, arg("dtype"), arg("batch"), arg("heads"), arg("queries"), arg("tokens"),
        arg("channels"), arg("q"), arg("k"), arg("v"), arg("out"), arg("lse_ptr"), arg("scale"), arg("threads"),
        "Computes softmax attention. A tensor is (pointer, batch stride, head stride, token stride), in elements.");
  m.def("cpu_column_mean_attention", &cpu_column_mean_attention, nogil, arg("dtype"), arg("batch"), arg("heads"),
        arg("tokens"), arg("channels"), arg("q"), arg("k"), arg("v"), arg("out"), arg("lse_ptr"), arg("scale"),
        arg("extra_tokens"), arg("scores_ptr"), arg("threads"),
        "Computes cpu_attention and the mean of the softmax matrix over heads and patch rows.");
  m.def("cpu_cls_scores", &cpu_cls_scores, nogil, arg("dtype"), arg("batch"), arg("heads"), arg("tokens"),
        arg("channels"), arg("q"), arg("k"), arg("scale"), arg("extra_tokens"), arg("scores_ptr"), arg("threads"),
        "The class token's row of the softmax matrix, averaged over heads. The token stride of q is not used.");
  m.def("cpu_int8_linear", &cpu_int8_linear, nogil, arg("dtype"), arg("rows"), arg("channels"), arg("out"), arg("x"),
        arg("residual"), arg("y_ptr"), arg("weight_ptr"), arg("scale_ptr"), arg("bias_ptr"), arg("norm_weight_ptr"),
        arg("norm_bias_ptr"), arg("epsilon"), arg("gelu"), arg("threads"),
        "Writes y [rows, out] = act(quantized(norm(x)) weight^T * scale + bias) + residual, where the null pointer "
        "means none. weight: uint8 [out / 32, channels / 16 * 4, 32, 4], rounded up, with an offset of 128.");
  m.def("cpu_isas", &cpu::isas, "The instruction sets that the CPU kernels can use on this machine, best first.");
  m.def("cpu_isa", [] { return std::string(cpu::isa().name); }, "The instruction set in use.");
  m.def("cpu_use_isa", &cpu::use_isa, arg("name"), "Selects an instruction set. Must not be called while kernels run.");
#ifdef PRUNEATTN_CUDA
  m.def("cuda_select_tokens", &cuda_select_tokens, nogil, arg("scores_ptr"), arg("batch"), arg("patches"),
        arg("batch_stride"), arg("keep"), arg("index_ptr"), arg("device"), arg("stream"),
        "cpu_select_tokens on a CUDA stream, for at most MAX_PATCHES patches.");
  m.def("cuda_gather_tokens", &cuda_gather_tokens, nogil, arg("index_ptr"), arg("batch"), arg("patches"), arg("keep"),
        arg("extra_tokens"), arg("rows"), arg("device"), arg("stream"),
        "cpu_gather_tokens on a CUDA stream. A patch number out of range gives a row of zero bytes, not an error.");
  m.def("cuda_prune_tokens", &cuda_prune_tokens, nogil, arg("scores_ptr"), arg("batch"), arg("patches"),
        arg("batch_stride"), arg("keep"), arg("index_ptr"), arg("extra_tokens"), arg("rows"), arg("device"),
        arg("stream"), "cuda_select_tokens and cuda_gather_tokens in one launch.");
  m.def("cuda_prune_epilogue", &cuda_prune_epilogue, nogil, arg("partials_ptr"), arg("batch"), arg("partial_rows"),
        arg("patches"), arg("batch_stride"), arg("row_stride"), arg("keep"), arg("scores_ptr"), arg("index_ptr"),
        arg("extra_tokens"), arg("rows"), arg("device"), arg("stream"),
        "Sums partials [batch, partial_rows, patches] over the rows, in order, into scores [batch, patches] (0: not "
        "written), then prunes by these scores as cuda_prune_tokens does, in the same launch.");
  m.def("cuda_cls_scores", &cuda_cls_scores, nogil, arg("dtype"), arg("batch"), arg("heads"), arg("tokens"),
        arg("channels"), arg("q"), arg("k"), arg("scale"), arg("extra_tokens"), arg("partials_ptr"), arg("device"),
        arg("stream"),
        "Computes the class token's row of each head's softmax matrix, divided by heads: the scores are the sum of "
        "partials [batch, heads, tokens - extra_tokens] over heads. At most MAX_TOKENS tokens. Also takes float16.");
  m.def("cuda_most_tokens", &cuda::most_tokens, arg("device"),
        "The maximum number of tokens that cuda_column_mean_attention takes on this device.");
  m.def("cuda_attention_parts", &cuda::attention_parts, arg("heads"), arg("tokens"), arg("device"),
        "The number of rows of partial column means per head. `heads` counts the heads of all clips.");
  m.def("cuda_column_mean_attention", &cuda_column_mean_attention, nogil, arg("dtype"), arg("batch"), arg("heads"),
        arg("tokens"), arg("channels"), arg("q"), arg("k"), arg("v"), arg("out"), arg("lse_ptr"), arg("scale"),
        arg("extra_tokens"), arg("partials_ptr"), arg("parts"), arg("device"), arg("stream"),
        "cpu_column_mean_attention in half precision, for heads of 64 channels and at most cuda_most_tokens tokens. "
        "The column means are the sum of partials [batch, heads * parts, tokens - extra_tokens] over dimension 1.");
#endif
}
