// kernels/device.cu: the Cuda context (see device.h).
#include <nvtx3/nvToolsExt.h>

#include <memory>
#include <utility>

#include "kernels/common.cuh"

namespace fiedler {

void device_failed(const char* what, const char* statement, const char* file, int line) {
    throw DeviceError(std::string(what) + " in " + statement + " (" + file + ":" + std::to_string(line) + ")");
}

int cuda_device_count(std::string* why) {
    int n = 0;
    const cudaError_t e = cudaGetDeviceCount(&n);
    if (e == cudaSuccess && n > 0) return n;
    if (why) *why = e == cudaSuccess ? "the driver reports no device" : cudaGetErrorString(e);
    (void)cudaGetLastError();
    return 0;
}

CudaDeviceInfo cuda_device_info(int ordinal) {
    cudaDeviceProp prop{};
    CUDA_CHECK(cudaGetDeviceProperties(&prop, ordinal));
    CudaDeviceInfo info;
    info.name = prop.name;
    info.arch = prop.major * 10 + prop.minor;
    info.sm_count = prop.multiProcessorCount;
    info.memory_bytes = prop.totalGlobalMem;
    info.l2_bytes = static_cast<std::size_t>(prop.l2CacheSize);
    CUDA_CHECK(cudaDriverGetVersion(&info.driver_version));
    CUDA_CHECK(cudaRuntimeGetVersion(&info.runtime_version));
    return info;
}

Cuda::Cuda(int device) : state(new CudaState), ordinal(device) {
    try {
        const CudaDeviceInfo info = cuda_device_info(ordinal);
        sm_count = info.sm_count;
        arch = info.arch;
        l2_bytes = info.l2_bytes;
        CUDA_CHECK(cudaSetDevice(ordinal));
        for (cudaStream_t* stream : {&state->stream, &state->side})
            CUDA_CHECK(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking));
        for (cudaEvent_t* event : {&state->forked, &state->joined})
            CUDA_CHECK(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
        CUDA_CHECK(cudaEventCreate(&state->start));
        CUDA_CHECK(cudaEventCreate(&state->stop));
        for (cudaEvent_t& mark : state->marks) CUDA_CHECK(cudaEventCreateWithFlags(&mark, cudaEventDisableTiming));
        CUBLAS_CHECK(cublasLtCreate(&state->blas));
    } catch (...) {
        delete state;
        throw;
    }
}

Cuda::~Cuda() {  // nothing to be done about a failure here: the process is letting go of the device
    if (state->plans && state->destroy_plans) state->destroy_plans(state->plans);
    if (state->blas) (void)cublasLtDestroy(state->blas);
    for (const cudaEvent_t event : {state->start, state->stop, state->forked, state->joined})
        if (event) (void)cudaEventDestroy(event);
    for (const cudaEvent_t mark : state->marks)
        if (mark) (void)cudaEventDestroy(mark);
    for (const cudaStream_t stream : {state->stream, state->side})
        if (stream) (void)cudaStreamDestroy(stream);
    delete state;
}

void* native_stream(const Cuda& d) { return stream_of(d); }
void memory_info(const Cuda&, std::size_t& free_bytes, std::size_t& total_bytes) {
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
}

void* device_alloc(const Cuda&, std::size_t bytes) {
    void* p = nullptr;
    CUDA_CHECK(cudaMalloc(&p, bytes));
    return p;
}
void device_free(const Cuda&, void* p) noexcept { (void)cudaFree(p); }

void copy_to_device(const Cuda& d, void* dst, const void* src, std::size_t bytes) {
    // Pageable memory: the call returns once src has been staged, so src may be reused at once.
    CUDA_CHECK(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, stream_of(d)));
}
void copy_to_host(const Cuda& d, void* dst, const void* src, std::size_t bytes) {
    CUDA_CHECK(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, stream_of(d)));
    CUDA_CHECK(cudaStreamSynchronize(stream_of(d)));
}
void copy_on_device(const Cuda& d, void* dst, const void* src, std::size_t bytes) {
    CUDA_CHECK(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, stream_of(d)));
}
void fill_bytes(const Cuda& d, void* dst, int value, std::size_t bytes) {
    CUDA_CHECK(cudaMemsetAsync(dst, value, bytes, stream_of(d)));
}
void copy_rows_on_device(const Cuda& d, void* dst, std::size_t dst_pitch, const void* src, std::size_t src_pitch,
                         std::size_t width, std::size_t rows) {
    CUDA_CHECK(cudaMemcpy2DAsync(dst, dst_pitch, src, src_pitch, width, rows, cudaMemcpyDeviceToDevice, stream_of(d)));
}
void synchronize(const Cuda& d) {
    join(d);
    CUDA_CHECK(cudaStreamSynchronize(stream_of(d)));
}

void branch(const Cuda& d, const std::function<void()>& work) {
    CudaState& s = *d.state;
    CUDA_CHECK(cudaEventRecord(s.forked, s.stream));
    CUDA_CHECK(cudaStreamWaitEvent(s.side, s.forked));
    s.branched = true;  // from now on, whatever becomes of the work
    struct Turn {
        CudaState& state;
        explicit Turn(CudaState& of) : state(of) { std::swap(state.stream, state.side); }
        ~Turn() { std::swap(state.stream, state.side); }
    } turn(s);
    work();
}
void join(const Cuda& d) {
    CudaState& s = *d.state;
    if (!s.branched) return;
    CUDA_CHECK(cudaEventRecord(s.joined, s.side));
    CUDA_CHECK(cudaStreamWaitEvent(s.stream, s.joined));
    s.branched = false;
}

void* host_alloc(const Cuda&, std::size_t bytes) {
    void* p = nullptr;
    CUDA_CHECK(cudaHostAlloc(&p, bytes, cudaHostAllocDefault));
    return p;
}
void host_free(const Cuda&, void* p) noexcept { (void)cudaFreeHost(p); }
void send(const Cuda& d, void* dst, const void* host, std::size_t bytes) {
    CUDA_CHECK(cudaMemcpyAsync(dst, host, bytes, cudaMemcpyHostToDevice, stream_of(d)));
}
void fetch(const Cuda& d, void* host, const void* src, std::size_t bytes) {
    CUDA_CHECK(cudaMemcpyAsync(host, src, bytes, cudaMemcpyDeviceToHost, stream_of(d)));
}
void set_mark(const Cuda& d, int mark) { CUDA_CHECK(cudaEventRecord(d.state->marks[mark], stream_of(d))); }
void wait_for_mark(const Cuda& d, int mark) { CUDA_CHECK(cudaEventSynchronize(d.state->marks[mark])); }

struct CudaGraph {
    cudaGraphExec_t exec = nullptr;
    std::size_t nodes = 0;
};

namespace {

// A recording that is under way; ends with the stream as it was, whatever happened.
struct Recording {
    explicit Recording(const Cuda& d) : device(d) {
        join(device);  // a branch of before is not part of it
        // Calls of other threads are their own affair: only this thread's are held to the rules of a recording.
        CUDA_CHECK(cudaStreamBeginCapture(stream_of(device), cudaStreamCaptureModeThreadLocal));
    }
    ~Recording() {
        if (!ended) {  // a branch, which is being recorded too, ends with it
            CudaState& s = *device.state;
            if (s.branched && cudaEventRecord(s.joined, s.side) == cudaSuccess)
                (void)cudaStreamWaitEvent(s.stream, s.joined);
            s.branched = false;
            (void)cudaStreamEndCapture(s.stream, &graph);
        }
        if (graph) (void)cudaGraphDestroy(graph);
        if (!ended) (void)cudaGetLastError();
    }
    Recording(const Recording&) = delete;
    Recording& operator=(const Recording&) = delete;
    void end() {
        join(device);
        ended = true;
        CUDA_CHECK(cudaStreamEndCapture(stream_of(device), &graph));
    }
    const Cuda& device;
    cudaGraph_t graph = nullptr;
    bool ended = false;
};

}  // namespace

CudaGraph* graph_record(const Cuda& d, const std::function<void()>& work) {
    Recording recording(d);
    work();
    recording.end();
    auto owned = std::make_unique<CudaGraph>();
    CUDA_CHECK(cudaGraphGetNodes(recording.graph, nullptr, &owned->nodes));
    CUDA_CHECK(cudaGraphInstantiate(&owned->exec, recording.graph, 0));
    const cudaError_t uploaded = cudaGraphUpload(owned->exec, stream_of(d));
    if (uploaded != cudaSuccess) {
        (void)cudaGraphExecDestroy(owned->exec);
        CUDA_CHECK(uploaded);
    }
    return owned.release();
}
void graph_launch(const Cuda& d, const CudaGraph* g) { CUDA_CHECK(cudaGraphLaunch(g->exec, stream_of(d))); }
std::size_t graph_nodes(const CudaGraph* g) { return g->nodes; }
void graph_free(CudaGraph* g) noexcept {
    if (!g) return;
    (void)cudaGraphExecDestroy(g->exec);
    delete g;
}

void timer_start(const Cuda& d) { CUDA_CHECK(cudaEventRecord(d.state->start, stream_of(d))); }
double timer_stop_seconds(const Cuda& d) {
    CUDA_CHECK(cudaEventRecord(d.state->stop, stream_of(d)));
    CUDA_CHECK(cudaEventSynchronize(d.state->stop));
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, d.state->start, d.state->stop));
    return double(ms) * 1e-3;
}

void range_push(const char* word) { nvtxRangePushA(word); }
void range_pop() { nvtxRangePop(); }

}  // namespace fiedler
