// kernels/pool.cu: the GPU's side of pool.h, which is not written yet.
