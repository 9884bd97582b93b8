// Code that a CPU op and a CUDA kernel share is marked CONVINIT_HD: nvcc compiles it for both.
#pragma once

#if defined(__CUDACC__)
#define CONVINIT_HD __host__ __device__
#else
#define CONVINIT_HD
#endif

namespace convinit {

// std::clamp is no device function, and its relatives are none in every CUDA version.
CONVINIT_HD inline double clamp(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

}  // namespace convinit
