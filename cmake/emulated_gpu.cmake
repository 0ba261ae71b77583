# The GPU side for the emulator of tests/emulation, whose headers take the place of CUDA's and of
# some of src/cuda. Kernels are C++ then, and shared memory is static memory at 32-bit addresses.
file(GLOB MAMBA3_KERNELS CONFIGURE_DEPENDS src/cuda/*.cu)
file(GLOB MAMBA3_GPU_SOURCES CONFIGURE_DEPENDS src/cuda/*.cc tests/emulation/*.cc)
list(REMOVE_ITEM MAMBA3_KERNELS ${PROJECT_SOURCE_DIR}/src/cuda/idle.cu)
list(REMOVE_ITEM MAMBA3_GPU_SOURCES ${PROJECT_SOURCE_DIR}/src/cuda/cublas.cc
  ${PROJECT_SOURCE_DIR}/tests/emulation/emulator_test.cc)
# Warnings are nvcc's business. Kernels form addresses in tensors that are not there, and use none.
set_source_files_properties(${MAMBA3_KERNELS} PROPERTIES LANGUAGE CXX
  COMPILE_OPTIONS "-xc++;-w;-fno-strict-aliasing;-fno-sanitize=pointer-overflow")
list(APPEND MAMBA3_GPU_SOURCES ${MAMBA3_KERNELS})
include_directories(BEFORE tests/emulation)
set(CMAKE_POSITION_INDEPENDENT_CODE OFF)
add_compile_options(-fno-pie)
add_link_options(-no-pie)
find_package(Boost REQUIRED COMPONENTS context)
set(MAMBA3_CUDA_LIBRARIES Boost::context)
