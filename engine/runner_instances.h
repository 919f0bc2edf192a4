// engine/runner_instances.h: the devices and precisions that exist. Each .cpp of Runner ends in
// FIEDLER_RUNNER_INSTANCES().
#pragma once

#if FIEDLER_CUDA
#define FIEDLER_RUNNER_INSTANCES()      \
    template class Runner<Cpu, float>;  \
    template class Runner<Cpu, double>; \
    template class Runner<Cuda, bf16>;
#else
#define FIEDLER_RUNNER_INSTANCES()     \
    template class Runner<Cpu, float>; \
    template class Runner<Cpu, double>;
#endif
