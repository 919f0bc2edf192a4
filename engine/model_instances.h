// engine/model_instances.h: the devices and precisions that exist. Each .cpp of Model ends in
// FIEDLER_MODEL_INSTANCES().
#pragma once

#if FIEDLER_CUDA
#define FIEDLER_MODEL_INSTANCES()      \
    template class Model<Cpu, float>;  \
    template class Model<Cpu, double>; \
    template class Model<Cuda, bf16>;
#else
#define FIEDLER_MODEL_INSTANCES()     \
    template class Model<Cpu, float>; \
    template class Model<Cpu, double>;
#endif
