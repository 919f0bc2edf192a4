#include "tests/support/buffer.h"

#include <memory>

#include "kernels/packed.h"

namespace fiedler::test {

bool gpu_present(std::string& why) { return cuda_device_count(&why) > 0; }

#if FIEDLER_CUDA
const Cuda& gpu() {
    static constexpr std::size_t kWorkspace = 32u << 20;
    static const std::unique_ptr<Cuda> cuda = [] {
        auto c = std::make_unique<Cuda>();
        c->workspace = device_alloc(*c, kWorkspace);
        c->workspace_bytes = kWorkspace;
        return c;
    }();
    return *cuda;
}
#endif

Ragged::Ragged(const std::vector<std::int32_t>& lengths) : offsets{0} {
    for (const auto n : lengths) {
        const auto first = offsets.back();
        offsets.push_back(first + n);
        begin.insert(begin.end(), static_cast<std::size_t>(n), first);
        end.insert(end.end(), static_cast<std::size_t>(n), first + n);
    }
}
Packed Ragged::packed() const {
    Packed p;
    p.tokens = tokens();
    p.count = static_cast<std::int32_t>(offsets.size()) - 1;
    p.offsets = offsets.data();
    p.begin = begin.data();
    p.end = end.data();
    return p;
}

}  // namespace fiedler::test
