#if defined(__x86_64__)
#ifndef __AVXVNNI__
#error "compile this file with its flags in setup.py"
#endif
#include "isa_kernels.h"
#endif
