// kernels/dropout.cu: the GPU's side of dropout.h, which is not written yet.
