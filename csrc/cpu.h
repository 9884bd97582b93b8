// Which of the instruction sets that kernels are compiled for this CPU has.
#pragma once

#include <cstdlib>
#include <cstring>

namespace convinit {

// The floats in its widest vector: 16 with AVX-512, 8 with AVX2 and FMA, else 4. ATEN_CPU_CAPABILITY ("default",
// "avx2"), which keeps torch's own kernels from the newer ones, holds here too.
inline int vector_width() {
#if defined(__x86_64__)
  const char* set = std::getenv("ATEN_CPU_CAPABILITY");
  const bool any = set == nullptr || (std::strcmp(set, "default") != 0 && std::strcmp(set, "avx2") != 0);
  if (any && __builtin_cpu_supports("avx512f")) return 16;
  const bool avx2 = any || std::strcmp(set, "avx2") == 0;
  if (avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
  return 4;
}

}  // namespace convinit
