// Placeholder of the CUDA half, replaced below.
