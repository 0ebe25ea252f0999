# CUDA as a package: headers, libraries, nvcc.
if(CMAKE_CUDA_COMPILER AND NOT CUDAToolkit_ROOT)
  # The toolkit of the compiler that was named, which may not be the one on PATH.
  get_filename_component(_compiler "${CMAKE_CUDA_COMPILER}" REALPATH)
  get_filename_component(CUDAToolkit_ROOT "${_compiler}/../.." ABSOLUTE)
endif()
find_package(CUDAToolkit REQUIRED)
