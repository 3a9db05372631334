#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace pruneattn::cpu {

namespace baseline {
extern const Isa kIsa;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Isa kIsa;
}
namespace avx_vnni {
extern const Isa kIsa;
}
namespace avx512 {
extern const Isa kIsa;
}
namespace avx512_vnni {
extern const Isa kIsa;
}
namespace avx512_bf16 {
extern const Isa kIsa;
}
#endif

namespace {

std::vector<const Isa*> find() {
  std::vector<const Isa*> found = {&baseline::kIsa};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto add = [&found](bool supported, const Isa& isa) {
    if (supported) found.insert(found.begin(), &isa);
  };
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  add(avx2, avx2::kIsa);
  add(avx2 && __builtin_cpu_supports("avxvnni"), avx_vnni::kIsa);
  add(avx512, avx512::kIsa);
  add(avx512_vnni, avx512_vnni::kIsa);
  add(avx512_vnni && __builtin_cpu_supports("avx512bf16"), avx512_bf16::kIsa);
#endif
  return found;
}

const std::vector<const Isa*>& available() {
  static const std::vector<const Isa*> found = find();
  return found;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{available().front()};
  return isa;
}

}  // namespace

int64_t Attention::rows_per_unit() const {
  const int64_t eighth = (queries + 7) / 8;
  return eighth <= 96 ? 96 : (eighth + 47) / 48 * 48;
}
int64_t Attention::units_per_head() const { return (queries + rows_per_unit() - 1) / rows_per_unit(); }
int64_t Attention::units() const { return batch * heads * units_per_head(); }

int64_t ClsScores::key_blocks() const { return (tokens + kKeyBlock - 1) / kKeyBlock; }

int64_t Int8Linear::groups() const { return (in + kInt8Group - 1) / kInt8Group; }
int64_t Int8Linear::panels() const { return (out + kInt8Panel - 1) / kInt8Panel; }

const Isa& isa() { return *current(); }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa* isa : available()) names.push_back(isa->name);
  return names;
}

void use_isa(const std::string& name) {
  std::string names;
  for (const Isa* isa : available()) {
    if (isa->name == name) {
      current() = isa;
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(isa->name);
  }
  throw std::invalid_argument("instruction set '" + name + "' is not supported on this machine, choose from: " + names);
}

}  // namespace pruneattn::cpu
