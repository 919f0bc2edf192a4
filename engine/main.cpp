// engine/main.cpp: from arguments to a command, from failures to exit codes: 0 done, 1 runtime failure, 2 bad usage or
// bad input.
#include <fmt/format.h>

#include <csignal>
#include <cstdio>
#include <new>
#include <system_error>

#include "engine/bench_command.h"
#include "engine/commands.h"
#include "engine/cpu_quota.h"
#include "engine/error.h"
#include "engine/spectrum_command.h"
#include "engine/train.h"
#include "kernels/device.h"

namespace fiedler {
namespace {

int run(const Invocation& call) {
    switch (call.command) {
        case Command::prepare:
            return run_prepare(call);
        case Command::train:
            return run_train(call);
        case Command::eval:
            return run_eval(call);
        case Command::generate:
            return run_generate(call);
        case Command::plan:
            return run_plan(call);
        case Command::inspect:
            return run_inspect(call);
        case Command::spectrum:
            return run_spectrum(call);
        case Command::export_model:
            return run_export(call);
        case Command::import_model:
            return run_import(call);
        case Command::quantize:
            return run_quantize(call);
        case Command::predict:
            return run_predict(call);
        case Command::bench:  // has arguments of its own: main_of
            break;
    }
    return 2;
}

int main_of(const std::vector<std::string>& arguments) {
    if (arguments.empty() || arguments[0] == "--help" || arguments[0] == "-h" || arguments[0] == "help") {
        fmt::print("{}", help_text());
        return arguments.empty() ? 2 : 0;
    }
    if (arguments[0] == "--version") {
        std::string why;
        const int devices = cuda_device_count(&why);
        fmt::print("fiedler {} ({})\n", FIEDLER_VERSION,
                   devices > 0 ? cuda_device_info(0).name : "no CUDA device: " + why);
        return 0;
    }
    const auto command = command_named(arguments[0]);
    if (!command) {
        const std::string near = nearest_name(arguments[0], command_names());
        throw InputError(fmt::format("{}: there is no such command{}; see fiedler --help", arguments[0],
                                     near.empty() ? "" : fmt::format(" (did you mean {}?)", near)));
    }
    if (*command == Command::bench) return run_bench({arguments.begin() + 1, arguments.end()});
    const Invocation call = parse_arguments(*command, {arguments.begin() + 1, arguments.end()});
    if (call.help) {
        fmt::print("{}", help_text(*command));
        return 0;
    }
    return run(call);
}

// One line, whatever names and texts the message quotes.
int report(std::string_view message, int code) {
    std::string line(message);
    for (char& c : line)
        if (static_cast<unsigned char>(c) < ' ' || c == 127) c = ' ';
    fmt::print(stderr, "{}{}\n", line.starts_with("fiedler ") ? "" : "fiedler: ", line);
    return code;
}

int main_reporting(int argc, char** argv) {
    try {
        limit_threads_to_quota();
        const int code = main_of({argv + 1, argv + argc});
        if (std::fflush(stdout) != 0 || std::ferror(stdout))
            return report("standard output: cannot write; free some space or choose another file", 2);
        return code;
    } catch (const InputError& e) {
        return report(e.what(), 2);
    } catch (const RunError& e) {
        return report(e.what(), 1);
    } catch (const DeviceError& e) {
        return report(fmt::format("the device failed: {}", e.what()), 1);
    } catch (const std::bad_alloc&) {
        return report("out of memory; choose a smaller --micro-batch, --context or -k", 1);
    } catch (const std::system_error& e) {  // of a stream, or of a file where no message of ours was possible
        return report(fmt::format("{}; check the disk and the permissions", e.what()), 2);
    } catch (const std::exception& e) {
        return report(fmt::format("internal error: {}", e.what()), 1);
    }
}

}  // namespace
}  // namespace fiedler

int main(int argc, char** argv) {
    std::signal(SIGXFSZ, SIG_IGN);  // a file beyond the limit on sizes is an error of its write, like a full disk
    return fiedler::main_reporting(argc, argv);
}
