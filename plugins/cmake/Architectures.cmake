# CMAKE_CUDA_ARCHITECTURES, where it is not given: every GPU that the plugin is for (Orin is 87,
# Thor 110, or 101 in CUDA 12) and that this nvcc knows, with PTX of the last one for those to come.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  execute_process(COMMAND "${CUDAToolkit_NVCC_EXECUTABLE}" --list-gpu-arch
    OUTPUT_VARIABLE _known ERROR_QUIET)
  set(_architectures "")
  foreach(_sm 75 80 86 87 89 90 100 101 103 110 120 121)
    if(_known MATCHES "compute_${_sm}[^0-9]")
      list(APPEND _architectures ${_sm})
    endif()
  endforeach()
  if(NOT _architectures)
    message(FATAL_ERROR "nvcc does not say what it compiles for: set CMAKE_CUDA_ARCHITECTURES")
  endif()
  list(POP_BACK _architectures _last)
  list(TRANSFORM _architectures APPEND "-real")
  set(CMAKE_CUDA_ARCHITECTURES ${_architectures} ${_last})
endif()
