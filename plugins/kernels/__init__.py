"""GPU kernels of the op, in Triton; imported only where a kernel is launched or compiled, as CPU builds lack Triton."""
