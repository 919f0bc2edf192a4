// engine/main.cpp: from arguments to a command, from failures to exit codes: 0 done, 1 runtime failure, 2 bad usage or bad input.
#include <fmt/format.h>

#include <new>

#include "engine/commands.h"
#include "engine/error.h"
#include "engine/train.h"
#include "kernels/device.h"

namespace fiedler {
namespace {

int run(const Invocation& call) {
    switch (call.command) {
        case Command::prepare: return run_prepare(call);
        case Command::train: return run_train(call);
        case Command::eval: return run_eval(call);
        case Command::generate: return run_generate(call);
        case Command::plan: return run_plan(call);
        case Command::inspect: return run_inspect(call);
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
        std::vector<std::string> names;
        for (const Command c : {Command::prepare, Command::train, Command::eval, Command::generate, Command::plan, Command::inspect})
            names.emplace_back(name_of(c));
        const std::string near = nearest_name(arguments[0], names);
        throw InputError(fmt::format("{}: there is no such command{}; see fiedler --help", arguments[0],
                                     near.empty() ? "" : fmt::format(" (did you mean {}?)", near)));
    }
    const Invocation call = parse_arguments(*command, {arguments.begin() + 1, arguments.end()});
    if (call.help) {
        fmt::print("{}", help_text(*command));
        return 0;
    }
    return run(call);
}

}  // namespace
}  // namespace fiedler

int main(int argc, char** argv) {
    int code = 1;
    try {
        code = fiedler::main_of({argv + 1, argv + argc});
    } catch (const fiedler::InputError& e) {
        fmt::print(stderr, "fiedler: {}\n", e.what());
        code = 2;
    } catch (const fiedler::RunError& e) {
        fmt::print(stderr, "fiedler: {}\n", e.what());
    } catch (const fiedler::DeviceError& e) {
        fmt::print(stderr, "fiedler: the device failed: {}\n", e.what());
    } catch (const std::bad_alloc&) {
        fmt::print(stderr, "fiedler: out of memory; choose a smaller --micro-batch or --context\n");
    } catch (const std::exception& e) {
        fmt::print(stderr, "fiedler: internal error: {}\n", e.what());
    }
    return code;
}
