// kernels/device.h: where work runs. Two execution contexts with the same overloads; CUDA-free.
//
//   Cpu    `threads` OpenMP threads (0: all). Every operation is synchronous and, for a given number of threads,
//          bit-equal from run to run.
//   Cuda   one stream of one device; every operation is asynchronous on that stream, in order, but for those of a
//          branch (see there). Move-only, owns its streams, its cuBLASLt handle and nothing else; `workspace` is memory
//          lent by the caller (the arena) for cuBLASLt, and for gates of long sequences.
//
// Errors: DeviceError (std::runtime_error) with statement, file, line and the library's own words.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace fiedler {

struct DeviceError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Cpu {
    int threads = 0;
};

struct CudaState;  // stream, handles, properties: kernels/device.cu

struct Cuda {
    explicit Cuda(int ordinal = 0);
    ~Cuda();
    Cuda(const Cuda&) = delete;
    Cuda& operator=(const Cuda&) = delete;

    // From here on no kernel is taken that was written for the device's own architecture, only those for all of them.
    void forget_architecture() { arch = 0; }

    CudaState* state = nullptr;
    void* workspace = nullptr;
    std::size_t workspace_bytes = 0;
    int ordinal = 0;
    int sm_count = 0;
    int arch = 0;  // 89 for sm_89; 0: see forget_architecture
    std::size_t l2_bytes = 0;
};

struct CudaDeviceInfo {
    std::string name;
    int arch = 0;
    int sm_count = 0;
    std::size_t memory_bytes = 0, l2_bytes = 0;
    int driver_version = 0;  // as CUDA counts: 13000 is 13.0
    int runtime_version = 0;
};

// Number of usable CUDA devices; 0 when the driver is absent or fails (`why` then holds one line). In every build.
int cuda_device_count(std::string* why = nullptr);
CudaDeviceInfo cuda_device_info(int ordinal);
// The cudaStream_t itself, for other libraries (NCCL).
void* native_stream(const Cuda&);
// Free and total bytes of the device as the driver sees them.
void memory_info(const Cuda&, std::size_t& free_bytes, std::size_t& total_bytes);

// Memory: 256-byte aligned. device_alloc throws DeviceError when there is not enough. Sizes in bytes.
void* device_alloc(const Cpu&, std::size_t bytes);
void device_free(const Cpu&, void* p) noexcept;
void copy_to_device(const Cpu&, void* dst, const void* src, std::size_t bytes);
void copy_to_host(const Cpu&, void* dst, const void* src, std::size_t bytes);
void copy_on_device(const Cpu&, void* dst, const void* src, std::size_t bytes);  // ranges must not overlap
void fill_bytes(const Cpu&, void* dst, int value, std::size_t bytes);
// rows pieces of width bytes, from every src_pitch bytes to every dst_pitch bytes; ranges must not overlap.
void copy_rows_on_device(const Cpu&, void* dst, std::size_t dst_pitch, const void* src, std::size_t src_pitch,
                         std::size_t width, std::size_t rows);
inline void synchronize(const Cpu&) {}

// On Cuda, copy_to_device returns once src may be reused; copy_to_host once dst is filled.
void* device_alloc(const Cuda&, std::size_t bytes);
void device_free(const Cuda&, void* p) noexcept;
void copy_to_device(const Cuda&, void* dst, const void* src, std::size_t bytes);
void copy_to_host(const Cuda&, void* dst, const void* src, std::size_t bytes);
void copy_on_device(const Cuda&, void* dst, const void* src, std::size_t bytes);
void fill_bytes(const Cuda&, void* dst, int value, std::size_t bytes);
void copy_rows_on_device(const Cuda&, void* dst, std::size_t dst_pitch, const void* src, std::size_t src_pitch,
                         std::size_t width, std::size_t rows);
void synchronize(const Cuda&);

// Work that the host does not wait for. `host` is memory of host_alloc (pinned on Cuda, outside the device) and must stay
// as it is until a mark set after the call has passed. Marks are points of the stream, kMarks of them to each context;
// setting one again forgets where it was. The same calls on Cpu, where everything is done when they return.
inline constexpr int kMarks = 2;
void* host_alloc(const Cuda&, std::size_t bytes);  // 256-byte aligned; DeviceError when there is not enough
void host_free(const Cuda&, void* p) noexcept;
void send(const Cuda&, void* dst, const void* host, std::size_t bytes);
void fetch(const Cuda&, void* host, const void* src, std::size_t bytes);
void set_mark(const Cuda&, int mark);
void wait_for_mark(const Cuda&, int mark);
inline void* host_alloc(const Cpu& d, std::size_t bytes) { return device_alloc(d, bytes); }
inline void host_free(const Cpu& d, void* p) noexcept { device_free(d, p); }
inline void send(const Cpu& d, void* dst, const void* host, std::size_t bytes) { copy_to_device(d, dst, host, bytes); }
inline void fetch(const Cpu& d, void* host, const void* src, std::size_t bytes) { copy_to_host(d, host, src, bytes); }
inline void set_mark(const Cpu&, int) {}
inline void wait_for_mark(const Cpu&, int) {}

// Work beside other work. What `work` calls on dev goes to a second stream: it begins when all that was called before
// is done, and runs beside what is called after branch(), up to join(): what is called after that comes after the
// branch too. In between nobody else may write what the branch reads, or touch what it writes. `work` must not wait,
// use the workspace (matrix products and gates do), branch, join or record. One thread at a time calls these and
// synchronize(). A second branch before join() comes after the first. Where nobody
// joins, a recording's end and synchronize() do. On Cpu the work is done when branch() returns.
void branch(const Cuda&, const std::function<void()>& work);
void join(const Cuda&);
inline void branch(const Cpu&, const std::function<void()>& work) { work(); }
inline void join(const Cpu&) {}

// Work recorded once (a CUDA graph) and launched again and again at the price of one launch. Kernel arguments, addresses
// included, are those of the recording: what changes from launch to launch must lie in memory.
// graph_record runs `work`, whose calls on dev are recorded instead of done. They must not wait, allocate device memory
// or copy from or to host memory that is not pinned; what they choose at their first call (algorithms, modules) must
// have been chosen. The recording takes device memory of CUDA's own, outside any arena: of the order of a KiB a call.
// On an error nothing stays recorded and the stream can be used as before.
struct CudaGraph;
CudaGraph* graph_record(const Cuda&, const std::function<void()>& work);
void graph_launch(const Cuda&, const CudaGraph*);
std::size_t graph_nodes(const CudaGraph*);
void graph_free(CudaGraph*) noexcept;

// Seconds between two marks on the device's own clock (CUDA events). One pending pair per context.
void timer_start(const Cuda&);
double timer_stop_seconds(const Cuda&);  // waits for the stream

// Profiler ranges (NVTX on CUDA builds, nothing otherwise). The word is the kernel family or stage.
void range_push(const char* word);
void range_pop();
// Where set, every Range calls it: with its word when it begins, with nullptr when it ends (kernels/profile.h).
inline void (*range_hook)(const char* word) = nullptr;
struct Range {
    explicit Range(const char* word) {
        range_push(word);
        if (range_hook) range_hook(word);
    }
    ~Range() {
        if (range_hook) range_hook(nullptr);
        range_pop();
    }
    Range(const Range&) = delete;
    Range& operator=(const Range&) = delete;
};

}  // namespace fiedler
