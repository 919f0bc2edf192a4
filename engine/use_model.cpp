#include "engine/use_model.h"

#include <algorithm>

#include "engine/error.h"
#include "engine/prepare_config.h"
#include "infer/session.h"
#include "kernels/parallel.h"

namespace fiedler {

namespace {

class EngineInUse final : public ModelInUse {
  public:
    EngineInUse(Bundle b, const Config& c, const SequenceShape& shape) : ModelInUse(std::move(b)) {
        EngineOptions o = engine_options(c, choose_device(c.device), false);
        o.micro_batch = static_cast<std::int32_t>(shape.rows);
        // No parameter depends on the context: positions are rotations, gates and convolutions, none of them a table.
        if (shape.context > 0) bundle_.spec.context = static_cast<std::int32_t>(shape.context);
        engine_ = make_engine(bundle_.spec, o, bundle_.constants);
        engine_->write(Block::master, bundle_.master.data());
    }
    std::string name() override { return engine_->device_name(); }
    LossSource losses() override {
        const std::int64_t context = bundle_.spec.context;
        return {context, engine_->plan().tokens / context, [this](const Batch& b) { return engine_->loss_sum(b); },
                [this](const Batch& b) { return engine_->token_losses(b); }};
    }
    std::unique_ptr<Decoder> decoder(std::int64_t capacity) override { return engine_->decoder(capacity); }
    std::unique_ptr<BatchDecoder> batch_decoder(const BatchDecoderOptions& o) override {
        return engine_->batch_decoder(o);
    }

  private:
    std::unique_ptr<Engine> engine_;
};

class SessionDecoder final : public Decoder {
  public:
    SessionDecoder(const InferModel& model, const SessionOptions& o) : session_(model, o) {}
    void prefill(const std::vector<std::int32_t>& tokens) override {
        session_.reset();
        session_.feed(tokens);
    }
    void append(std::int32_t token) override { session_.feed({&token, 1}); }
    const std::vector<float>& logits() const override { return session_.logits(); }
    std::int64_t length() const override { return session_.length(); }
    std::size_t cache_bytes_per_token() const override {
        return cache_bytes(session_.model().spec(), session_.options().cache).ours;
    }

  private:
    Session session_;
};

class RuntimeInUse final : public ModelInUse {
  public:
    RuntimeInUse(const std::string& weights, const Config& c, const SequenceShape& shape)
        : ModelInUse({}), model_(weights) {
        bundle_.path = weights;
        bundle_.config = model_.config();
        bundle_.spec = model_.spec();
        if (shape.context > 0) bundle_.spec.context = static_cast<std::int32_t>(shape.context);
        if (!model_.tokenizer_model().empty())
            bundle_.tokenizer = Tokenizer::from_model(model_.tokenizer_model(), weights);
        options_.threads = static_cast<int>(c.threads);
        options_.cache = static_cast<CacheKind>(c.cache);
    }
    std::string name() override {
        const int threads = thread_count(Cpu{options_.threads});
        return fmt::format("cpu runtime ({} thread{}, {} cache)", threads, threads == 1 ? "" : "s",
                           name_of(options_.cache));
    }
    LossSource losses() override {
        SessionOptions o = options_;
        o.capacity = bundle_.spec.context;
        session_ = std::make_unique<Session>(model_, o);
        return {bundle_.spec.context, 1, [this](const Batch& b) { return loss_sum(b); }};
    }
    std::unique_ptr<Decoder> decoder(std::int64_t capacity) override {
        SessionOptions o = options_;
        o.capacity = capacity;
        return std::make_unique<SessionDecoder>(model_, o);
    }

  private:
    double loss_sum(const Batch& b) {
        const Packed seq = b.packed();
        double sum = 0;
        for (std::int32_t s = 0; s < seq.count; ++s) {
            const auto first = static_cast<std::size_t>(seq.sequence_begin(s));
            const auto count = static_cast<std::size_t>(seq.sequence_end(s)) - first;
            const std::span<const std::int32_t> targets(b.targets.data() + first, count);
            if (std::any_of(targets.begin(), targets.end(), [](std::int32_t t) { return t >= 0; }))  // else padding
                sum += session_->loss_sum({b.inputs.data() + first, count}, targets);
        }
        return sum;
    }
    InferModel model_;
    SessionOptions options_;
    std::unique_ptr<Session> session_;
};

}  // namespace

std::unique_ptr<ModelInUse> use_bundle(Bundle b, const Config& c, const SequenceShape& shape) {
    return std::make_unique<EngineInUse>(std::move(b), c, shape);
}
std::unique_ptr<ModelInUse> use_runtime(const std::string& weights, const Config& c, const SequenceShape& shape) {
    return std::make_unique<RuntimeInUse>(weights, c, shape);
}

std::unique_ptr<ModelInUse> use_model(const std::string& path, const Config& c, const SequenceShape& shape) {
    const auto weights = weights_file_of(path);
    if (c.runtime && !weights)
        throw InputError("runtime: the CPU runtime takes a .fdl file; `fiedler export` makes one of a checkpoint");
    if (c.runtime && c.device == DeviceChoice::cuda)
        throw InputError("runtime: is of the CPU; leave --device cuda out");
    if (weights && (c.runtime || (c.device != DeviceChoice::cuda && is_quantised_file(*weights)))) {
        const WeightsFile file(*weights, false);
        if (c.runtime || !file.config().contains("model") ||
            model_spec(config_from_json(file.config()["model"], *weights)).causal)
            return use_runtime(*weights, c, shape);
    }
    return use_bundle(load_bundle(path), c, shape);
}

Dataset data_for(const Bundle& bundle, const Config& c) {
    Config with = c;
    with.vocab = bundle.config.vocab;
    PrepareOptions options = prepare_options(with);
    options.val_fraction = 1;
    const std::string cache = c.data_cache.empty() ? "data/cache" : c.data_cache;
    if (bundle.tokenizer) {
        options.tokenizer = tokenizer_file(bundle, cache);
    } else if (!(c.data.size() == 1 && is_dataset(c.data[0]))) {
        throw InputError(
            fmt::format("model: {} has no tokenizer beside it, so it can only be evaluated on shards", bundle.path));
    }
    Dataset data = Dataset::open(prepare_if_needed(options, cache, stderr).folder);
    match_vocabulary(with, data);
    if (bundle.tokenizer && data.tokenizer() && data.tokenizer()->model() != bundle.tokenizer->model())
        throw InputError(
            fmt::format("data: {} was prepared with another tokenizer than the model's; give the corpus itself",
                        data.info().folder));
    return data;
}

}  // namespace fiedler
