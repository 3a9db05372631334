#include "isa_kernels.h"
