// Linked twice: as emulated_shared_begin before the kernels and as emulated_shared_end after them. The linker places
// thread-local variables in the order of the files, so all __shared__ variables are between the two. (A dedicated
// section would not work: g++ ignores section attributes in templates.)
__attribute__((visibility("hidden"))) __thread char EMULATED_EDGE[1];
