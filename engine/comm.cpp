#include "engine/comm.h"

#include <fmt/format.h>

#include <cstdlib>
#include <cstring>

#include "engine/error.h"

#if FIEDLER_CUDA
#include <dlfcn.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>
#endif

namespace fiedler {

namespace {

class Alone final : public Comm {
  public:
    int rank() const override { return 0; }
    int size() const override { return 1; }
    void all_reduce_sum(Vec<float>) override {}
};

int environment_number(const char* name, int fallback, int low, int high) {
    const char* text = std::getenv(name);
    if (!text || !*text) return fallback;
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    if (*end || value < low || value > high)
        throw InputError(fmt::format("{}: \"{}\" is not a number from {} to {}", name, text, low, high));
    return static_cast<int>(value);
}

}  // namespace

World world_from_environment() {
    World w;
    w.size = environment_number("FIEDLER_WORLD_SIZE", 1, 1, 4096);
    w.rank = environment_number("FIEDLER_RANK", 0, 0, w.size - 1);
    if (const char* file = std::getenv("FIEDLER_COMM_FILE")) w.comm_file = file;
    if (w.size > 1 && w.comm_file.empty())
        throw InputError(
            "FIEDLER_COMM_FILE: is not set; with FIEDLER_WORLD_SIZE above 1 it names a file that all processes see");
    return w;
}

std::unique_ptr<Comm> make_comm(const World& w) {
    if (w.size > 1) throw InputError("FIEDLER_WORLD_SIZE: more than one process needs CUDA devices (--device cuda)");
    return std::make_unique<Alone>();
}

#if FIEDLER_CUDA
namespace {

// The five functions of NCCL that are used, by its documented C interface. Declared here, so building needs no NCCL.
struct NcclId {
    char bytes[128];
};
using NcclComm = void*;
constexpr int kNcclFloat = 7, kNcclSum = 0;

struct Nccl {
    int (*get_unique_id)(NcclId*);
    int (*init_rank)(NcclComm*, int, NcclId, int);
    int (*destroy)(NcclComm);
    int (*all_reduce)(const void*, void*, std::size_t, int, int, NcclComm, void*);
    const char* (*error_string)(int);

    Nccl() {
        void* library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
        if (!library)
            throw InputError(
                fmt::format("NCCL cannot be loaded ({}); install libnccl2, or train with one process", dlerror()));
        const auto load = [&](auto& function, const char* name) {
            void* symbol = dlsym(library, name);
            if (!symbol) throw InputError(fmt::format("NCCL lacks {}; install a newer libnccl2", name));
            std::memcpy(&function, &symbol, sizeof symbol);
        };
        load(get_unique_id, "ncclGetUniqueId");
        load(init_rank, "ncclCommInitRank");
        load(destroy, "ncclCommDestroy");
        load(all_reduce, "ncclAllReduce");
        load(error_string, "ncclGetErrorString");
    }
    void check(int status, const char* what) const {
        if (status != 0) throw RunError(fmt::format("NCCL: {} failed: {}", what, error_string(status)));
    }
};

// Rank 0 writes the id under a temporary name and renames it; the others wait for the name.
NcclId exchange_id(const Nccl& nccl, const World& w) {
    NcclId id{};
    if (w.rank == 0) {
        nccl.check(nccl.get_unique_id(&id), "ncclGetUniqueId");
        if (w.size == 1) return id;
        if (std::filesystem::exists(w.comm_file))
            input_error("FIEDLER_COMM_FILE: {} is left from an earlier run; remove it before the processes start",
                        w.comm_file);
        const std::string temporary = w.comm_file + ".new";
        std::ofstream(temporary, std::ios::binary).write(id.bytes, sizeof id.bytes);
        std::filesystem::rename(temporary, w.comm_file);
        return id;
    }
    for (int tries = 0; tries < 1200; ++tries) {
        std::ifstream in(w.comm_file, std::ios::binary);
        if (in && in.read(id.bytes, sizeof id.bytes)) return id;
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
    throw RunError(fmt::format("{}: rank 0 has not written it within two minutes", w.comm_file));
}

class NcclWorld final : public Comm {
  public:
    NcclWorld(const Cuda& dev, const World& w) : world_(w), stream_(native_stream(dev)) {
        nccl_.check(nccl_.init_rank(&comm_, w.size, exchange_id(nccl_, w), w.rank), "ncclCommInitRank");
    }
    ~NcclWorld() override { (void)nccl_.destroy(comm_); }
    int rank() const override { return world_.rank; }
    int size() const override { return world_.size; }
    void all_reduce_sum(Vec<float> v) override {
        const auto elements = static_cast<std::size_t>(v.size);
        nccl_.check(nccl_.all_reduce(v.data, v.data, elements, kNcclFloat, kNcclSum, comm_, stream_), "ncclAllReduce");
    }

  private:
    World world_;
    void* stream_;
    Nccl nccl_;
    NcclComm comm_ = nullptr;
};

}  // namespace

std::unique_ptr<Comm> make_comm(const Cuda& dev, const World& w, bool force) {
    if (w.size == 1 && !force) return std::make_unique<Alone>();
    return std::make_unique<NcclWorld>(dev, w);
}
#endif

}  // namespace fiedler
