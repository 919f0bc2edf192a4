// engine/sample_training.cpp: the training loop for samples, of one seed.
#include "engine/sample_training.h"
#include "engine/json_fields.h"

#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>

#include "engine/bundle.h"
#include "engine/error.h"
#include "engine/evaluate_samples.h"
#include "engine/files.h"
#include "engine/log.h"
#include "engine/run_folder.h"
#include "engine/sample_bundle.h"
#include "engine/sample_loader.h"
#include "engine/sample_metrics.h"
#include "engine/sample_steps.h"
#include "engine/schedule.h"
#include "engine/signals.h"

namespace fiedler {

namespace {

using Clock = std::chrono::steady_clock;
constexpr const char* kResultName = "result.json";

double seconds_since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

// Weights of another model: tensors of the same name and shape. Outputs are taken over only for the same targets.
std::string start_from(const std::string& path, const ParamTable& table, const SampleShape& shape, float* out) {
    const SampleBundle from = load_sample_bundle(path);
    const ParamTable theirs(model_spec(from.config, from.trained.shape, 1));
    const bool same_targets = from.trained.shape.names == shape.names && from.trained.shape.kind == shape.kind;
    std::int64_t taken = 0, left = 0;
    for (const ParamTensor& t : table.tensor) {
        const ParamTensor* found = theirs.find(t.name);
        if (!found || found->shape() != t.shape() || (!same_targets && t.name.starts_with("output."))) {
            left += t.size();
            continue;
        }
        std::copy_n(from.master.data() + found->offset, t.size(), out + t.offset);
        taken += t.size();
    }
    if (taken == 0) input_error("init-from: {} shares no tensor with this model; give it the same shape", path);
    return fmt::format("starts from {}: {} values taken over, {} new", path, taken, left);
}

class SampleTraining {
  public:
    SampleTraining(Config, const SampleSource&, const SampleLoader&, SampleEngine&, std::unique_ptr<Checkpoint> resumed,
                   std::int64_t first_seed, bool quiet);
    RunResult run();

  private:
    void start();
    void restore(const Checkpoint&);
    void submit();
    void finish_step();
    bool may_submit() const;
    void validate();
    std::string save();
    RunResult finish(bool stopped, const std::string& checkpoint);
    bool has_val() const { return source_.known(Part::val) > 0; }
    bool due(std::int64_t every, std::int64_t step) const {
        return every > 0 && (step % every == 0 || step == config_.steps);
    }
    bool out_of_patience() const { return config_.patience > 0 && since_best_ >= config_.patience; }
    bool over() const { return step_ == config_.steps || out_of_patience(); }

    Config config_;
    const SampleSource& source_;
    const SampleLoader& loader_;
    SampleEngine& engine_;
    std::unique_ptr<Checkpoint> resumed_;
    std::int64_t first_seed_;  // of all the seeds
    bool quiet_;
    std::string folder_;
    Terminal terminal_{stdout};
    std::unique_ptr<RunLog> log_;
    std::unique_ptr<SampleSteps> steps_;
    LearningRate rate_;
    OutlierDetector norms_;
    bool runs_ahead_;
    std::int64_t step_ = 0, submitted_ = 0, samples_ = 0, skipped_ = 0;
    SampleCursor cursor_;  // after the finished steps
    std::int64_t in_flight_samples_ = 0;
    std::vector<float> best_;
    std::optional<SampleMetrics> best_val_;
    std::int64_t best_step_ = 0, since_best_ = 0, saved_step_ = -1;
    double earlier_seconds_ = 0;
    Clock::time_point session_start_ = Clock::now(), interval_start_ = session_start_;
    std::int64_t interval_samples_ = 0, session_steps_ = 0;
};

SampleTraining::SampleTraining(Config config, const SampleSource& source, const SampleLoader& loader,
                               SampleEngine& engine, std::unique_ptr<Checkpoint> resumed, std::int64_t first_seed,
                               bool quiet)
    : config_(std::move(config)),
      source_(source),
      loader_(loader),
      engine_(engine),
      resumed_(std::move(resumed)),
      first_seed_(first_seed),
      quiet_(quiet),
      folder_(run_folder(config_)) {
    rate_ = {config_.schedule, config_.lr,     config_.min_lr_fraction,
             config_.steps,    config_.warmup, config_.decay_fraction};
    const bool results_decide = config_.skip_outliers > 0 || !config_.skip_nonfinite;
    runs_ahead_ = engine_.device_kind() == "cuda" && !results_decide;
}

void SampleTraining::restore(const Checkpoint& checkpoint) {
    const auto elements = static_cast<std::size_t>(engine_.table().elements);
    const auto block = [&](const char* name) {
        return static_cast<const float*>(checkpoint.block(name, elements * sizeof(float)));
    };
    for (const Block b : kBlocks) engine_.write(b, block(name_of(b)));
    best_.assign(block("best"), block("best") + elements);
    const CheckpointMeta& meta = checkpoint.meta();
    step_ = saved_step_ = meta.step;
    samples_ = meta.tokens;
    try {
        if (meta.data.at("fingerprint").get<std::string>() != source_.fingerprint())
            input_error("data: not what the checkpoint {} was trained on; give the same files, or start a new run",
                        checkpoint.folder());
        cursor_ = {whole_number<std::int64_t>(meta.data.at("epoch")),
                   whole_number<std::int64_t>(meta.data.at("position")), step_};
        norms_.restore(meta.state.at("norms").get<std::vector<double>>());
        skipped_ = whole_number<std::int64_t>(meta.state.at("skipped"));
        best_step_ = whole_number<std::int64_t>(meta.state.at("best_step"));
        since_best_ = whole_number<std::int64_t>(meta.state.at("since_best"));
        earlier_seconds_ = meta.state.at("run_seconds").get<double>();
        if (!meta.state.at("best_score").is_null()) {
            SampleMetrics m;  // what better_than looks at
            m.kind = source_.shape().kind;
            m.accuracy = m.roc_auc = meta.state.at("best_score").get<double>();
            m.mse = -m.accuracy;
            m.auc_targets = 1;
            m.loss = meta.state.at("best_loss").get<double>();
            best_val_ = m;
        }
    } catch (const nlohmann::json::exception& e) {
        input_error("{}: its manifest lacks what a resumed run needs ({}); use another checkpoint", checkpoint.folder(),
                    e.what());
    }
}

void SampleTraining::start() {
    if (resumed_) restore(*resumed_);  // it may not belong to this data: nothing of the run is touched before
    steps_ =
        std::make_unique<SampleSteps>(source_, loader_, engine_, static_cast<std::uint64_t>(config_.seed), cursor_);
    log_ = std::make_unique<RunLog>(join_path(folder_, "log.jsonl"), resumed_ != nullptr);
    write_file_atomic(join_path(folder_, "config.toml"), to_toml(config_, Command::train));
    if (!resumed_) {
        best_.resize(static_cast<std::size_t>(engine_.table().elements));
        initialise(engine_.table(), engine_.spec(), static_cast<std::uint64_t>(config_.seed), best_.data());
        if (!config_.init_from.empty())
            terminal_.line(start_from(config_.init_from, engine_.table(), source_.shape(), best_.data()));
        engine_.write(Block::master, best_.data());
        const std::vector<float> zeros(best_.size());
        for (const Block b : {Block::moment1, Block::moment2}) engine_.write(b, zeros.data());
    }
    submitted_ = step_;
    log_->write("start", Json{{"config", to_json(config_)},
                              {"device", engine_.device_name()},
                              {"parameters", engine_.table().parameters},
                              {"memory_bytes", engine_.plan().bytes},
                              {"recompute", name_of(engine_.plan().recompute)},
                              {"shape", to_json(source_.shape())},
                              {"known", Json{{"train", source_.known(Part::train)},
                                             {"val", source_.known(Part::val)},
                                             {"test", source_.known(Part::test)}}},
                              {"step", step_}});
    if (resumed_) terminal_.line(fmt::format("resumed from {} at step {}", resumed_->folder(), step_));
}

// As in training on text: the device gets the next step before this one's result is read, unless something is to happen
// between the two.
bool SampleTraining::may_submit() const {
    if (submitted_ == config_.steps || stop_requested()) return false;
    if (submitted_ == step_) return !out_of_patience();
    const bool pause = (due(config_.val_every, submitted_) && has_val()) || due(config_.checkpoint_every, submitted_);
    return runs_ahead_ && !pause && submitted_ - step_ < SampleEngine::kStepsInFlight;
}

void SampleTraining::submit() {
    const StepSettings s =
        step_settings(config_, submitted_ + 1, rate_(submitted_), norms_.limit(config_.skip_outliers));
    const PreparedBatch& batch = steps_->next();
    in_flight_samples_ += batch.samples;
    engine_.submit_step(batch, s);
    ++submitted_;
}

void SampleTraining::finish_step() {
    const StepResult r = engine_.finish_step();
    ++step_, ++session_steps_;
    if (submitted_ == step_) {
        cursor_ = steps_->cursor();
        samples_ += in_flight_samples_, interval_samples_ += in_flight_samples_;
        in_flight_samples_ = 0;
    }
    norms_.add(r.norm);
    if (r.skipped) {
        ++skipped_;
        log_->write("skip", Json{{"step", step_}, {"loss", r.loss}, {"norm", r.norm}});
        terminal_.line(fmt::format("step {}: skipped, gradient norm {:.3g}, loss {:.4f}", step_, r.norm, r.loss));
        if (!config_.skip_nonfinite && !std::isfinite(r.norm))
            run_error(
                "step {}: the gradient is not finite (loss {}); lower --lr, or let such steps pass with "
                "--skip-nonfinite",
                step_, r.loss);
    }
    if (!(due(config_.log_every, step_) || step_ == 1)) return;
    const double seconds = seconds_since(interval_start_);
    StepProgress p;
    p.step = step_, p.steps = config_.steps;
    p.loss = r.loss, p.norm = r.norm, p.lr = rate_(step_ - 1);
    p.tokens_per_second = seconds > 0 ? double(interval_samples_) / seconds : 0;
    p.unit = "samples";
    p.eta_seconds = seconds_since(session_start_) / double(session_steps_) * double(config_.steps - step_);
    if (!quiet_) {
        std::string text = progress_text(p);
        if (best_val_) text += "  best val " + fmt::format("{:.4f}", std::abs(best_val_->score()));
        terminal_.progress(text);
    }
    log_->write("step", Json{{"step", step_},
                             {"loss", r.loss},
                             {"lr", p.lr},
                             {"norm", r.norm},
                             {"samples", samples_},
                             {"samples_per_second", p.tokens_per_second}});
    interval_start_ = Clock::now(), interval_samples_ = 0;
}

void SampleTraining::validate() {
    const SampleMetrics m = evaluate_samples(engine_, source_, loader_, PartChoice::val);
    const bool better = std::isfinite(m.loss) && (!best_val_ || m.better_than(*best_val_));
    since_best_ = better ? 0 : since_best_ + 1;
    if (better) {
        best_val_ = m, best_step_ = step_;
        engine_.read(Block::master, best_.data());
    }
    Json record = m.to_json(source_.shape());
    record.erase("confusion"), record.erase("classes");
    record["step"] = step_, record["best"] = better;
    log_->write("val", record);
    if (!quiet_ && due(config_.log_every, step_))
        terminal_.line(fmt::format("step {}: validation {}{}", step_, m.text(), better ? " (best)" : ""));
}

std::string SampleTraining::save() {
    CheckpointWriter writer(folder_, step_);
    std::vector<float> values(static_cast<std::size_t>(engine_.table().elements));
    for (const Block b : kBlocks) {
        engine_.read(b, values.data());
        writer.add(name_of(b), values.data(), values.size() * sizeof(float));
        if (b == Block::master && !best_val_) best_ = values;
    }
    writer.add("best", best_.data(), best_.size() * sizeof(float));
    CheckpointMeta meta;
    meta.step = step_;
    meta.tokens = samples_;
    meta.seed = config_.seed;
    meta.config = to_json(config_);
    meta.data = Json{{"epoch", cursor_.epoch},
                     {"position", cursor_.position},
                     {"first_seed", first_seed_},
                     {"fingerprint", source_.fingerprint()},
                     {"samples", about_samples(config_, source_)}};
    meta.state = Json{{"norms", norms_.values()},
                      {"skipped", skipped_},
                      {"best_score", best_val_ ? Json(best_val_->score()) : Json(nullptr)},
                      {"best_loss", best_val_ ? Json(best_val_->loss) : Json(nullptr)},
                      {"best_step", best_step_},
                      {"since_best", since_best_},
                      {"run_seconds", earlier_seconds_ + seconds_since(session_start_)}};
    const std::string folder = writer.commit(meta, config_.keep);
    saved_step_ = step_;
    log_->write("checkpoint", Json{{"step", step_}, {"path", folder}});
    return folder;
}

RunResult SampleTraining::run() {
    start();
    std::string checkpoint;
    for (;;) {
        if (may_submit()) {
            submit();
            continue;
        }
        if (submitted_ == step_) break;
        finish_step();
        if (submitted_ > step_) continue;
        if (due(config_.val_every, step_) && has_val()) validate();
        if (due(config_.checkpoint_every, step_) || stop_requested()) checkpoint = save();
    }
    if (saved_step_ != step_) checkpoint = save();
    return finish(!over(), checkpoint);
}

RunResult SampleTraining::finish(bool stopped, const std::string& checkpoint) {
    RunResult r;
    r.seed = config_.seed, r.steps = step_, r.best_step = best_val_ ? best_step_ : step_, r.stopped = stopped;
    if (!best_val_) engine_.read(Block::master, best_.data());
    r.best = best_;
    engine_.write(Block::master, best_.data());
    if (has_val()) r.val = evaluate_samples(engine_, source_, loader_, PartChoice::val);
    if (source_.known(Part::test) > 0) r.test = evaluate_samples(engine_, source_, loader_, PartChoice::test);
    r.weights = write_sample_bundle(folder_, config_, source_, engine_, best_);
    r.seconds = earlier_seconds_ + seconds_since(session_start_);
    const Json end{{"seed", r.seed},
                   {"steps", r.steps},
                   {"best_step", r.best_step},
                   {"stopped", stopped},
                   {"val", r.val.known > 0 ? r.val.to_json(source_.shape()) : Json(nullptr)},
                   {"test", r.test.known > 0 ? r.test.to_json(source_.shape()) : Json(nullptr)},
                   {"parameters", engine_.table().parameters},
                   {"seconds", r.seconds},
                   {"samples", samples_},
                   {"skipped", skipped_},
                   {"peak_memory_bytes", engine_.plan().bytes},
                   {"device", engine_.device_name()},
                   {"checkpoint", checkpoint},
                   {"weights", r.weights},
                   {"log", log_->path()}};
    log_->write("end", end);
    if (!stopped) write_file_atomic(join_path(folder_, kResultName), end.dump(2) + "\n");
    if (stopped) terminal_.line(fmt::format("stopped at step {} of {}; go on with --resume", step_, config_.steps));
    return r;
}

}  // namespace

RunResult train_samples(const Config& config, const SampleSource& source, const SampleLoader& loader,
                        SampleEngine& engine, std::unique_ptr<Checkpoint> resumed, std::int64_t first_seed,
                        bool quiet) {
    return SampleTraining(config, source, loader, engine, std::move(resumed), first_seed, quiet).run();
}

}  // namespace fiedler
