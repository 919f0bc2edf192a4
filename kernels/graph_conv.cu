// kernels/graph_conv.cu: the GPU's side of graph_conv.h, which is not written yet.
