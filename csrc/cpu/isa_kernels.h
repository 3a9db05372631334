// Everything that is compiled once per instruction set; included by the files isa_*.cpp, whose flags setup.py knows.
#include "attention_kernel.h"
#include "class_scores_kernel.h"

#define PRUNEATTN_STRING_OF(x) #x
#define PRUNEATTN_STRING(x) PRUNEATTN_STRING_OF(x)

namespace pruneattn::cpu::PRUNEATTN_ISA {

extern const Isa kIsa;
const Isa kIsa = {PRUNEATTN_STRING(PRUNEATTN_ISA), attention_scratch, attention, class_logits,
                  class_softmax};

}  // namespace pruneattn::cpu::PRUNEATTN_ISA
