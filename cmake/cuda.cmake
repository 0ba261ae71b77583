# The CUDA toolchain: one program for every card from compute capability 8.0. 90a: Hopper's own
# instructions (wgmma); the PTX of 120 is for cards that come later, that of 80 for the rest.
set(MAMBA3_CUDA_ARCHITECTURES "" CACHE STRING
  "GPU architectures to build for, as CMAKE_CUDA_ARCHITECTURES; empty: all from 80")
if(MAMBA3_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES ${MAMBA3_CUDA_ARCHITECTURES})
else()
  set(CMAKE_CUDA_ARCHITECTURES 80 86-real 89-real 90a-real 100-real 120)
endif()
if(CCACHE AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
endif()
enable_language(CUDA)

# CMake 3.25 drops CMAKE_CUDA_STANDARD 20 silently, so the standard is a flag.
set(CMAKE_CUDA_STANDARD_REQUIRED OFF)
string(APPEND CMAKE_CUDA_FLAGS " -std=c++20 --expt-relaxed-constexpr --threads 2")
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
