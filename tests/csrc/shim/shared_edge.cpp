// Linked twice, as shim_shared_begin before the kernels and as shim_shared_end after them: the linker lays variables of
// a thread out in the order of the files, so that all __shared__ variables lie between the two. (A section of their own
// would not do: g++ ignores it in templates.)
__attribute__((visibility("hidden"))) __thread char SHIM_EDGE[1];
