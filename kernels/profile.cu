// kernels/profile.cu: the GPU's clock for profile.h: CUDA events in the context's stream.
#include <vector>

#include "kernels/common.cuh"
#include "kernels/profile.h"

namespace fiedler {
namespace {

class EventClock final : public MarkClock {
  public:
    explicit EventClock(const Cuda& dev) : dev_(dev) {}
    ~EventClock() override {
        for (const cudaEvent_t e : events_) (void)cudaEventDestroy(e);
    }
    bool mark(std::size_t i) override {
        cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
        CUDA_CHECK(cudaStreamIsCapturing(stream_of(dev_), &status));
        if (status != cudaStreamCaptureStatusNone) return false;
        while (events_.size() <= i) {
            events_.push_back(nullptr);
            CUDA_CHECK(cudaEventCreate(&events_.back()));
        }
        CUDA_CHECK(cudaEventRecord(events_[i], stream_of(dev_)));
        return true;
    }
    void wait() override { synchronize(dev_); }
    double seconds_after(std::size_t i) override {
        float ms = 0;
        CUDA_CHECK(cudaEventElapsedTime(&ms, events_[i], events_[i + 1]));
        return double(ms) * 1e-3;
    }

  private:
    const Cuda& dev_;
    std::vector<cudaEvent_t> events_;
};

__global__ void __launch_bounds__(256) read_kernel(const uint4* from, std::int64_t n) {
    unsigned any = 0;
    for (std::int64_t i = std::int64_t(blockIdx.x) * 256 + threadIdx.x; i < n; i += std::int64_t(gridDim.x) * 256) {
        const uint4 x = from[i];
        any |= x.x | x.y | x.z | x.w;
    }
    if (any == 0x5EEDF1EDu) __nanosleep(1);  // so that the reads are not left out
}

__device__ unsigned long long nanoseconds() {
    unsigned long long time;
    asm volatile("mov.u64 %0, %globaltimer;\n" : "=l"(time));
    return time;
}
__global__ void occupy_kernel(unsigned long long how_long) {
    const unsigned long long begin = nanoseconds();
    while (nanoseconds() - begin < how_long) __nanosleep(500);
}

constexpr int kCopyThreads = 256;

template <int kPieces, bool kWrite>
__global__ void __launch_bounds__(kCopyThreads) copy_kernel(uint4* to, const uint4* from, std::int64_t n) {
    const std::int64_t first = std::int64_t(blockIdx.x) * kPieces * kCopyThreads + threadIdx.x;
    uint4 pieces[kPieces];
#pragma unroll
    for (int k = 0; k < kPieces; ++k)
        pieces[k] = first + k * kCopyThreads < n ? from[first + k * kCopyThreads] : uint4{0, 0, 0, 0};
    unsigned any = 0;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
        if (kWrite && first + k * kCopyThreads < n) to[first + k * kCopyThreads] = pieces[k];
        any |= pieces[k].x | pieces[k].y | pieces[k].z | pieces[k].w;
    }
    if (!kWrite && any == 0x5EEDF1EDu) __nanosleep(1);  // so that the reads are not left out
}

// Four pieces a thread where that makes enough blocks for every multiprocessor, else one.
template <bool kWrite>
void launch_copy(const Cuda& dev, void* to, const void* from, std::size_t bytes) {
    constexpr std::int64_t kEnough = 1056;
    const std::int64_t n = std::int64_t(bytes / 16), blocks = ceil_div(n, std::int64_t(4 * kCopyThreads));
    auto* out = static_cast<uint4*>(to);
    const auto* in = static_cast<const uint4*>(from);
    if (blocks >= kEnough)
        copy_kernel<4, kWrite><<<unsigned(blocks), kCopyThreads, 0, stream_of(dev)>>>(out, in, n);
    else
        copy_kernel<1, kWrite>
            <<<unsigned(ceil_div(n, std::int64_t(kCopyThreads))), kCopyThreads, 0, stream_of(dev)>>>(out, in, n);
    LAUNCH_CHECK("plain_copy");
}

}  // namespace

void plain_copy(const Cuda& dev, void* to, const void* from, std::size_t bytes) {
    if (bytes < 16) return;
    if (to)
        launch_copy<true>(dev, to, from, bytes);
    else
        launch_copy<false>(dev, nullptr, from, bytes);
}

void occupy(const Cuda& dev, double seconds) {
    occupy_kernel<<<1, 1, 0, stream_of(dev)>>>(static_cast<unsigned long long>(seconds * 1e9));
    LAUNCH_CHECK("occupy");
}

void read_through(const Cuda& dev, const void* memory, std::size_t bytes) {
    constexpr std::uintptr_t kPiece = sizeof(uint4);
    const auto first = reinterpret_cast<std::uintptr_t>(memory), begin = (first + kPiece - 1) / kPiece * kPiece,
               end = (first + bytes) / kPiece * kPiece;
    if (end <= begin) return;
    read_kernel<<<4096, 256, 0, stream_of(dev)>>>(reinterpret_cast<const uint4*>(begin),
                                                  static_cast<std::int64_t>((end - begin) / kPiece));
    LAUNCH_CHECK("read_through");
}

std::unique_ptr<MarkClock> mark_clock(const Cuda& dev) { return std::make_unique<EventClock>(dev); }

}  // namespace fiedler
