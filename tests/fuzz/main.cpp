// tests/fuzz/main.cpp: a libFuzzer program for the target FIEDLER_FUZZ_TARGET.
#include "tests/fuzz/targets.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const fiedler::fuzz::Target* const target = fiedler::fuzz::target_named(FIEDLER_FUZZ_TARGET);
    target->run(data, size);
    return 0;
}
