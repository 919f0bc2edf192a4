// engine/comm.h: data parallelism. One process per GPU; gradients are summed over the processes. With one process every
// call is a no-op.
//
// Spans are typed and count elements. Start-up reads the environment: FIEDLER_RANK, FIEDLER_WORLD_SIZE and
// FIEDLER_COMM_FILE (a path that all processes see: rank 0 writes NCCL's unique id there). NCCL is loaded at run time,
// so a machine without it needs none. InputError when the environment is inconsistent or NCCL is missing, RunError
// when NCCL fails.
#pragma once
#include <memory>
#include <string>

#include "kernels/device.h"
#include "kernels/view.h"

namespace fiedler {

struct World {
    int rank = 0, size = 1;
    std::string comm_file;
};
World world_from_environment();

class Comm {
  public:
    virtual ~Comm() = default;
    virtual int rank() const = 0;
    virtual int size() const = 0;
    virtual void all_reduce_sum(Vec<float>) = 0;  // in place, on the device's stream
};

std::unique_ptr<Comm> make_comm(const World&);  // size 1, no device
#if FIEDLER_CUDA
// With force, NCCL is used even for one process: a test that it changes nothing.
std::unique_ptr<Comm> make_comm(const Cuda&, const World&, bool force = false);
#endif

}  // namespace fiedler
