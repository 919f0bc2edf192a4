// engine/quantize_command.cpp: `fiedler quantize`: the large matrices of a model (layers, embedding, head and U) as 8- or
// 4-bit integers. The scalars' and the gate's matrices, the convolutions, temperatures and biases stay f32: they are
// 1 to 2 % of the numbers, and attention compares what they give.
#include <fmt/format.h>

#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "engine/bundle.h"
#include "engine/commands.h"
#include "engine/error.h"
#include "engine/quantize.h"
#include "engine/signals.h"
#include "engine/use_model.h"

namespace fiedler {

namespace {

bool is_quantisable(const std::string& name) {
    for (const char* kept : {"attn.scalars.weight", "attn.gate.weight", "spectral.weight"})
        if (name.ends_with(kept)) return false;
    return name == kSpectralTable || (name.ends_with(".weight") && name.find("conv") == name.npos);
}

void check_values(const std::string& path, const WeightTensor& t) {
    const auto* w = static_cast<const float*>(t.data);
    for (std::int64_t i = 0; i < t.elements(); ++i)
        if (!(std::abs(w[i]) < 1e5f))
            input_error("{}: tensor '{}' holds {}, which integers cannot stand for; use a checkpoint from before", path,
                        t.name, w[i]);
}

void print_report(const Quantised& q, Quant kind) {
    fmt::print("{:<34} {:<5} {:<14} {:>11} {:>11} {:>11}\n", "tensor", "type", "shape", "bytes", "error", "largest");
    for (const QuantisedTensor& t : q.tensors) {
        const std::string shape = fmt::format("[{}]", fmt::join(t.shape, ", "));
        if (t.quantised)
            fmt::print("{:<34} {:<5} {:<14} {:>11} {:>10.3f}% {:>11.3g}\n", t.name, kind == Quant::int8 ? "q8" : "q4",
                       shape, t.bytes, 100 * t.error.relative(), t.error.largest);
        else
            fmt::print("{:<34} {:<5} {:<14} {:>11}\n", t.name, "f32", shape, t.bytes);
    }
    fmt::print("error: root mean square of what rounding changed, of that of the values; largest: of one value\n");
}

}  // namespace

Quantised quantize_model(const Bundle& bundle, Quant kind, QuantSearch search, const std::string& out, int threads) {
    const ParamTable table(bundle.spec);
    StoredModel model(bundle.spec, table, bundle.master, bundle.constants, false);
    if (bundle.tokenizer) model.add_tokenizer(*bundle.tokenizer);
    Quantised q;
    std::vector<std::unique_ptr<std::byte[]>> memory;
    for (WeightTensor& t : model.tensors) {
        q.f32_bytes += static_cast<std::int64_t>(t.bytes());
        QuantisedTensor about{t.name, t.shape, is_quantisable(t.name), 0, {}};
        if (about.quantised) {
            check_values(bundle.path, t);
            const QuantShape shape{kind, t.shape[0], t.shape[1]};
            memory.push_back(std::make_unique<std::byte[]>(static_cast<std::size_t>(shape.bytes())));
            about.error = quantise(Cpu{threads}, {static_cast<const float*>(t.data), shape.rows, shape.cols}, shape,
                                   search, memory.back().get());
            t.dtype = kind == Quant::int8 ? "q8" : "q4";
            t.data = memory.back().get();
        }
        about.bytes = static_cast<std::int64_t>(t.bytes());
        q.tensors.push_back(about);
    }
    Json config = weights_config(bundle.config, table.parameters);
    config["quantised"] = {{"bits", kind == Quant::int8 ? 8 : 4},
                           {"scales", search == QuantSearch::nearest ? "nearest" : "least-error"}};
    write_weights(out, config, model.tensors);
    q.bytes = static_cast<std::int64_t>(std::filesystem::file_size(out));
    return q;
}

int run_quantize(const Invocation& call) {
    const SignalGuard guard;
    const Config& c = call.config;
    check_output(c.out);
    const Quant kind = c.bits == QuantBits::int8 ? Quant::int8 : Quant::int4;
    const QuantSearch search = c.scales == QuantScales::nearest ? QuantSearch::nearest : QuantSearch::least_error;
    Bundle bundle = load_bundle(c.model);
    const Quantised q = quantize_model(bundle, kind, search, c.out, static_cast<int>(c.threads));
    print_report(q, kind);
    fmt::print("size        {}, {:.4f} of f32 ({})\n", bytes_text(q.bytes), double(q.bytes) / double(q.f32_bytes),
               bytes_text(q.f32_bytes));
    if (!c.eval.empty()) {
        Config with = c;
        with.data = c.eval;
        const std::int64_t most = call.given("val-tokens") ? c.val_tokens : 0;
        const Dataset data = data_for(bundle, with);
        const auto before = use_bundle(std::move(bundle), c);
        const Evaluation was = evaluate(before->losses(), data, most, c.document_mask);
        fmt::print("before      {:.4f} nats a token ({} tokens on {})\n", was.loss, was.tokens, before->name());
        std::fflush(stdout);
        const auto after = use_runtime(c.out, c);
        const Evaluation is = evaluate(after->losses(), data, most, c.document_mask);
        fmt::print("after       {:.4f} nats a token, {:+.4f} ({})\n", is.loss, is.loss - was.loss, after->name());
    }
    fmt::print("weights     {}\n", c.out);
    return 0;
}

}  // namespace fiedler
