// Every file of tests/fuzz/corpus through its reader, and small changes of each: what fuzzing found, and where it begins.
// The search itself is tools/fuzz.
#include <gtest/gtest.h>

#include <filesystem>

#include "engine/files.h"
#include "engine/rng.h"
#include "tests/fuzz/targets.h"

namespace fiedler::test {
namespace {

TEST(FuzzCorpus, EveryReaderEndsOnEveryFile) {
    for (const fuzz::Target& target : fuzz::kTargets) {
        std::size_t files = 0;
        const std::string folder = std::string(FIEDLER_SOURCE_DIR) + "/tests/fuzz/corpus/" + target.name;
        for (const auto& entry : std::filesystem::directory_iterator(folder)) {
            SCOPED_TRACE(entry.path());
            const std::string bytes = read_file(entry.path());
            const auto run = [&](const std::string& b) {
                target.run(reinterpret_cast<const std::uint8_t*>(b.data()), b.size());
            };
            run(bytes);
            ++files;
            for (std::uint64_t k = 0; k < 40; ++k) {  // a cut, or some changed bytes
                std::string changed =
                    bytes.substr(0, k % 4 == 0 ? rng::below(bytes.size() + 1, 1, k, 0) : bytes.size());
                for (std::uint64_t i = 0; i < k % 4 && !changed.empty(); ++i)
                    changed[rng::below(changed.size(), 2, k, i)] = static_cast<char>(rng::below(256, 3, k, i));
                run(changed);
            }
        }
        EXPECT_GT(files, 0u) << target.name;
    }
    EXPECT_EQ(fuzz::target_named("none"), nullptr);
}

}  // namespace
}  // namespace fiedler::test
