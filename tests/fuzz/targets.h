// tests/fuzz/targets.h: one function for each reader of files that others may have made. Given any bytes it must end, with a
// file read or an InputError: no crash, nothing out of bounds, no memory beyond a small multiple of the file.
//
// tests/fuzz/main.cpp makes libFuzzer programs of them (clang, ASan and UBSan: tools/fuzz); fuzz_corpus_test.cpp runs them on
// the committed corpus in every build. Checksums would keep a fuzzer outside: those of .fdl files and of manifests are
// made right first, unless the first byte of the input is odd.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fiedler::fuzz {

struct Target {
    const char* name;
    void (*run)(const std::uint8_t* data, std::size_t size);
};
// fdl (and the runtime on what it holds), safetensors, gguf, shard, manifest (of datasets and checkpoints), tokenizer
extern const Target kTargets[6];
const Target* target_named(const char* name);

}  // namespace fiedler::fuzz
