// engine/train.cpp: the training loop and what surrounds it. One step itself: step.cpp.
#include "engine/train.h"
#include "engine/json_fields.h"

#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "engine/bundle.h"
#include "engine/checkpoint.h"
#include "engine/comm.h"
#include "engine/error.h"
#include "engine/evaluate.h"
#include "engine/generate.h"
#include "engine/log.h"
#include "engine/prefetch.h"
#include "engine/prepare_config.h"
#include "engine/run_folder.h"
#include "engine/sample_train.h"
#include "engine/schedule.h"
#include "engine/signals.h"
#include "engine/spectral_source.h"

namespace fiedler {

namespace {

using Clock = std::chrono::steady_clock;
using MicroBatches = std::vector<Batch>;  // of one step

double seconds_since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

class TrainingRun {
  public:
    TrainingRun(Config config, std::unique_ptr<Checkpoint> resumed, const World& world);
    int run();

  private:
    void start();
    void initialise_weights();
    void restore(const Checkpoint&);
    void submit_step();
    void finish_step();
    bool may_submit() const;
    void report(const StepResult&, double lr);
    TrainWindows windows() const;
    Evaluation validate();
    void sample_text();
    std::string save();
    void finish(bool stopped, const std::string& checkpoint);
    bool held_out() const { return data_->val().size() > 0; }
    double share_of_peak(double tokens_per_second) {  // below 0: not known
        const double peak = engine_->measured_peak_flops() * world_.size;
        return peak > 0 ? tokens_per_second * training_flops_per_token(engine_->spec(), engine_->spec().context) / peak
                        : -1;
    }
    bool due(std::int64_t every, std::int64_t step) const {
        return every > 0 && (step % every == 0 || step == config_.steps);
    }
    bool due(std::int64_t every) const { return due(every, step_); }

    Config config_;
    World world_;
    bool leads_;  // rank 0 writes and speaks
    Terminal terminal_{stdout};
    std::string folder_;
    std::optional<RunFolder> made_folder_;  // of the leader
    std::optional<Dataset> data_;
    std::unique_ptr<Engine> engine_;
    std::unique_ptr<Prefetcher<MicroBatches>> batches_;
    std::unique_ptr<RunLog> log_;
    std::unique_ptr<Checkpoint> resumed_;
    LearningRate rate_;
    OutlierDetector norms_, losses_;
    std::int64_t step_ = 0, cursor_ = 0, tokens_ = 0, skipped_ = 0;  // of the steps that are finished
    std::int64_t submitted_ = 0;                                     // the step that the device was given last
    bool runs_ahead_ = false;
    Clock::time_point counted_;  // the time up to here counts for the steps before, or for none
    Clock::time_point session_start_ = Clock::now();
    double earlier_seconds_ = 0;  // of the sessions before this one, all in all
    double train_seconds_ = 0;    // of all sessions, in steps alone
    double session_seconds_ = 0;  // of this one
    std::int64_t session_steps_ = 0;
    double interval_seconds_ = 0;  // since the last line
    std::int64_t interval_steps_ = 0;
    Json constants_report_ = Json::object();  // where a new model's constants came from, to be logged
    Json tau_;                                // measured at the start of a run with energy layers, to be logged
    std::optional<Evaluation> last_validation_;
    std::int64_t validated_step_ = -1, saved_step_ = -1;
};

TrainingRun::TrainingRun(Config config, std::unique_ptr<Checkpoint> resumed, const World& world)
    : config_(std::move(config)), world_(world), leads_(world.rank == 0), resumed_(std::move(resumed)) {
    folder_ = run_folder(config_);
    check_training(config_);
    const DeviceKind device = choose_device(config_.device);
    // A wrong model, too little memory and an output that cannot be written are said before data is prepared.
    (void)plan_run(model_spec(config_), engine_options(config_, device, true));
    if (!resumed_) check_constants(config_, model_spec(config_));
    if (leads_) made_folder_.emplace(folder_);
    data_ = open_dataset(config_, leads_ ? stdout : nullptr);
    match_vocabulary(config_, *data_);
    const ModelSpec spec = model_spec(config_);
    data_->require_train(config_.batch_tokens / config_.context, config_.context);
    if (held_out()) (void)data_->val_windows(config_.context);  // at least one
    const ModelConstants constants =
        resumed_ ? read_constants(*resumed_, config_, spec)
                 : make_constants(config_, spec, *data_, leads_ ? stdout : nullptr, constants_report_);
    engine_ = make_engine(spec, engine_options(config_, device, true), constants);
    if (world_.size > 1 && device == DeviceKind::cpu) (void)make_comm(world_);  // says that it needs CUDA
    rate_ = {config_.schedule, config_.lr,     config_.min_lr_fraction,
             config_.steps,    config_.warmup, config_.decay_fraction};
}

TrainWindows TrainingRun::windows() const {
    return {engine_->plan().micro_batch, config_.context, static_cast<std::uint64_t>(config_.seed),
            config_.document_mask,       world_.rank,     world_.size};
}

void TrainingRun::initialise_weights() {
    std::vector<float> master(static_cast<std::size_t>(engine_->table().elements));
    initialise(engine_->table(), engine_->spec(), static_cast<std::uint64_t>(config_.seed), master.data());
    engine_->write(Block::master, master.data());
    bool energies = false;
    for (const LayerSpec& l : engine_->spec().layer) energies = energies || l.kind == LayerKind::energy;
    if (!energies || !engine_->spec().measured_tau) return;
    // tau from the data: the median energies of the first micro-batch, the same on every process.
    TrainWindows first = windows();
    first.rank = 0, first.world = 1;
    Batch batch;
    data_->train_batch(0, first, batch);
    Json tau = Json::array();
    for (const auto& of_layer : engine_->calibrate_tau(batch)) tau.push_back(of_layer);
    tau_ = tau;
}

void TrainingRun::restore(const Checkpoint& checkpoint) {
    const auto bytes = static_cast<std::size_t>(engine_->table().elements) * sizeof(float);
    for (const Block b : kBlocks) engine_->write(b, static_cast<const float*>(checkpoint.block(name_of(b), bytes)));
    const CheckpointMeta& meta = checkpoint.meta();
    step_ = meta.step;
    tokens_ = meta.tokens;
    try {
        cursor_ = whole_number<std::int64_t>(meta.data.at("cursor"));
        const auto fingerprint = meta.data.at("fingerprint").get<std::string>();
        if (fingerprint != data_->info().fingerprint)
            input_error(
                "data: {} is not what the checkpoint {} was trained on; give the same corpus, or start a new run",
                data_->info().folder, checkpoint.folder());
        norms_.restore(meta.state.at("norms").get<std::vector<double>>());
        losses_.restore(meta.state.at("losses").get<std::vector<double>>());
        skipped_ = whole_number<std::int64_t>(meta.state.at("skipped"));
        train_seconds_ = meta.state.at("train_seconds").get<double>();
        earlier_seconds_ = meta.state.at("run_seconds").get<double>();
    } catch (const nlohmann::json::exception& e) {
        input_error("{}: its manifest lacks what a resumed run needs ({}); use another checkpoint", checkpoint.folder(),
                    e.what());
    }
}

void TrainingRun::start() {
    if (resumed_) restore(*resumed_);  // it may not belong to this data: nothing of the run is touched before
    if (leads_) {
        log_ = std::make_unique<RunLog>(join_path(folder_, "log.jsonl"), resumed_ != nullptr);
        write_file_atomic(join_path(folder_, "config.toml"), to_toml(config_, Command::train));
        if (data_->tokenizer()) write_file_atomic(join_path(folder_, kTokenizerName), data_->tokenizer()->model());
    }
    if (!resumed_) initialise_weights();
    submitted_ = step_;
    const bool results_decide = config_.skip_outliers > 0 || !config_.skip_nonfinite;  // about the step after them
    runs_ahead_ = engine_->device_kind() == "cuda" && !results_decide;
    const TrainWindows w = windows();
    batches_ = std::make_unique<Prefetcher<MicroBatches>>(
        [&data = *data_, w](std::int64_t& cursor, MicroBatches& step) {
            for (Batch& batch : step) {
                data.train_batch(cursor, w, batch);
                cursor += w.rows * w.world;
            }
        },
        std::vector(Prefetcher<MicroBatches>::kAhead + 1,
                    MicroBatches(static_cast<std::size_t>(engine_->plan().micro_batches))),
        cursor_);
    if (!leads_) return;
    made_folder_->keep();
    const RunPlan& plan = engine_->plan();
    const double flops = training_flops_per_token(engine_->spec(), engine_->spec().context);
    log_->write("start", Json{{"config", to_json(config_)},
                              {"device", engine_->device_name()},
                              {"parameters", engine_->table().parameters},
                              {"flops_per_token", flops},
                              {"measured_peak_flops", engine_->measured_peak_flops()},
                              {"memory_bytes", plan.bytes},
                              {"micro_batch", plan.micro_batch},
                              {"micro_batches", plan.micro_batches},
                              {"recompute", name_of(plan.recompute)},
                              {"head_precision", plan.head_fp8 ? "fp8" : "bf16"},
                              {"data", data_->info().folder},
                              {"train_tokens", data_->info().train.tokens},
                              {"val_tokens", data_->info().val.tokens},
                              {"step", step_}});
    if (!constants_report_.empty()) log_->write("constants", constants_report_);
    if (!tau_.is_null()) log_->write("tau", Json{{"tau", tau_}});
    terminal_.line(fmt::format("{}: {} parameters on {}, {} (micro-batch {} x {}, recompute {})", config_.preset,
                               count_text(double(engine_->table().parameters)), engine_->device_name(),
                               bytes_text(static_cast<std::int64_t>(plan.bytes)), plan.micro_batches, plan.micro_batch,
                               name_of(plan.recompute)));
    if (plan.head_fp8 && steps_in_fp8(config_) > 0)
        terminal_.line("vocabulary head: products in 8 bits (fp8)" +
                       (steps_in_fp8(config_) < config_.steps
                            ? fmt::format(" up to step {} of {}, then in bf16", steps_in_fp8(config_), config_.steps)
                            : std::string()));
    else if (config_.head_precision == HeadChoice::fp8 && !plan.head_fp8)
        terminal_.line("vocabulary head: products in bf16; fp8 does not go with this device or these shapes");
    terminal_.line(fmt::format("data: {} ({} training tokens, {} held out)", data_->info().folder,
                               count_text(double(data_->info().train.tokens)),
                               count_text(double(data_->info().val.tokens))));
    if (constants_report_.contains("spectral"))
        terminal_.line(
            fmt::format("spectral embedding: {} columns, {}", engine_->spec().spectral_dims, config_.spectral_source));
    if (constants_report_.contains("feature_laplacian"))
        terminal_.line(
            fmt::format("feature Laplacian: {}", constants_report_["feature_laplacian"]["source"].get<std::string>()));
    if (resumed_) terminal_.line(fmt::format("resumed from {} at step {}", resumed_->folder(), step_));
}

// The device gets the next step before this one's result is read (runs_ahead_), unless something is to happen between
// the two.
bool TrainingRun::may_submit() const {
    if (submitted_ == config_.steps || stop_requested()) return false;
    if (submitted_ == step_) return true;
    const bool pause = (due(config_.val_every, submitted_) && held_out()) || due(config_.sample_every, submitted_) ||
                       due(config_.checkpoint_every, submitted_);
    return runs_ahead_ && !pause && submitted_ - step_ < Engine::kStepsInFlight;
}

void TrainingRun::submit_step() {
    if (submitted_ == step_) counted_ = Clock::now();
    const MicroBatches& micro_batches = batches_->next();
    engine_->submit_step(
        micro_batches, step_settings(config_, submitted_ + 1, rate_(submitted_), norms_.limit(config_.skip_outliers)));
    ++submitted_;
}

void TrainingRun::finish_step() {
    const StepResult r = engine_->finish_step();
    ++step_;
    tokens_ += config_.batch_tokens * world_.size;
    if (submitted_ == step_) cursor_ = batches_->cursor();
    const auto now = Clock::now();
    const double seconds = std::chrono::duration<double>(now - counted_).count();
    counted_ = now;
    train_seconds_ += seconds;
    if (session_steps_++ > 0) session_seconds_ += seconds;  // the first step loads modules and chooses algorithms
    interval_seconds_ += seconds;
    ++interval_steps_;
    report(r, rate_(step_ - 1));
    norms_.add(r.norm);
    losses_.add(r.loss);
    if (r.skipped && !config_.skip_nonfinite && !std::isfinite(r.norm))
        run_error(
            "step {}: the gradient is not finite (loss {}); lower --lr, or let such steps pass with --skip-nonfinite",
            step_, r.loss);
}

void TrainingRun::report(const StepResult& r, double lr) {
    if (r.skipped) {
        ++skipped_;
        if (leads_) {
            log_->write("skip",
                        Json{{"step", step_}, {"loss", r.loss}, {"norm", r.norm}, {"norm_z", norms_.score(r.norm)}});
            terminal_.line(fmt::format("step {}: skipped, gradient norm {:.3g}, loss {:.4f}", step_, r.norm, r.loss));
        }
    }
    if (!leads_ || !(due(config_.log_every) || step_ == 1)) return;
    StepProgress p;
    p.step = step_;
    p.steps = config_.steps;
    p.loss = r.loss;
    p.norm = r.norm;
    p.lr = lr;
    const double tokens = double(config_.batch_tokens * world_.size);
    p.tokens_per_second = tokens * double(interval_steps_) / interval_seconds_;
    p.share_of_peak = share_of_peak(p.tokens_per_second);
    const double per_step = session_steps_ > 1 ? session_seconds_ / double(session_steps_ - 1) : interval_seconds_;
    p.eta_seconds = per_step * double(config_.steps - step_);
    terminal_.progress(progress_text(p));
    log_->write("step", Json{{"step", step_},
                             {"loss", r.loss},
                             {"lr", lr},
                             {"norm", r.norm},
                             {"norm_z", norms_.score(r.norm)},
                             {"loss_z", losses_.score(r.loss)},
                             {"tokens", tokens_},
                             {"tokens_per_second", p.tokens_per_second},
                             {"share_of_peak", p.share_of_peak}});
    interval_seconds_ = 0;
    interval_steps_ = 0;
}

Evaluation TrainingRun::validate() {
    last_validation_ = evaluate(*engine_, *data_, config_.val_tokens, config_.document_mask);
    validated_step_ = step_;
    const Evaluation& e = *last_validation_;
    if (leads_) {
        Json record{
            {"step", step_}, {"val_loss", e.loss}, {"unigram_entropy", e.unigram_entropy}, {"tokens", e.tokens}};
        record["val_bits_per_byte"] = e.bits_per_byte ? Json(*e.bits_per_byte) : Json(nullptr);
        log_->write("val", record);
        terminal_.line(fmt::format("step {}: validation loss {:.4f} nats a token{} ({} tokens, unigram entropy {:.3f})",
                                   step_, e.loss,
                                   e.bits_per_byte ? fmt::format(", {:.4f} bits a byte", *e.bits_per_byte) : "",
                                   count_text(double(e.tokens)), e.unigram_entropy));
    }
    return e;
}

void TrainingRun::sample_text() {
    if (!leads_ || !data_->tokenizer()) return;
    GenerateSettings g;
    g.sampling = {config_.sampling_temperature, config_.top_k, config_.top_p, static_cast<std::uint64_t>(config_.seed)};
    g.max_tokens = config_.sample_tokens;
    const Generated text = generate(*engine_, *data_->tokenizer(), config_.sample_prompt, g);
    log_->write("sample", Json{{"step", step_}, {"prompt", config_.sample_prompt}, {"text", text.text}});
    terminal_.line(fmt::format("step {}: sample: {}{}", step_, config_.sample_prompt, text.text));
}

std::string TrainingRun::save() {
    if (!leads_) return {};
    CheckpointWriter writer(folder_, step_);
    std::vector<float> values(static_cast<std::size_t>(engine_->table().elements));
    for (const Block b : kBlocks) {
        engine_->read(b, values.data());
        writer.add(name_of(b), values.data(), values.size() * sizeof(float));
    }
    add_constants(writer, engine_->spec(), engine_->constants());
    if (data_->tokenizer()) writer.add_copy(join_path(folder_, kTokenizerName), kTokenizerName);
    CheckpointMeta meta;
    meta.step = step_;
    meta.tokens = tokens_;
    meta.seed = config_.seed;
    meta.config = to_json(config_);
    meta.data = Json{{"cursor", cursor_}, {"fingerprint", data_->info().fingerprint}, {"folder", data_->info().folder}};
    meta.state = Json{{"norms", norms_.values()},
                      {"losses", losses_.values()},
                      {"skipped", skipped_},
                      {"train_seconds", train_seconds_},
                      {"run_seconds", earlier_seconds_ + seconds_since(session_start_)}};
    const std::string folder = writer.commit(meta, config_.keep);
    saved_step_ = step_;
    log_->write("checkpoint", Json{{"step", step_}, {"path", folder}});
    return folder;
}

int TrainingRun::run() {
    start();
    std::string checkpoint;
    for (;;) {
        if (may_submit()) {
            submit_step();
            continue;
        }
        if (submitted_ == step_) break;
        finish_step();
        if (submitted_ > step_) continue;  // nothing is due in between
        if (due(config_.val_every) && held_out()) validate();
        if (due(config_.sample_every) && engine_->spec().causal) sample_text();
        if (due(config_.checkpoint_every) || stop_requested()) checkpoint = save();
    }
    const bool stopped = step_ < config_.steps;
    if (saved_step_ != step_) checkpoint = save();
    finish(stopped, checkpoint);
    return 0;
}

void TrainingRun::finish(bool stopped, const std::string& checkpoint) {
    if (!stopped && validated_step_ != step_ && held_out()) validate();
    if (!leads_) return;
    const std::string weights = write_bundle(folder_, config_, *engine_);
    const double counted = double(std::max<std::int64_t>(session_steps_ - 1, 0));  // the first step is not typical
    const double per_second =
        session_seconds_ > 0 ? counted * double(config_.batch_tokens * world_.size) / session_seconds_ : 0;
    const double hours = (earlier_seconds_ + seconds_since(session_start_)) / 3600 * world_.size;
    Json end{
        {"val_loss", last_validation_ ? Json(last_validation_->loss) : Json(nullptr)},
        {"val_bits_per_byte",
         last_validation_ && last_validation_->bits_per_byte ? Json(*last_validation_->bits_per_byte) : Json(nullptr)},
        {"unigram_entropy", last_validation_ ? Json(last_validation_->unigram_entropy) : Json(nullptr)},
        {"stopped", stopped},
        {"steps", step_},
        {"skipped", skipped_},
        {"tokens", tokens_},
        {"tokens_per_second", per_second},
        {"share_of_peak", share_of_peak(per_second)},
        {"parameters", engine_->table().parameters},
        {"peak_memory_bytes", engine_->plan().bytes},
        {"device_bytes_in_use", engine_->device_bytes_in_use()},
        {"device", engine_->device_name()},
        {"device_hours", hours},
        {"checkpoint", checkpoint},
        {"weights", weights},
        {"log", log_->path()}};
    if (config_.price_per_hour > 0) end["cost"] = hours * config_.price_per_hour;
    log_->write("end", end);
    terminal_.line(stopped
                       ? fmt::format("stopped at step {} of {}; go on with --resume", step_, config_.steps)
                       : fmt::format("done: {} steps, {} tokens in {}, {} tokens/s", step_, count_text(double(tokens_)),
                                     duration_text(train_seconds_), count_text(per_second)));
    terminal_.line(
        fmt::format("cost        {:.4f} {}-hours{}", hours, engine_->device_kind() == "cuda" ? "GPU" : "CPU",
                    config_.price_per_hour > 0
                        ? fmt::format(" = {:.4f} at {} an hour", hours * config_.price_per_hour, config_.price_per_hour)
                        : ""));
    terminal_.line("checkpoint  " + checkpoint);
    terminal_.line("weights     " + weights);
    terminal_.line("log         " + log_->path());
}

}  // namespace

int run_train(const Invocation& call) {
    if (call.config.task != Task::text || resumes_samples(call.config)) return run_sample_train(call);
    if (!call.config.model.empty())
        throw InputError("model: choosing one is for samples; give --task, or leave --model out");
    const SignalGuard guard;  // the first SIGINT or SIGTERM ends the preparation, or the run after its step
    Config config = call.config;
    if (!call.given("out")) config.out = default_folder(run_folder(config), !config.resume.empty());
    std::unique_ptr<Checkpoint> resumed;
    if (!config.resume.empty()) {
        const auto notice = [](const std::string& text) { fmt::print(stderr, "{}\n", text); };
        const std::string from = config.resume == "latest" ? run_folder(config) : config.resume;
        resumed = std::make_unique<Checkpoint>(find_checkpoint(from, notice));
        config = resume_config(config_from_json(resumed->meta().config, resumed->folder()), call);
        config.resume.clear();  // how this session began is no part of the run: its config.toml starts it anew
        if (!call.given("out")) config.out = folder_around(resumed->folder());  // also where a run was moved or copied
    } else if (const std::string folder = run_folder(config); !latest_checkpoint(folder).empty()) {
        input_error("out: {} already holds a run; add --resume to go on with it, or name another folder with --out",
                    folder);
    }
    if (config.data.empty())
        throw InputError("data: nothing to train on; add --data with files or folders of text or source code");
    return TrainingRun(std::move(config), std::move(resumed), world_from_environment()).run();
}

}  // namespace fiedler
