// The kernels of a step, compiled for the CPU.
#include "step_kernels.cu"
