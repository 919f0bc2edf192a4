// tests/fuzz/stubs/omp.h: one thread. Debian's clang comes without an OpenMP runtime, and fuzzing needs none.
#pragma once
inline int omp_get_max_threads() { return 1; }
inline int omp_get_thread_num() { return 0; }
