// engine/inspect.cpp: `fiedler inspect`: header, tables and statistics of any file that Fiedler writes.
#include <fmt/format.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "engine/bundle.h"
#include "engine/checkpoint.h"
#include "engine/commands.h"
#include "engine/dataset.h"
#include "engine/error.h"
#include "engine/spectrum_file.h"
#include "engine/weights.h"
#include "infer/session.h"
#include "kernels/dtype.h"
#include "kernels/half.h"

namespace fiedler {

namespace {

struct Statistics {
    double mean = 0, deviation = 0;
    double least = std::numeric_limits<double>::infinity(), largest = -least;
    std::int64_t not_finite = 0;
};

template <class Get>
Statistics statistics(std::int64_t n, Get&& get) {
    Statistics s;
    double sum = 0, squares = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        const double x = get(i);
        if (!std::isfinite(x)) {
            ++s.not_finite;
            continue;
        }
        sum += x;
        squares += x * x;
        s.least = std::min(s.least, x);
        s.largest = std::max(s.largest, x);
    }
    const double count = double(std::max<std::int64_t>(n - s.not_finite, 1));
    s.mean = sum / count;
    s.deviation = std::sqrt(std::max(0.0, squares / count - s.mean * s.mean));
    return s;
}

std::string shape_text(const std::vector<std::int64_t>& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

void print_head() {
    fmt::print("{:<36} {:<5} {:<16} {:>12} {:>11} {:>11} {:>11} {:>11}\n", "tensor", "type", "shape", "bytes", "mean",
               "deviation", "least", "largest");
}
void print_row(const std::string& name, const std::string& type, const std::vector<std::int64_t>& shape,
               std::size_t bytes, const Statistics& s) {
    fmt::print("{:<36} {:<5} {:<16} {:>12} {:>11.4g} {:>11.4g} {:>11.4g} {:>11.4g}{}\n", name, type, shape_text(shape),
               bytes, s.mean, s.deviation, s.least, s.largest,
               s.not_finite ? fmt::format("  {} NOT FINITE", s.not_finite) : "");
}

// What decoding keeps of every token, beside what a key-value cache would keep: the engine's own, then the runtime's.
void print_cache(const ModelSpec& spec, std::size_t element) {
    std::size_t ours = 0, theirs = 0;
    for (const LayerSpec& l : spec.layer) {
        const auto c = static_cast<std::size_t>(spec.channels), h = static_cast<std::size_t>(spec.heads);
        theirs += 2 * c * element;
        if (l.kind == LayerKind::dot)
            ours += 2 * c * element;
        else
            ours +=
                c * element + (h * static_cast<std::size_t>(l.scalars) + (spec.has_gate(l) ? h : 0)) * sizeof(float);
    }
    fmt::print("decode cache  {} bytes a token (a key-value cache: {})\n", ours, theirs);
    for (const CacheKind kind : {CacheKind::compact, CacheKind::exact, CacheKind::int8}) {
        const CacheBytes b = cache_bytes(spec, kind);
        fmt::print("cpu runtime   {} bytes a token, {:.1f} % of a key-value cache's {} ({} cache)\n", b.ours,
                   100.0 * double(b.ours) / double(b.key_value), b.key_value, name_of(kind));
    }
}

double value_of(const WeightTensor& t, std::int64_t i) {
    if (t.dtype == "f16") return half_to_float(static_cast<const std::uint16_t*>(t.data)[i]);
    if (t.dtype == "bf16") return double(float(static_cast<const bf16*>(t.data)[i]));
    if (t.dtype == "f64") return static_cast<const double*>(t.data)[i];
    if (t.dtype == "i32") return double(static_cast<const std::int32_t*>(t.data)[i]);
    if (t.dtype == "i64") return double(static_cast<const std::int64_t*>(t.data)[i]);
    if (t.dtype == "u8") return double(static_cast<const std::uint8_t*>(t.data)[i]);
    return double(static_cast<const float*>(t.data)[i]);
}

// What a graph or a spectrum says of itself, beyond its tensors. Reading it checks all that it promises.
void print_kind(const std::string& path, const std::string& kind) {
    if (kind == kGraphKind) {
        const Graph g = read_graph_fdl(path);
        fmt::print("{}\n", statistics_of(g, find_components(g)).text());
    }
    if (kind == kSpectrumKind) {
        const Spectrum s = read_spectrum(path, true);
        if (s.count() > 0)
            fmt::print("{} pairs{}, {} zeros, eigenvalues {:.6g} to {:.6g}\n", s.count(),
                       s.status == SpectrumStatus::partial ? " (PARTIAL)" : "", s.zeros, s.eigenvalues.front(),
                       s.eigenvalues.back());
    }
}

void inspect_weights(const std::string& path) {
    const WeightsFile file(path);
    fmt::print("{}: Fiedler {}, {} tensors, checksums good\n", path, file.kind().empty() ? "weights" : file.kind(),
               file.tensors().size());
    print_head();
    for (const WeightTensor& t : file.tensors()) {
        std::vector<float> widened;
        if (quant_of(t.dtype)) {
            widened.resize(static_cast<std::size_t>(t.elements()));
            tensor_to_f32(path, t, t.shape, widened.data());
        }
        print_row(t.name, t.dtype, t.shape, t.bytes(), statistics(t.elements(), [&](std::int64_t i) {
                      return widened.empty() ? value_of(t, i) : double(widened[static_cast<std::size_t>(i)]);
                  }));
    }
    fmt::print("config  {}\n", file.config().dump());
    print_kind(path, file.kind());
    if (file.config().contains("model") && !file.tensors().empty()) {
        const bool half = file.tensors().front().dtype == "bf16";
        print_cache(model_spec(config_from_json(file.config()["model"], path)), half ? sizeof(bf16) : sizeof(float));
    }
}

void inspect_checkpoint(const std::string& folder) {
    const Checkpoint checkpoint(folder);
    const CheckpointMeta& meta = checkpoint.meta();
    fmt::print("{}: checkpoint of step {}, {} tokens, seed {}, checksums good\n", folder, meta.step, meta.tokens,
               meta.seed);
    const Config config = config_from_json(meta.config, folder);
    const ModelSpec spec = model_spec(config);
    const ParamTable table(spec);
    for (const Block b : kBlocks) {
        const std::string name = name_of(b);
        const auto* values =
            static_cast<const float*>(checkpoint.block(name, static_cast<std::size_t>(table.elements) * sizeof(float)));
        fmt::print("\n{}\n", name);
        print_head();
        for (const ParamTensor& t : table.tensor)
            print_row(t.name, "f32", t.shape(), static_cast<std::size_t>(t.size()) * sizeof(float),
                      statistics(t.size(), [&](std::int64_t i) { return double(values[t.offset + i]); }));
    }
    if (const auto constants = tensors_of(spec, read_constants(checkpoint, config, spec)); !constants.empty()) {
        fmt::print("\nconstants\n");
        print_head();
        for (const ConstantTensor& t : constants)
            print_row(t.name, "f32", t.shape, t.values.size() * sizeof(float),
                      statistics(static_cast<std::int64_t>(t.values.size()),
                                 [&](std::int64_t i) { return double(t.values[static_cast<std::size_t>(i)]); }));
    }
    fmt::print("\ndata    {}\nconfig  {}\n", meta.data.dump(), meta.config.dump());
}

void inspect_shard(const std::string& path) {
    const Shard shard(path);
    const ShardInfo& info = shard.info();
    fmt::print("{}: token shard, {} tokens of {} bytes, {}, largest token {}{}\n", path, info.tokens, info.token_bytes,
               info.foreign ? "not written by Fiedler" : fmt::format("vocabulary {}", info.vocab_size), info.max_token,
               info.checksum ? ", checksum good" : "");
    std::vector<std::int64_t> counts(static_cast<std::size_t>(info.max_token) + 1);
    for (std::int64_t i = 0; i < info.tokens; ++i) ++counts[static_cast<std::size_t>(shard[i])];
    std::int64_t used = 0;
    for (const std::int64_t n : counts) used += n > 0;
    fmt::print("tokens in use  {}, unigram entropy {:.4f} nats a token\n", used, entropy_of_counts(counts));
}

void inspect_dataset(const std::string& folder) {
    const Dataset data = Dataset::open(folder);  // verifies every shard
    const DatasetInfo& info = data.info();
    fmt::print("{}: dataset, vocabulary {}, split {}, checksums good\n", folder, info.vocab_size, info.split);
    for (const auto& [name, split] : {std::pair{"train", &info.train}, std::pair{"val", &info.val}})
        fmt::print("{:<6} {} tokens, {} documents, {} bytes of text, {} shards\n", name, split->tokens,
                   split->documents, split->bytes, split->files.size());
    fmt::print("unigram entropy of val  {:.4f} nats a token\n", info.unigram_entropy);
    if (!info.skipped.empty()) fmt::print("left out  {}\n", info.skipped);
}

void inspect_path(const std::string& path) {
    if (!file_exists(path) && !folder_exists(path)) input_error("{}: there is no such file or folder", path);
    if (is_checkpoint(path)) return inspect_checkpoint(path);
    if (folder_exists(path)) {
        if (is_dataset(path)) return inspect_dataset(path);
        if (file_exists(join_path(path, kWeightsName))) return inspect_weights(join_path(path, kWeightsName));
        return inspect_checkpoint(find_checkpoint(path));
    }
    if (is_weights_file(path)) return inspect_weights(path);
    if (looks_like_shard(path)) return inspect_shard(path);
    input_error(
        "{}: is no file that Fiedler writes (weights, graph or spectrum .fdl, token shard .bin, checkpoint, dataset or "
        "run "
        "folder)",
        path);
}

}  // namespace

int run_inspect(const Invocation& call) {
    if (call.config.files.empty())
        throw InputError("files: nothing to inspect; name a .fdl file, a shard, a checkpoint or a run");
    for (const std::string& path : call.config.files) inspect_path(path);
    return 0;
}

}  // namespace fiedler
