// All code that is compiled once per instruction set. The files isa_*.cpp include this header; setup.py has their
// flags.
#include "attention_kernel.h"
#include "cls_scores_kernel.h"
#include "int8_linear_kernel.h"

#define PRUNEATTN_STRING_OF(x) #x
#define PRUNEATTN_STRING(x) PRUNEATTN_STRING_OF(x)

namespace pruneattn::cpu::PRUNEATTN_ISA {

extern const Isa kIsa;
const Isa kIsa = {
    PRUNEATTN_STRING(PRUNEATTN_ISA), attention_scratch, attention, cls_logits, cls_softmax, int8_scratch, int8_linear};

}  // namespace pruneattn::cpu::PRUNEATTN_ISA
