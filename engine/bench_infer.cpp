#include "engine/bench_infer.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "engine/bench_batch.h"
#include "engine/error.h"
#include "engine/files.h"
#include "engine/json.h"
#include "engine/quantize.h"
#include "infer/session.h"
#include "kernels/parallel.h"
#include "tests/bench/bench.h"

namespace fiedler {

namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

constexpr const char* kHelp =
    "usage: fiedler bench infer MODEL [knobs]\n"
    "  greedy generation by the CPU runtime: the model as plain scalar loops in f32, in f32, int8 and int4;\n"
    "  then of many texts at once by the engine: on the GPU, where there is one, and on the CPU\n\n"
    "  --threads N                       threads (default 1)\n"
    "  --tokens N                        tokens to generate in one run (default 128)\n"
    "  --prompt-tokens N                 tokens of the prompt (default 64)\n"
    "  --runs N                          runs, of which the fastest counts (default 5)\n"
    "  --cache compact|exact|int8        what is kept of a token (default compact)\n"
    "  --forms LIST                      of plain,f32,int8,int4 (default all)\n"
    "  --batch LIST                      texts at once (default 1,16,64,256; none: without)\n"
    "  --json FILE                       write all figures\n";

struct Arguments {
    std::string model, json;
    std::vector<std::string> forms = {"plain", "f32", "int8", "int4"};
    std::vector<std::int64_t> batches = {1, 16, 64, 256};
    std::int64_t threads = 1, tokens = 128, prompt_tokens = 64, runs = 5;
    CacheKind cache = CacheKind::compact;
    bool help = false;
};

std::int64_t number_of(const std::string& flag, const std::string& text, std::int64_t low, std::int64_t high) {
    std::int64_t n = 0;
    const auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), n);
    if (status != std::errc{} || end != text.data() + text.size() || n < low || n > high)
        input_error("fiedler bench infer: {} = '{}' is not allowed: give a whole number, {} to {}", flag, text, low,
                    high);
    return n;
}
CacheKind cache_of(const std::string& text) {
    for (const CacheKind k : {CacheKind::compact, CacheKind::exact, CacheKind::int8})
        if (text == name_of(k)) return k;
    input_error("fiedler bench infer: --cache = '{}' is not allowed: give compact, exact or int8", text);
}
std::vector<std::string> forms_of(const std::string& text) {
    std::vector<std::string> forms;
    for (std::size_t at = 0; at <= text.size();) {
        const std::size_t end = std::min(text.find(',', at), text.size());
        forms.push_back(text.substr(at, end - at));
        at = end + 1;
        const Arguments all;
        if (std::find(all.forms.begin(), all.forms.end(), forms.back()) == all.forms.end())
            input_error("fiedler bench infer: --forms has no '{}': give some of plain,f32,int8,int4", forms.back());
    }
    return forms;
}

std::vector<std::int64_t> batches_of(const std::string& text) {
    std::vector<std::int64_t> sizes;
    for (std::size_t at = 0; text != "none" && at <= text.size();) {
        const std::size_t end = std::min(text.find(',', at), text.size());
        sizes.push_back(number_of("--batch", text.substr(at, end - at), 1, 65536));
        at = end + 1;
    }
    return sizes;
}

Arguments parse(const std::vector<std::string>& words) {
    Arguments a;
    for (std::size_t i = 0; i < words.size(); ++i) {
        const std::string& word = words[i];
        if (word == "--help" || word == "-h") {
            a.help = true;
            return a;
        }
        if (!word.starts_with("-")) {
            if (!a.model.empty()) input_error("fiedler bench infer: one model, not {} and {}", a.model, word);
            a.model = word;
            continue;
        }
        const std::size_t equals = word.find('=');
        const std::string flag = word.substr(0, equals);
        if (equals == word.npos && i + 1 == words.size()) input_error("fiedler bench infer: {} needs a value", flag);
        const std::string value = equals == word.npos ? words[++i] : word.substr(equals + 1);
        if (flag == "--threads")
            a.threads = number_of(flag, value, 0, 4096);
        else if (flag == "--tokens")
            a.tokens = number_of(flag, value, 2, 1 << 20);
        else if (flag == "--prompt-tokens")
            a.prompt_tokens = number_of(flag, value, 1, 1 << 20);
        else if (flag == "--runs")
            a.runs = number_of(flag, value, 1, 1000);
        else if (flag == "--cache")
            a.cache = cache_of(value);
        else if (flag == "--forms")
            a.forms = forms_of(value);
        else if (flag == "--batch")
            a.batches = batches_of(value);
        else if (flag == "--json")
            a.json = value;
        else
            input_error("fiedler bench infer: there is no flag {}; `fiedler bench infer --help` lists them", flag);
    }
    if (a.model.empty()) throw InputError("fiedler bench infer: name a model: the folder of a run or a .fdl file");
    return a;
}

// A folder of temporary files, gone with it.
struct Scratch {
    std::string path;
    Scratch() : path((std::filesystem::temp_directory_path() / fmt::format("fiedler-bench-{}", ::getpid())).string()) {
        make_folders(path);
    }
    ~Scratch() {
        std::error_code ignored;
        std::filesystem::remove_all(path, ignored);
    }
    Scratch(const Scratch&) = delete;
};

// Bytes a second that the threads read from memory, of a block that no cache holds: the fastest of five passes.
double read_rate(int threads) {
    constexpr std::int64_t kPieces = 64, kWords = (std::int64_t{512} << 20) / 8 / kPieces;
    const std::vector<std::uint64_t> block(static_cast<std::size_t>(kPieces * kWords), 1);
    std::vector<std::uint64_t> sums(kPieces);
    double best = 1e30;
    for (int pass = 0; pass < 5; ++pass) {
        const auto start = Clock::now();
        parallel_for(Cpu{threads}, kPieces, [&](std::int64_t p) {
            std::uint64_t lanes[32] = {};
            for (std::int64_t i = 0; i < kWords; i += 32)
                for (std::int64_t k = 0; k < 32; ++k) lanes[k] += block[static_cast<std::size_t>(p * kWords + i + k)];
            for (const std::uint64_t lane : lanes) sums[static_cast<std::size_t>(p)] += lane;
        });
        best = std::min(best, since(start));
    }
    if (sums[0] == 0) throw RunError("fiedler bench infer: the memory test read nothing");
    return double(block.size()) * 8 / best;
}

struct Row {
    std::string form;
    double tokens_per_second = 0, prompt_tokens_per_second = 0, first_token = 0, load = 0, share = 0;
    std::int64_t file_bytes = 0, weight_bytes = 0, memory_bytes = 0;
};

Row measure(const std::string& form, const std::string& path, const Arguments& a, double rate) {
    Row r;
    r.form = form;
    double decode = 1e30, prompt = 1e30, load = 1e30, first = 1e30;
    SessionOptions o;
    o.threads = static_cast<int>(a.threads);
    o.cache = a.cache;
    o.capacity = a.prompt_tokens + a.tokens;
    o.plain_loops = form == "plain";
    for (std::int64_t run = 0; run < (o.plain_loops ? 1 : a.runs); ++run) {
        const auto start = Clock::now();
        const InferModel model(path);
        Session session(model, o);
        load = std::min(load, since(start));
        std::vector<std::int32_t> tokens;
        for (std::int64_t i = 0; i < a.prompt_tokens; ++i)
            tokens.push_back(static_cast<std::int32_t>((i * 7919 + 13) % model.spec().vocab));
        const auto before = Clock::now();
        session.feed(tokens);
        prompt = std::min(prompt, since(before));
        const auto pick = [&] {
            const auto& z = session.logits();
            return static_cast<std::int32_t>(std::max_element(z.begin(), z.end()) - z.begin());
        };
        std::int32_t next = pick();
        first = std::min(first, since(start));
        const auto begin = Clock::now();
        for (std::int64_t i = 0; i < a.tokens; ++i) {
            session.feed({&next, 1});
            next = pick();
        }
        decode = std::min(decode, since(begin));
        r.file_bytes = static_cast<std::int64_t>(std::filesystem::file_size(path));
        r.weight_bytes = static_cast<std::int64_t>(model.weight_bytes());
        r.memory_bytes = static_cast<std::int64_t>(model.memory_bytes() + session.memory_bytes());
    }
    r.tokens_per_second = double(a.tokens) / decode;
    r.prompt_tokens_per_second = double(a.prompt_tokens) / prompt;
    r.first_token = first;
    r.load = load;
    r.share = r.tokens_per_second * double(r.weight_bytes) / rate;
    return r;
}

std::string file_of(const std::string& form, const Bundle& bundle, const std::string& folder) {
    const std::string path = join_path(folder, (form == "plain" ? "f32" : form) + ".fdl");
    if (file_exists(path)) return path;
    if (form == "int8" || form == "int4") {
        quantize_model(bundle, form == "int8" ? Quant::int8 : Quant::int4, QuantSearch::nearest, path, 0);
        return path;
    }
    const ParamTable table(bundle.spec);
    StoredModel model(bundle.spec, table, bundle.master, bundle.constants, false);
    if (bundle.tokenizer) model.add_tokenizer(*bundle.tokenizer);
    write_weights(path, weights_config(bundle.config, table.parameters), model.tensors);
    return path;
}

Json json_of(const Row& r) {
    return {{"form", r.form},
            {"tokens_per_second", r.tokens_per_second},
            {"prompt_tokens_per_second", r.prompt_tokens_per_second},
            {"first_token_seconds", r.first_token},
            {"load_seconds", r.load},
            {"file_bytes", r.file_bytes},
            {"weight_bytes_per_token", r.weight_bytes},
            {"memory_bytes", r.memory_bytes},
            {"share_of_read_rate", r.share}};
}

Json json_of(const BatchRow& r) {
    return {{"device", r.device},
            {"batch", r.size},
            {"tokens_per_second", r.tokens_per_second},
            {"first_token_seconds", r.first_token},
            {"steps", r.steps},
            {"slot_bytes", r.slot_bytes},
            {"copy_bytes_per_second", r.copy_rate},
            {"share_of_copy_rate", r.share},
            {"cuda_graph", r.recorded}};
}

Json bench_all_batches(const Bundle& bundle, const Arguments& a) {
    Json all = Json::array();
    const BatchBench b{a.batches, a.tokens, a.prompt_tokens, a.runs, static_cast<int>(a.threads)};
    print_batch_header();
    const auto add = [&](DeviceKind device) {
        for (const BatchRow& r : bench_batches(bundle, device, b)) all.push_back(json_of(r));
    };
    if (cuda_device_count() > 0) add(DeviceKind::cuda);
    add(DeviceKind::cpu);
    fmt::print(
        "texts at once in bf16 on a GPU, in f32 on the CPU. first tok.: of all, from their prompts on. of copy: bytes "
        "that\n"
        "a step reads at least (weights, caches), a second, of the rate at which the device copies memory\n");
    return all;
}

}  // namespace

int run_bench_infer(const std::vector<std::string>& words) {
    const Arguments a = parse(words);
    if (a.help) return fmt::print("{}", kHelp), 0;
    const Bundle bundle = load_bundle(a.model);
    const Scratch scratch;
    const double rate = read_rate(static_cast<int>(a.threads));
    const CacheBytes cache = cache_bytes(bundle.spec, a.cache);
    const std::string machine = bench::this_cpu().name;
    fmt::print("{}: {} parameters, prompt of {}, {} tokens, {} thread(s)\n", a.model,
               ParamTable(bundle.spec).parameters, a.prompt_tokens, a.tokens,
               thread_count(Cpu{static_cast<int>(a.threads)}));
    fmt::print("{}; reads {:.1f} GB/s from memory; cache {}, {} bytes a token, {:.1f} % of a key-value cache's\n",
               machine, rate / 1e9, name_of(a.cache), cache.ours, 100.0 * double(cache.ours) / double(cache.key_value));
    fmt::print("{:<6} {:>9} {:>8} {:>10} {:>10} {:>9} {:>10} {:>11} {:>8}\n", "form", "tokens/s", "of f32", "prompt/s",
               "first tok.", "load", "file", "memory", "of read");
    Json all = {{"model", a.model},     {"machine", machine},        {"read_bytes_per_second", rate},
                {"threads", a.threads}, {"cache", name_of(a.cache)}, {"cache_bytes_per_token", cache.ours},
                {"rows", Json::array()}};
    double f32 = 0;
    for (const std::string& form : a.forms) {
        const Row r = measure(form, file_of(form, bundle, scratch.path), a, rate);
        if (form == "f32") f32 = r.tokens_per_second;
        fmt::print("{:<6} {:>9.1f} {:>8} {:>10.0f} {:>7.1f} ms {:>6.1f} ms {:>10} {:>11} {:>6.0f} %\n", r.form,
                   r.tokens_per_second, f32 > 0 ? fmt::format("{:.2f} x", r.tokens_per_second / f32) : "",
                   r.prompt_tokens_per_second, r.first_token * 1e3, r.load * 1e3, bytes_text(r.file_bytes),
                   bytes_text(r.memory_bytes), 100 * r.share);
        std::fflush(stdout);
        all["rows"].push_back(json_of(r));
    }
    fmt::print(
        "plain: loops as first written. first tok.: from opening the file to the first token. of read: bytes of the "
        "weights\n"
        "a second, of what was read from memory above; more than 100 %: the weights stay in a cache\n");
    if (!a.batches.empty() && bundle.spec.causal) all["batches"] = bench_all_batches(bundle, a);
    if (!a.json.empty()) write_file_atomic(a.json, all.dump(1) + "\n");
    return 0;
}

}  // namespace fiedler
