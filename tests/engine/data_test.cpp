// Foundation of the data half: random numbers, files that are whole or absent, progress, UTF-8.
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <set>
#include <vector>

#include "engine/files.h"
#include "engine/progress.h"
#include "engine/rng.h"
#include "engine/utf8.h"
#include "tests/engine/temp_folder.h"

namespace fiedler::test {
namespace {

TEST(Rng, DependsOnEveryArgumentAndOnNothingElse) {
    std::set<std::uint64_t> seen;
    for (std::uint64_t seed = 0; seed < 10; ++seed)
        for (std::uint64_t stream = 0; stream < 10; ++stream)
            for (std::uint64_t index = 0; index < 10; ++index) seen.insert(rng::bits(seed, stream, index));
    EXPECT_EQ(seen.size(), 1000u);
    EXPECT_EQ(rng::bits(1, 2, 3), rng::bits(1, 2, 3));
}

TEST(Rng, UniformAndNormalHaveTheirMoments) {
    constexpr int kCount = 200000;
    double uniform = 0, square = 0, normal = 0, normal2 = 0, normal4 = 0, lagged = 0, last = 0;
    for (int i = 0; i < kCount; ++i) {
        const double u = rng::uniform(7, 1, i), z = rng::normal(7, 2, i);
        ASSERT_TRUE(u >= 0 && u < 1 && std::isfinite(z));
        uniform += u, square += u * u;
        normal += z, normal2 += z * z, normal4 += z * z * z * z, lagged += z * last, last = z;
    }
    // Five standard errors of each mean.
    const double tolerance = 5 / std::sqrt(double(kCount));
    EXPECT_NEAR(uniform / kCount, 0.5, tolerance * 0.289);
    EXPECT_NEAR(square / kCount, 1.0 / 3, tolerance * 0.298);
    EXPECT_NEAR(normal / kCount, 0, tolerance);
    EXPECT_NEAR(normal2 / kCount, 1, tolerance * 1.42);
    EXPECT_NEAR(normal4 / kCount, 3, tolerance * 9.8);
    EXPECT_NEAR(lagged / kCount, 0, tolerance);
}

TEST(Rng, BelowStaysBelowAndReachesAll) {
    std::vector<int> hits(7);
    for (int i = 0; i < 7000; ++i) ++hits.at(rng::below(7, 3, 0, i));
    for (const int h : hits) EXPECT_NEAR(h, 1000, 150);
    EXPECT_EQ(rng::below(1, 3, 0, 0), 0u);
}

TEST(Rng, PermutationIsABijection) {
    for (const std::uint64_t n : {1ull, 2ull, 3ull, 5ull, 1000ull, 65537ull})
        for (const std::uint64_t seed : {0ull, 1ull, 12345ull}) {
            const rng::Permutation p(n, seed, 9);
            std::vector<bool> hit(n);
            for (std::uint64_t i = 0; i < n; ++i) {
                const std::uint64_t to = p(i);
                ASSERT_LT(to, n);
                ASSERT_FALSE(hit[to]) << n;
                hit[to] = true;
            }
        }
}

TEST(Rng, PermutationShuffles) {
    constexpr std::uint64_t n = 10000;
    const rng::Permutation p(n, 1, 0), q(n, 1, 1);
    std::uint64_t fixed = 0, common = 0, ascents = 0;
    for (std::uint64_t i = 0; i < n; ++i) {
        fixed += p(i) == i;
        common += p(i) == q(i);
        ascents += i > 0 && p(i) > p(i - 1);
    }
    EXPECT_LT(fixed, 12u);  // one is expected
    EXPECT_LT(common, 12u);
    EXPECT_NEAR(double(ascents), n / 2.0, 5 * std::sqrt(n / 12.0));
}

TEST(Utf8, FindsTheFirstInvalidByte) {
    const auto npos = std::string_view::npos;
    EXPECT_EQ(find_invalid_utf8(""), npos);
    EXPECT_EQ(find_invalid_utf8("plain \xc3\xa4 \xe2\x82\xac \xf0\x9f\x98\x80 \xed\x9f\xbf \xf4\x8f\xbf\xbf"), npos);
    EXPECT_EQ(find_invalid_utf8("0123456789abcdef\xff"), 16u);
    EXPECT_EQ(find_invalid_utf8("ab\xc3"), 2u) << "cut off";
    EXPECT_EQ(find_invalid_utf8("a\x80"), 1u) << "stray continuation";
    EXPECT_EQ(find_invalid_utf8("\xc0\x80"), 0u) << "overlong";
    EXPECT_EQ(find_invalid_utf8("\xe0\x80\x80"), 0u) << "overlong";
    EXPECT_EQ(find_invalid_utf8("\xed\xa0\x80"), 0u) << "surrogate";
    EXPECT_EQ(find_invalid_utf8("\xf4\x90\x80\x80"), 0u) << "beyond U+10FFFF";
    EXPECT_EQ(utf8_sequence("\xe2\x82", 0), -1);
    EXPECT_EQ(utf8_floor("a\xe2\x82\xac", 3), 1u);
    EXPECT_EQ(utf8_floor("abc", 9), 3u);
}

TEST(Files, AtomicWriteReplacesAndLeavesNothingElse) {
    const TempFolder t;
    const std::string path = t / "file";
    write_file_atomic(path, "one");
    write_file_atomic(path, std::string(3'000'000, 'x'));
    EXPECT_EQ(read_file(path), std::string(3'000'000, 'x'));
    EXPECT_EQ(MappedFile(path).text(), std::string(3'000'000, 'x'));
    write_file_atomic(path, "");
    EXPECT_EQ(MappedFile(path).size(), 0u);
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(t.path()), {}), 1);
}

TEST(Files, ErrorsNameThePath) {
    const TempFolder t;
    t.put("plain", "x");
    EXPECT_HAS(input_error_of([&] { read_file(t / "missing"); }), t / "missing");
    EXPECT_HAS(input_error_of([&] { MappedFile m(t.path()); }), "not a regular file");
    EXPECT_HAS(input_error_of([&] { write_file_atomic(t / "no/such/file", "x"); }), "cannot write");
    EXPECT_HAS(input_error_of([&] { make_folders(t / "plain/below"); }), t / "plain/below");
    EXPECT_HAS(input_error_of([&] { make_folders(t / "plain"); }), t / "plain");
    EXPECT_HAS(input_error_of([&] { StagedFolder s(t / "plain/below"); }), t / "plain");
}

TEST(Files, FullDiskIsAnInputError) {
    struct stat status {};
    if (::stat("/dev/full", &status) != 0 || !S_ISCHR(status.st_mode)) GTEST_SKIP() << "no /dev/full here";
    const std::string message = input_error_of([] {
        FileWriter writer("/dev/full");
        writer.write("x", 1);
        writer.close();
    });
    EXPECT_HAS(message, "/dev/full");
    EXPECT_HAS(message, "disk is full");
}

// A write that fails half-way (here: a limit on the file's size) leaves the old file and no temporary one.
TEST(Files, FailedWriteKeepsTheOldFile) {
    const TempFolder t;
    const std::string path = t.put("file", "old");
    std::signal(SIGXFSZ, SIG_IGN);
    rlimit before{}, small{};
    ::getrlimit(RLIMIT_FSIZE, &before);
    small = before;
    small.rlim_cur = 4096;
    ::setrlimit(RLIMIT_FSIZE, &small);
    const std::string message = input_error_of([&] { write_file_atomic(path, std::string(100'000, 'x')); });
    ::setrlimit(RLIMIT_FSIZE, &before);
    EXPECT_HAS(message, "cannot write");
    EXPECT_EQ(slurp(path), "old");
    EXPECT_EQ(std::distance(std::filesystem::directory_iterator(t.path()), {}), 1);
}

TEST(Files, StagedFolderAppearsOnlyWhenCommitted) {
    const TempFolder t;
    {
        StagedFolder s(t / "out");
        write_file_atomic(join_path(s.path(), "a"), "1");
        EXPECT_FALSE(folder_exists(t / "out"));
    }
    EXPECT_TRUE(std::filesystem::is_empty(t.path()));
    for (const char* content : {"1", "2"}) {
        StagedFolder s(t / "out/");
        write_file_atomic(join_path(s.path(), "a"), content);
        s.commit(/*replace=*/true);
        EXPECT_EQ(slurp(t / "out/a"), content);
    }
    StagedFolder s(t / "out");
    EXPECT_HAS(input_error_of([&] { s.commit(/*replace=*/false); }), "exists already");
    EXPECT_EQ(slurp(t / "out/a"), "2");
}

TEST(Progress, PlainLinesElsewhereThanOnATerminal) {
    std::FILE* out = std::tmpfile();
    {
        Progress progress(out, "encoding", 1000);
        for (int i = 0; i < 1000; ++i) progress.update(i, "note");
        progress.finish("done");
    }
    std::rewind(out);
    char text[256] = {};
    const std::size_t count = std::fread(text, 1, sizeof text - 1, out);
    std::fclose(out);
    EXPECT_EQ(std::string(text, count), "encoding: done\n") << "short work is one line, without control characters";
    Progress silent(nullptr, "x", 1);
    silent.update(1);
    silent.finish("y");
}

TEST(Progress, Formats) {
    EXPECT_EQ(format_bytes(999), "999 B");
    EXPECT_EQ(format_bytes(1234), "1.23 kB");
    EXPECT_EQ(format_bytes(99'960'000), "100 MB");
    EXPECT_EQ(format_count(30'100'000), "30.1M");
    EXPECT_EQ(format_count(0), "0");
    EXPECT_EQ(format_seconds(59.6), "01:00");
    EXPECT_EQ(format_seconds(3723), "1:02:03");
}

}  // namespace
}  // namespace fiedler::test
