// Attention kernels are compiled for several instruction sets, and the best that the CPU has is taken.
#pragma once

#include "bfloat16_pairs.h"
#include "cpu.h"

// CONVINIT_EACH_INSTRUCTION_SET(X) is X(name, width of a vector in floats, factor of products, mark of a function);
// CONVINIT_EACH_VECTOR_WIDTH(X) leaves out what differs in products alone.
#if defined(__x86_64__)
#define CONVINIT_EACH_VECTOR_WIDTH(X)                    \
  X(baseline, 4, float, )                                \
  X(avx2, 8, float, __attribute__((target("avx2,fma")))) \
  X(avx512, 16, float, __attribute__((target("avx512f"))))
#else
#define CONVINIT_EACH_VECTOR_WIDTH(X) X(baseline, 4, float, )
#endif
#if defined(CONVINIT_BFLOAT16_PAIRS)
#define CONVINIT_EACH_INSTRUCTION_SET(X) \
  CONVINIT_EACH_VECTOR_WIDTH(X)          \
  X(avx512_bf16, 16, Pair, __attribute__((target("avx512f,avx512bw,avx512bf16"))))
#else
#define CONVINIT_EACH_INSTRUCTION_SET(X) CONVINIT_EACH_VECTOR_WIDTH(X)
#endif

namespace convinit {

#define CONVINIT_NAME(set, width, T, mark) set,
enum class InstructionSet { CONVINIT_EACH_INSTRUCTION_SET(CONVINIT_NAME) };
#undef CONVINIT_NAME

// For bfloat16 numbers, which some CPUs can multiply as they are, or for others.
inline InstructionSet best_instruction_set([[maybe_unused]] bool bfloat16) {
  [[maybe_unused]] static const int width = vector_width();
#if defined(CONVINIT_BFLOAT16_PAIRS)
  static const bool pairs = width == 16 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
  if (pairs && bfloat16) return InstructionSet::avx512_bf16;
#endif
#if defined(__x86_64__)
  if (width == 16) return InstructionSet::avx512;
  if (width == 8) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

}  // namespace convinit
