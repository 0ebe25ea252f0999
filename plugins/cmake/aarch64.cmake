# Cross-compiling for Jetson and Grace on x86-64: -DCMAKE_TOOLCHAIN_FILE=$PWD/plugins/cmake/aarch64.cmake
#
# It needs Debian's g++-aarch64-linux-gnu and, beside nvcc, CUDA's libraries for aarch64 (NVIDIA's
# package cuda-cross-aarch64 or cuda-cross-sbsa). libiq_runtime needs OpenSSL for aarch64 too
# (libssl-dev:arm64).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CUDA_HOST_COMPILER aarch64-linux-gnu-g++)
