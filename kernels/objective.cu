// kernels/objective.cu: the GPU's side of objective.h, which is not written yet.
