#if defined(__x86_64__)
#ifndef __AVX512VNNI__
#error "compile this file with its flags in setup.py"
#endif
#include "isa_kernels.h"
#endif
