// tests/engine/temp_folder.h: a folder that goes away with the test, text to put into it, and errors to look at.
#pragma once
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "engine/error.h"
#include "engine/rng.h"

namespace fiedler::test {

class TempFolder {
  public:
    TempFolder() {
        std::string name = (std::filesystem::temp_directory_path() / "fiedler-test-XXXXXX").string();
        if (!::mkdtemp(name.data())) throw std::runtime_error("no temporary folder");
        path_ = name;
    }
    ~TempFolder() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    TempFolder(const TempFolder&) = delete;
    TempFolder& operator=(const TempFolder&) = delete;
    std::string operator/(const std::string& name) const { return (std::filesystem::path(path_) / name).string(); }
    const std::string& path() const { return path_; }
    // Writes a file, with its folders; returns its path.
    std::string put(const std::string& name, const std::string& bytes) const {
        const std::string path = *this / name;
        std::filesystem::create_directories(std::filesystem::path(path).parent_path());
        std::ofstream(path, std::ios::binary) << bytes;
        return path;
    }

  private:
    std::string path_;
};

inline std::string slurp(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
}

// The message of the InputError that body throws: one line. Anything else fails the test.
template <class Body>
std::string input_error_of(Body&& body) {
    try {
        body();
    } catch (const InputError& e) {
        const std::string message = e.what();
        EXPECT_EQ(message.find('\n'), message.npos) << "more than one line: " << message;
        return message;
    } catch (const std::exception& e) {
        ADD_FAILURE() << "not an InputError: " << e.what();
        return {};
    }
    ADD_FAILURE() << "no error at all";
    return {};
}
#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

// Text that looks a little like source code, with words of uneven frequency; about `bytes` long, ending a line.
inline std::string code_like(std::size_t bytes, std::uint64_t seed) {
    std::string text;
    for (std::uint64_t i = 0; text.size() < bytes; ++i) {
        const auto r = [&](std::uint64_t stream) { return rng::uniform(seed, stream, i); };
        std::string word;
        const auto id = static_cast<std::uint64_t>(400 * r(0) * r(0) * r(0));
        for (std::uint64_t k = 0; k < 2 + id % 7; ++k) word += static_cast<char>('a' + rng::below(26, id, 7, k));
        text += word;
        const double what = r(1);
        text += what < 0.15 ? ";\n" : what < 0.2 ? ";\n\t" : what < 0.25 ? " = 0x1f;\n    " : what < 0.35 ? "(" : " ";
    }
    text += "\n";
    return text;
}

}  // namespace fiedler::test
