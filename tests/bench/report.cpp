// tests/bench/report.cpp: tables, JSON and comparisons of benchmark results (see bench.h).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <thread>

#include "kernels/device.h"
#include "tests/bench/bench.h"

namespace fiedler::bench {
namespace {

using Json = nlohmann::ordered_json;

// Six digits are more than any of these figures has.
Json number(double v) {
    if (!std::isfinite(v)) return nullptr;
    char text[40];
    std::snprintf(text, sizeof text, "%.6g", v);
    return std::strtod(text, nullptr);
}
Json positive(double v) { return v > 0 ? number(v) : Json(nullptr); }

std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

std::string percent(double share) {
    char text[40];
    std::snprintf(text, sizeof text, "%.1f", share * 100);
    return share > 0 ? text : "-";
}

}  // namespace

Machine this_cpu() { return {"cpu, " + std::to_string(std::thread::hardware_concurrency()) + " threads", "", ""}; }
Machine this_gpu() {
    const CudaDeviceInfo info = cuda_device_info(0);
    return {info.name, version(info.driver_version), version(info.runtime_version)};
}

bool Result::failed() const {
    return std::any_of(rows.begin(), rows.end(), [](const Row& r) { return !r.failure.empty(); });
}

// ---- tables --------------------------------------------------------------------------------------------------------

void print_header(const Machine& m, const Peak& peak) {
    const bool model = !m.cuda.empty();
    std::printf("%s", m.name.c_str());
    if (!m.cuda.empty()) std::printf("; driver for CUDA %s, runtime %s", m.driver.c_str(), m.cuda.c_str());
    std::printf("\nmeasured peak: copy %.1f GB/s (read + written)", peak.copy_gb_s);
    if (peak.gemm_tflop_s > 0) std::printf(", matrix product %.2f TFLOP/s", peak.gemm_tflop_s);
    if (model) std::printf("\n%s", kModelText);
    std::printf("\n%s", kCopyText);
    std::printf("\n\n%-13s %-44s %12s %7s %10s %10s %7s %7s %12s  %s\n", "family", "case", "time us", "noise", "GB/s",
                "TFLOP/s", "% peak", "% copy", "4090 model", "");
}

void print_row(const Row& r) {
    if (!r.failure.empty()) {
        std::printf("%-13s %-44s failed: %s\n", r.family.c_str(), r.name.c_str(), r.failure.c_str());
        return;
    }
    std::string notes, model = "-";
    char text[120];
    if (r.batch > 1) notes = std::to_string(r.batch) + " runs a sample";
    if (r.search.tried > 0) {
        std::snprintf(text, sizeof text, "best of %d searched: %.2f us (ours / best %.3f)", r.search.tried,
                      r.search.best_seconds * 1e6, r.search.own_over_best());
        notes += (notes.empty() ? "" : "; ") + std::string(text);
    }
    if (r.model_seconds > 0) std::snprintf(text, sizeof text, "%.2f", r.model_seconds * 1e6), model = text;
    std::printf("%-13s %-44s %12.2f %6.1f%% %10.1f %10.3f %7s %7s %12s  %s\n", r.family.c_str(), r.name.c_str(),
                r.seconds * 1e6, r.noise * 100, r.gb_s, r.tflop_s, percent(r.share).c_str(),
                percent(r.share_of_copy()).c_str(), model.c_str(), notes.c_str());
    std::fflush(stdout);
}

namespace {

void print_stages(const char* title, const std::vector<Stage>& stages, double whole) {
    std::printf("  %-60s %10s %7s %9s\n", title, "ms a step", "%", "a step");
    for (const Stage& s : stages)
        std::printf("  %-60.60s %10.3f %7s %9lld\n", s.name.c_str(), s.seconds * 1e3,
                    percent(s.seconds / whole).c_str(), static_cast<long long>(s.entered));
}

void print_token_step(const StepRow& r) {
    std::printf("\nstep %s on %s: %.1fM parameters, %lld tokens in %d micro-batches, recompute %s, CUDA graph %s\n",
                r.name.c_str(), r.device.c_str(), double(r.parameters) * 1e-6, static_cast<long long>(r.tokens),
                r.micro_batches, r.recompute.c_str(), r.cuda_graph.c_str());
    std::printf("  %.3f ms a step (noise %.1f%%, %d steps), %.0f tokens/s, %s%% of the measured GEMM peak\n",
                r.seconds * 1e3, r.noise * 100, r.steps, r.tokens_per_second, percent(r.share).c_str());
}

}  // namespace

void print_step(const StepRow& r) {
    constexpr double kGiB = 1073741824.0;
    if (!r.unit.empty()) {
        std::printf(
            "\nsamples %s on %s: %lld parameters, %.1f %s with %lld nodes a step, recompute %s, CUDA graph %s\n",
            r.name.c_str(), r.device.c_str(), static_cast<long long>(r.parameters), r.samples, r.unit.c_str(),
            static_cast<long long>(r.tokens), r.recompute.c_str(), r.cuda_graph.c_str());
        std::printf("  %.3f ms a step (noise %.1f%%, %d steps), %.0f %s/s, %.0f nodes/s\n", r.seconds * 1e3,
                    r.noise * 100, r.steps, r.samples_per_second, r.unit.c_str(), r.tokens_per_second);
        std::printf("  host: %.2f us to make one of the %s ready; a step waits %.3f ms for its batch\n",
                    r.prepare_seconds * 1e6, r.unit.c_str(), r.wait_seconds * 1e3);
    } else {
        print_token_step(r);
    }
    std::printf("  memory: %.2f GiB planned", double(r.planned_bytes) / kGiB);
    if (r.device_bytes > 0) std::printf(", %.2f GiB of the device in use", double(r.device_bytes) / kGiB);
    std::printf("; loss after the last step %.4f\n", r.loss);
    if (!r.stages.empty()) {
        std::printf("  with the clock of the stages: %.3f ms a step\n", r.profiled_seconds * 1e3);
        print_stages("stage", r.stages, r.profiled_seconds);
    }
    if (!r.kernels.empty()) {
        std::printf("  %lld kernels: %.3f ms of a step's %.3f\n", static_cast<long long>(r.kernels_launched),
                    r.kernels_seconds * 1e3, r.seconds * 1e3);
        print_stages("kernel (the ten longest)", r.kernels, r.seconds);
    } else if (!r.kernels_note.empty()) {
        std::printf("  no table of kernels: %s\n", r.kernels_note.c_str());
    }
    std::fflush(stdout);
}

// ---- JSON ----------------------------------------------------------------------------------------------------------

namespace {

Json json_of(const Row& r) {
    Json j{{"family", r.family},
           {"case", r.name},
           {"time_us", number(r.seconds * 1e6)},
           {"noise", number(r.noise)},
           {"bytes", number(r.traffic.bytes)},
           {"flops", number(r.traffic.flops)},
           {"gb_s", number(r.gb_s)},
           {"tflop_s", number(r.tflop_s)},
           {"share_of_peak", positive(r.share)},
           {"share_of_copy", positive(r.share_of_copy())},
           {"copy_us", positive(r.copy_seconds * 1e6)},
           {"model_4090_us", positive(r.model_seconds * 1e6)}};
    if (r.search.tried > 0)
        j["search"] = {{"tried", r.search.tried},
                       {"best", r.search.best},
                       {"best_us", number(r.search.best_seconds * 1e6)},
                       {"ours_us", number(r.search.own_seconds * 1e6)},
                       {"ours_over_best", number(r.search.own_over_best())}};
    return j;
}

Json json_of(const std::vector<Stage>& stages, double whole) {
    Json list = Json::array();
    for (const Stage& s : stages)
        list.push_back({{"name", s.name},
                        {"ms", number(s.seconds * 1e3)},
                        {"share", number(s.seconds / whole)},
                        {"a_step", s.entered}});
    return list;
}

Json json_of(const StepRow& r) {
    Json j{{"name", r.name},
           {"device", r.device},
           {"parameters", r.parameters},
           {"batch_tokens", r.tokens},
           {"context", r.context},
           {"micro_batches", r.micro_batches},
           {"recompute", r.recompute},
           {"cuda_graph", r.cuda_graph},
           {"steps", r.steps},
           {"ms_per_step", number(r.seconds * 1e3)},
           {"noise", number(r.noise)},
           {"tokens_per_second", number(r.tokens_per_second)},
           {"flops_per_token", number(r.flops_per_token)},
           {"measured_peak_flops", positive(r.peak_flops)},
           {"share_of_peak", positive(r.share)},
           {"loss", number(r.loss)},
           {"planned_bytes", r.planned_bytes},
           {"device_bytes_in_use", r.device_bytes > 0 ? Json(r.device_bytes) : Json(nullptr)},
           {"profiled_ms_per_step", positive(r.profiled_seconds * 1e3)},
           {"stages", json_of(r.stages, r.profiled_seconds)},
           {"kernels", json_of(r.kernels, r.seconds)},
           {"kernels_ms", positive(r.kernels_seconds * 1e3)},
           {"kernels_launched", r.kernels_launched},
           {"kernels_note", r.kernels_note}};
    if (!r.unit.empty())
        j["samples"] = {{"unit", r.unit},
                        {"a_step", number(r.samples)},
                        {"per_second", number(r.samples_per_second)},
                        {"nodes_a_step", r.tokens},
                        {"nodes_per_second", number(r.tokens_per_second)},
                        {"prepare_us", number(r.prepare_seconds * 1e6)},
                        {"wait_ms_per_step", number(r.wait_seconds * 1e3)}};
    return j;
}

}  // namespace

Json to_json(const Result& result) {
    Json bench = Json::array(), steps = Json::array(), batched = Json::object(), failed = Json::object();
    for (const Row& r : result.rows) {
        const std::string id = r.family + "/" + r.name;
        if (!r.failure.empty()) {
            failed[id] = r.failure;
            continue;
        }
        if (r.batch > 1) batched[id] = r.batch;
        bench.push_back(json_of(r));
    }
    for (const StepRow& r : result.steps) steps.push_back(json_of(r));
    return {{"gpu", result.machine.name},
            {"driver", result.machine.driver},
            {"cuda", result.machine.cuda},
            {"peak",
             {{"copy_gb_s", positive(result.peak.copy_gb_s)}, {"gemm_tflop_s", positive(result.peak.gemm_tflop_s)}}},
            {"model", kModelText},
            {"copy", kCopyText},
            {"bench", bench},
            {"steps", steps},
            {"runs_per_sample", batched},
            {"failed", failed}};
}

bool write_json(const std::string& path, const Result& result) {
    const std::string text = to_json(result).dump(1) + "\n";
    std::FILE* f = std::fopen(path.c_str(), "w");
    const bool written = f && std::fwrite(text.data(), 1, text.size(), f) == text.size();
    return f && std::fclose(f) == 0 && written;
}

// ---- comparison ----------------------------------------------------------------------------------------------------

const char* name_of(Verdict v) {
    switch (v) {
        case Verdict::faster:
            return "faster";
        case Verdict::same:
            return "same within noise";
        case Verdict::slower:
            return "slower";
    }
    return "?";
}

Verdict verdict_of(double old_seconds, double new_seconds, double allowance) {
    if (new_seconds > old_seconds * (1 + allowance)) return Verdict::slower;
    if (new_seconds * (1 + allowance) < old_seconds) return Verdict::faster;
    return Verdict::same;
}

std::string machine_of(const Json& old) { return old.value("gpu", std::string()); }

namespace {

struct Timed {
    double seconds = 0, noise = 0;
};

// Names and times of an earlier result.
std::map<std::string, Timed> times_of(const Json& old) {
    std::map<std::string, Timed> times;
    for (const Json& row : old.at("bench"))
        times[row.at("family").get<std::string>() + "/" + row.at("case").get<std::string>()] = {
            row.at("time_us").get<double>() * 1e-6, row.at("noise").get<double>()};
    if (old.contains("steps"))
        for (const Json& row : old.at("steps"))
            times["step/" + row.at("name").get<std::string>()] = {row.at("ms_per_step").get<double>() * 1e-3,
                                                                  row.at("noise").get<double>()};
    return times;
}

}  // namespace

std::vector<Comparison> compare(const Json& old, const Result& result) {
    constexpr double kLeast = 0.01;
    std::map<std::string, Timed> before;
    try {
        before = times_of(old);
    } catch (const nlohmann::json::exception& e) {
        throw std::runtime_error(std::string("not a result of benchmarks (") + e.what() + ")");
    }
    std::vector<Comparison> all;
    const auto add = [&](const std::string& name, double seconds, double noise) {
        const auto found = before.find(name);
        if (found == before.end()) return;
        Comparison c{name, found->second.seconds, seconds, std::max({kLeast, noise, found->second.noise})};
        c.verdict = verdict_of(c.old_seconds, c.new_seconds, c.allowance);
        all.push_back(c);
    };
    for (const Row& r : result.rows)
        if (r.failure.empty()) add(r.family + "/" + r.name, r.seconds, r.noise);
    for (const StepRow& r : result.steps) add("step/" + r.name, r.seconds, r.noise);
    return all;
}

void print_comparison(const std::vector<Comparison>& all) {
    std::printf("\n%-58s %12s %12s %8s %7s  %s\n", "compared", "before us", "now us", "now/old", "noise", "verdict");
    int count[3] = {};
    for (const Comparison& c : all) {
        ++count[static_cast<int>(c.verdict)];
        std::printf("%-58.58s %12.2f %12.2f %8.3f %6.1f%%  %s\n", c.name.c_str(), c.old_seconds * 1e6,
                    c.new_seconds * 1e6, c.ratio(), c.allowance * 100, name_of(c.verdict));
    }
    std::printf("%d faster, %d same within noise, %d slower\n", count[0], count[1], count[2]);
}

}  // namespace fiedler::bench
