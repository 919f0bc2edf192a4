// kernels/bag.cu: the GPU's side of bag.h, which is not written yet.
