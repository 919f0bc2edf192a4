#include "engine/bench_command.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "engine/bench_infer.h"
#include "engine/bench_samples.h"
#include "engine/bench_step.h"
#include "engine/config.h"
#include "engine/error.h"
#include "engine/files.h"
#include "tests/bench/bench.h"

namespace fiedler {

namespace {

struct BenchArguments {
    std::vector<std::string> words, knobs;
    std::string json, compare;
    int samples = 20, steps = 20;
    bool fail_on_slower = false, small = false, trace = false, list = false;
};

int count_of(const std::string& flag, const std::string& text) {
    int n = 0;
    const auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), n);
    if (status != std::errc{} || end != text.data() + text.size() || n < 1 || n > 100000)
        input_error("fiedler bench: {} = '{}' is not allowed: give a whole number, 1 to 100000", flag, text);
    return n;
}

// Its own flags, in any order; words up to the first knob, since those after it may be its value.
BenchArguments split(const std::vector<std::string>& arguments) {
    BenchArguments b;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        const std::string &a = arguments[i], flag = a.substr(0, a.find('='));
        const auto value = [&]() -> std::string {
            if (flag.size() < a.size()) return a.substr(flag.size() + 1);
            if (i + 1 == arguments.size())
                input_error("fiedler bench: {} needs a value; `fiedler bench --help` says which", flag);
            return arguments[++i];
        };
        if (flag == "--json")
            b.json = value();
        else if (flag == "--compare")
            b.compare = value();
        else if (flag == "--samples")
            b.samples = count_of(flag, value());
        else if (flag == "--steps")
            b.steps = count_of(flag, value());
        else if (a == "--fail-on-slower")
            b.fail_on_slower = true;
        else if (a == "--small")
            b.small = true;
        else if (a == "--trace")
            b.trace = true;
        else if (a == "--list")
            b.list = true;
        else if (!a.starts_with("-") && b.knobs.empty())
            b.words.push_back(a);
        else
            b.knobs.push_back(a);
    }
    return b;
}

struct Work {
    bool step = false, samples = false, kernels = false;
    bench::Options options;
};

Work work_of(const BenchArguments& b) {
    Work w;
    w.options.samples = b.samples;
    w.options.small = b.small;
    w.step = w.kernels = b.words.empty();
    std::vector<std::string> known = bench::family_names();
    for (const std::string& word : b.words) {
        if (word == "step") {
            w.step = true;
        } else if (word == "samples") {
            w.samples = true;
        } else if (word == "kernels") {
            w.kernels = true;
        } else if (std::find(known.begin(), known.end(), word) != known.end()) {
            w.options.families.push_back(word);
        } else {
            known.insert(known.end(), {"step", "samples", "kernels", "infer"});
            const std::string near = nearest_name(word, known);
            input_error("fiedler bench: there is no kernel family '{}'{}; --list names them", word,
                        near.empty() ? "" : fmt::format(" (did you mean {}?)", near));
        }
    }
    if (w.samples && b.words.size() > 1) input_error("fiedler bench: samples has knobs of its own; let it stand alone");
    if (w.kernels) w.options.families.clear();  // all
    w.kernels = w.kernels || !w.options.families.empty();
    return w;
}

void refuse_model_knobs(const Invocation& call) {
    for (const auto& [name, source] : call.source)
        if ((source == Source::flag || source == Source::file) && name != "device" && name != "threads")
            input_error("fiedler bench: {} says something of a model, and the kernels have none; add the word step",
                        name);
}

constexpr const char* kTakes = "--compare takes what an earlier fiedler bench --json wrote";

std::vector<bench::Comparison> compared(const std::string& path, const Json& old, const bench::Result& result) {
    try {
        return bench::compare(old, result);
    } catch (const std::runtime_error& e) {
        input_error("{}: {}; {}", path, e.what(), kTakes);
    }
}

Json read_old(const std::string& path) {
    Json old;
    try {
        old = Json::parse(read_file(path));
    } catch (const nlohmann::json::exception&) {
        input_error("{}: is not JSON; {}", path, kTakes);
    }
    (void)compared(path, old, {});  // is it a result?
    return old;
}

void check_writable(const std::string& json) {
    const std::string folder = std::filesystem::path(json).parent_path().string();
    if (!folder.empty() && !folder_exists(folder))
        input_error("json: {} is no folder that {} could be written to; make it first", folder, json);
}

bench::Result run_kernels(const bench::Options& o, DeviceKind device) {
    const bench::Listener listener{bench::print_header, bench::print_row};
#if FIEDLER_CUDA
    if (device == DeviceKind::cuda) {
        bench::Result result = bench::run_on_cuda(o, listener);
        if (result.rows.empty()) input_error("fiedler bench: these families are of the CPU alone; add --device cpu");
        return result;
    }
#endif
    (void)device;
    return bench::run_on_cpu(o, listener);
}

void run_step(const Invocation& call, DeviceKind device, const BenchArguments& b, bench::Result& result) {
    const auto keep = [&](const bench::StepRow& row) {
        result.steps = {row};
        if (!b.json.empty()) write_file_atomic(b.json, bench::to_json(result).dump(1) + "\n");
    };
    // The time is written before the tracing begins, which is another library's.
    const auto& measure = b.words == std::vector<std::string>{"samples"} ? bench_samples : bench_step;
    const bench::StepRow row = measure(call.config, device, {b.steps, b.trace}, keep);
    if (result.peak.gemm_tflop_s <= 0) result.peak.gemm_tflop_s = row.peak_flops * 1e-12;
    keep(row);
    bench::print_step(row);
}

// Is any row slower than the noise allows?
bool compared_slower(const std::string& path, const Json& old, const bench::Result& result) {
    const std::vector<bench::Comparison> all = compared(path, old, result);
    if (const std::string was = bench::machine_of(old); was != result.machine.name)
        fmt::print("\nnote: {} was measured on {}, this is {}\n", path, was, result.machine.name);
    std::fflush(stdout);
    bench::print_comparison(all);
    return std::any_of(all.begin(), all.end(), [](const auto& c) { return c.verdict == bench::Verdict::slower; });
}

}  // namespace

int run_bench(const std::vector<std::string>& arguments) {
    if (!arguments.empty() && arguments[0] == "infer") return run_bench_infer({arguments.begin() + 1, arguments.end()});
    const BenchArguments b = split(arguments);
    // Samples have knobs that go with data, as a training has.
    const bool on_samples = std::find(b.words.begin(), b.words.end(), "samples") != b.words.end();
    const Invocation call = parse_arguments(on_samples ? Command::train : Command::bench, b.knobs);
    if (call.help) return fmt::print("{}", help_text(Command::bench)), 0;
    if (b.list) return fmt::print("{}\n", fmt::join(bench::family_names(), "\n")), 0;
    const Work work = work_of(b);
    if (!work.step && !work.samples) refuse_model_knobs(call);
    const DeviceKind device = choose_device(call.config.device);
    if (work.step) (void)plan_run(model_spec(call.config), engine_options(call.config, device, true));
    const Json old = b.compare.empty() ? Json() : read_old(b.compare);
    if (!b.json.empty()) check_writable(b.json);

    bench::Result result;
    result.machine = device == DeviceKind::cuda ? bench::this_gpu() : bench::this_cpu();
    if (work.kernels) result = run_kernels(work.options, device);
    if (work.step || work.samples) run_step(call, device, b, result);
    if (!b.json.empty()) write_file_atomic(b.json, bench::to_json(result).dump(1) + "\n");
    const bool slower = !b.compare.empty() && compared_slower(b.compare, old, result);
    return result.failed() || (slower && b.fail_on_slower) ? 1 : 0;
}

}  // namespace fiedler
