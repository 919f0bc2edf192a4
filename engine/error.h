// engine/error.h: the two kinds of failure that reach a user, and the exit codes they stand for.
//
// A message is one line: which file, line or field; what is wrong; what to do about it.
#pragma once
#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace fiedler {

struct InputError : std::runtime_error {  // bad usage or bad input: exit code 2
    using std::runtime_error::runtime_error;
};
struct RunError : std::runtime_error {  // failure while running: exit code 1
    using std::runtime_error::runtime_error;
};

template <class... Args>
[[noreturn]] void input_error(fmt::format_string<Args...> format, Args&&... args) {
    throw InputError(fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
[[noreturn]] void run_error(fmt::format_string<Args...> format, Args&&... args) {
    throw RunError(fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace fiedler
