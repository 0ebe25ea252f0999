// The kernels of a step, compiled for the CPU.
#include "choose_kernels.cu"
