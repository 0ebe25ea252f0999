# The folder with TensorRT's headers: TensorRTHeaders_FOUND, TENSORRT_INCLUDE_DIR.
#
# Looked for, in this order: TENSORRT_INCLUDE_DIR, as a CMake or environment variable (nothing else
# is tried then); the SDK in TensorRT_ROOT, TENSORRT_ROOT or TRT_ROOT; Debian's, JetPack's folder;
# the usual folders of the tarball; and what Python wheels carry. Enterprise TensorRT and TensorRT
# for RTX have the same headers as far as this plugin goes.
if(NOT TENSORRT_INCLUDE_DIR AND DEFINED ENV{TENSORRT_INCLUDE_DIR})
  set(TENSORRT_INCLUDE_DIR "$ENV{TENSORRT_INCLUDE_DIR}"
    CACHE PATH "Folder with NvInferRuntime.h" FORCE)
endif()

if(NOT TENSORRT_INCLUDE_DIR)
  set(_wheels "")
  find_package(Python3 QUIET COMPONENTS Interpreter)
  if(Python3_Interpreter_FOUND)
    execute_process(
      COMMAND "${Python3_EXECUTABLE}" -c "import site, sysconfig
print(*{sysconfig.get_path('purelib'), *site.getsitepackages()}, sep=';')"
      OUTPUT_VARIABLE _sites OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    foreach(_site IN LISTS _sites)
      file(GLOB _found "${_site}/tensorrt*/include" "${_site}/nvidia/*/include")
      list(APPEND _wheels ${_found})
    endforeach()
  endif()
  # Not the cached TENSORRT_INCLUDE_DIR itself: find_path keeps a value that is there, even empty.
  find_path(_TENSORRT_FOUND NvInferRuntime.h NO_CACHE
    HINTS ${TensorRT_ROOT} ${TENSORRT_ROOT} ${TRT_ROOT}
      ENV TensorRT_ROOT ENV TENSORRT_ROOT ENV TRT_ROOT
    PATHS /usr/include/${CMAKE_SYSTEM_PROCESSOR}-linux-gnu /usr/include /usr/local/tensorrt
      /opt/tensorrt ${_wheels}
    PATH_SUFFIXES include)
  if(_TENSORRT_FOUND)
    set(TENSORRT_INCLUDE_DIR "${_TENSORRT_FOUND}" CACHE PATH "Folder with NvInferRuntime.h" FORCE)
  endif()
endif()

set(TensorRTHeaders_FOUND FALSE)
if(TENSORRT_INCLUDE_DIR AND EXISTS "${TENSORRT_INCLUDE_DIR}/NvInferRuntime.h")
  set(TensorRTHeaders_FOUND TRUE)
endif()
