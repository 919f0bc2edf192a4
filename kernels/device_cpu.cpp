// kernels/device_cpu.cpp: the Cpu context (see device.h), and what a build without CUDA answers about devices.
#include <cstdlib>
#include <cstring>

#include "kernels/device.h"

namespace fiedler {

void* device_alloc(const Cpu&, std::size_t bytes) {
    void* p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!p) throw DeviceError("not enough memory for " + std::to_string(bytes) + " bytes");
    return p;
}
void device_free(const Cpu&, void* p) noexcept { std::free(p); }
void copy_to_device(const Cpu&, void* dst, const void* src, std::size_t bytes) { std::memcpy(dst, src, bytes); }
void copy_to_host(const Cpu&, void* dst, const void* src, std::size_t bytes) { std::memcpy(dst, src, bytes); }
void copy_on_device(const Cpu&, void* dst, const void* src, std::size_t bytes) { std::memcpy(dst, src, bytes); }
void fill_bytes(const Cpu&, void* dst, int value, std::size_t bytes) { std::memset(dst, value, bytes); }
void copy_rows_on_device(const Cpu&, void* dst, std::size_t dst_pitch, const void* src, std::size_t src_pitch,
                         std::size_t width, std::size_t rows) {
    for (std::size_t i = 0; i < rows; ++i)
        std::memcpy(static_cast<char*>(dst) + i * dst_pitch, static_cast<const char*>(src) + i * src_pitch, width);
}

#if !FIEDLER_CUDA
int cuda_device_count(std::string* why) {
    if (why) *why = "this binary was built without CUDA (make cuda)";
    return 0;
}
CudaDeviceInfo cuda_device_info(int) { throw DeviceError("this binary was built without CUDA"); }
void graph_free(CudaGraph*) noexcept {}  // there is none to free
void range_push(const char*) {}
void range_pop() {}
#endif

}  // namespace fiedler
