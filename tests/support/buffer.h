// tests/support/buffer.h: device memory for tests, with fences on both sides and NaN poison inside.
//
//   Buffer<float> y(cuda, n);            poisoned (all bits set: NaN for bf16, float and double; -1 for int32)
//   Buffer<bf16> x(cuda, values);        filled, values rounded to T
//   y.host(), y.values()                 copied back; both check the fences
#pragma once
#include <gtest/gtest.h>

#include <cstring>

#include "kernels/device.h"
#include "kernels/packed.h"
#include "kernels/view.h"
#include "tests/support/compare.h"

namespace fiedler::test {

template <class T, class Dev>
class Buffer {
  public:
    Buffer(const Dev& dev, std::size_t n) : dev_(dev), n_(n), base_(static_cast<char*>(device_alloc(dev, total()))) {
        fill_bytes(dev_, base_, kFenceByte, total());
        fill_bytes(dev_, data(), 0xff, bytes());
    }
    Buffer(const Dev& dev, const std::vector<T>& v) : Buffer(dev, v.size()) {
        copy_to_device(dev_, data(), v.data(), bytes());
    }
    Buffer(const Dev& dev, const Values& v) requires(!std::is_same_v<T, double>) : Buffer(dev, to<T>(v)) {}
    ~Buffer() {
        check_fences();
        device_free(dev_, base_);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    T* data() const { return reinterpret_cast<T*>(base_ + kFence); }
    std::size_t size() const { return n_; }
    std::size_t bytes() const { return n_ * sizeof(T); }
    Vec<T> vec() const { return {data(), static_cast<std::int64_t>(n_)}; }
    Mat<T> mat(std::int64_t rows, std::int64_t cols) const { return {data(), rows, cols}; }
    void zero() { fill_bytes(dev_, data(), 0, bytes()); }
    void poison() { fill_bytes(dev_, data(), 0xff, bytes()); }
    std::vector<T> host() const {
        check_fences();
        std::vector<T> v(n_);
        copy_to_host(dev_, v.data(), data(), bytes());
        return v;
    }
    Values values() const { return from(host()); }
    void check_fences() const {
        std::vector<unsigned char> all(total());
        copy_to_host(dev_, all.data(), base_, total());
        std::size_t bad = 0;
        for (std::size_t i = 0; i < total(); ++i)
            if ((i < kFence || i >= kFence + bytes()) && all[i] != kFenceByte) ++bad;
        EXPECT_EQ(bad, 0u) << "bytes written outside a buffer of " << n_ << " elements";
    }

  private:
    static constexpr std::size_t kFence = 512;
    static constexpr unsigned char kFenceByte = 0xa5;
    std::size_t total() const { return 2 * kFence + bytes(); }
    const Dev& dev_;
    std::size_t n_;
    char* base_;
};

// One Cuda context for the whole test program; tests of the GPU begin with FIEDLER_GPU_OR_SKIP() and use gpu().
#if FIEDLER_CUDA
const Cuda& gpu();
#endif
bool gpu_present(std::string& why);

#define FIEDLER_GPU_OR_SKIP()                                                                    \
    do {                                                                                         \
        std::string why_;                                                                        \
        if (!::fiedler::test::gpu_present(why_)) GTEST_SKIP() << "NO GPU, NOT TESTED: " << why_; \
    } while (false)

// Packed sequences for tests: lengths -> offsets, begin, end (host).
struct Ragged {
    std::vector<std::int32_t> offsets, begin, end;
    explicit Ragged(const std::vector<std::int32_t>& lengths);
    Packed packed() const;  // pointing at the host vectors
    std::int32_t tokens() const { return offsets.back(); }
};

// The same in the memory of Dev; with `uniform`, which asks for equal lengths, without pointers.
template <class Dev>
struct Packing {
    Ragged ragged;
    Buffer<std::int32_t, Dev> offsets, begin, end;
    Packed seq;
    Packing(const Dev& dev, const std::vector<std::int32_t>& lengths, bool uniform)
        : ragged(lengths), offsets(dev, ragged.offsets), begin(dev, ragged.begin), end(dev, ragged.end) {
        if (uniform) {
            seq = Packed::uniform(std::int32_t(lengths.size()), lengths[0]);
        } else {
            seq = ragged.packed();
            seq.offsets = offsets.data(), seq.begin = begin.data(), seq.end = end.data();
        }
    }
};

}  // namespace fiedler::test
