// engine/sample_train.cpp: the command `train` for samples: a run for each seed, and the table over them.
#include "engine/sample_train.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/files.h"
#include "engine/log.h"
#include "engine/run_folder.h"
#include "engine/sample_bundle.h"
#include "engine/sample_training.h"
#include "engine/signals.h"

namespace fiedler {

namespace {

// Knobs that only make sense together, or that others stand for.
Config complete(Config c) {
    if (c.model == "linear") {
        c.layers = 0;
        c.last_norm = false;
    } else if (!c.model.empty() && c.model != "transformer") {
        input_error("model: '{}' is none that can be trained; choose transformer or linear", c.model);
    }
    c.model.clear();
    return c;
}

constexpr const char* kSeedFolder = "seed-";

std::string folder_of_seed(const Config& family, std::int64_t seed) {
    return family.seeds > 1 ? join_path(run_folder(family), kSeedFolder + std::to_string(seed)) : run_folder(family);
}

struct Statistics {
    double mean = 0, deviation = 0;  // of the sample: n - 1
};
Statistics statistics_of(const std::vector<double>& values) {
    Statistics s;
    for (const double v : values) s.mean += v / double(values.size());
    for (const double v : values) s.deviation += (v - s.mean) * (v - s.mean);
    s.deviation = values.size() > 1 ? std::sqrt(s.deviation / double(values.size() - 1)) : 0;
    return s;
}

// Mean and deviation of each metric over the seeds, printed and as JSON.
Json summarise(const std::vector<RunResult>& runs, SampleMetrics RunResult::*part, const char* name) {
    Json out = Json::object();
    if ((runs.front().*part).known == 0) return out;
    const auto metrics = (runs.front().*part).numbers();
    std::string line = fmt::format("{:<5}", name);
    for (std::size_t i = 0; i < metrics.size(); ++i) {
        std::vector<double> values;
        for (const RunResult& r : runs) values.push_back((r.*part).numbers()[i].second);
        const Statistics s = statistics_of(values);
        out[metrics[i].first] = Json{{"mean", s.mean}, {"deviation", s.deviation}, {"values", values}};
        line += fmt::format("  {} {:.4f} +- {:.4f}", metrics[i].first, s.mean, s.deviation);
    }
    fmt::print("{}\n", line);
    return out;
}

class SeedFamily {
  public:
    SeedFamily(Config config, bool resume, bool val_each_epoch)
        : config_(std::move(config)), resume_(resume), val_each_epoch_(val_each_epoch) {}
    int run();

  private:
    void open(std::int64_t seed);
    RunResult run_seed(std::int64_t seed);
    void report(const std::vector<RunResult>&);

    Config config_;
    bool resume_, val_each_epoch_;
    std::unique_ptr<SampleSource> source_;
    std::unique_ptr<SampleLoader> loader_;
    std::unique_ptr<SampleEngine> engine_;
};

void SeedFamily::open(std::int64_t seed) {
    if (source_ && !source_->depends_on_seed()) return;
    Config c = config_;
    c.seed = seed;
    source_ = open_samples(c, nullptr, stdout);
    loader_ = std::make_unique<SampleLoader>(*source_, config_.batch_nodes);
    const ModelSpec spec = model_spec(config_, source_->shape(), loader_->longest());
    engine_.reset();
    engine_ =
        make_sample_engine(spec, loader_->capacity(), engine_options(config_, choose_device(config_.device), true));
    if (config_.epochs > 0) {
        const auto per_epoch = static_cast<std::int64_t>(loader_->of_epoch(static_cast<std::uint64_t>(seed), 0).size());
        config_.steps = config_.epochs * per_epoch;
        if (val_each_epoch_) config_.val_every = per_epoch;
    }
    fmt::print("{}\n", source_->text());
    fmt::print("{}: {} parameters on {}, {} (batches of at most {} nodes)\n", config_.preset,
               count_text(double(engine_->table().parameters)), engine_->device_name(),
               bytes_text(static_cast<std::int64_t>(engine_->plan().bytes)), loader_->capacity().nodes);
}

RunResult SeedFamily::run_seed(std::int64_t seed) {
    open(seed);
    Config c = config_;
    c.seed = seed;
    c.out = folder_of_seed(config_, seed);
    std::unique_ptr<Checkpoint> checkpoint;
    if (resume_)
        if (const std::string found = latest_checkpoint(c.out); !found.empty())
            checkpoint = std::make_unique<Checkpoint>(found);
    RunFolder folder(c.out);
    RunResult r =
        train_samples(c, *source_, *loader_, *engine_, std::move(checkpoint), config_.seed, config_.seeds > 1);
    folder.keep();
    return r;
}

void SeedFamily::report(const std::vector<RunResult>& runs) {
    const RunResult& first = runs.front();
    double seconds = 0;
    for (const RunResult& r : runs) seconds += r.seconds;
    if (runs.size() == 1) {
        if (first.val.known > 0) fmt::print("val    {} (step {})\n", first.val.text(), first.best_step);
        if (first.test.known > 0) fmt::print("test   {}\n", first.test.text());
        const SampleMetrics& shown = first.test.known > 0 ? first.test : first.val;
        if (shown.known > 0 && shown.kind == TargetKind::classes && source_->shape().outputs <= 20)
            fmt::print("{}\n", confusion_text(shown, source_->shape()));
        fmt::print("done: {} steps in {}\nweights     {}\nlog         {}\n", first.steps, duration_text(seconds),
                   first.weights, join_path(run_folder(config_), "log.jsonl"));
        return;
    }
    Json summary{{"seeds", Json::array()}, {"config", to_json(config_)}};
    for (const RunResult& r : runs) summary["seeds"].push_back(r.seed);
    summary["val"] = summarise(runs, &RunResult::val, "val");
    summary["test"] = summarise(runs, &RunResult::test, "test");
    const auto best = std::max_element(runs.begin(), runs.end(), [](const RunResult& a, const RunResult& b) {
        return a.val.known > 0 && b.val.better_than(a.val);
    });
    summary["best_seed"] = best->seed;
    const std::string path = join_path(run_folder(config_), "summary.json");
    write_file_atomic(path, summary.dump(2) + "\n");
    if (source_->depends_on_seed()) open(best->seed);  // its parts and normalisation
    const std::string weights = write_sample_bundle(run_folder(config_), config_, *source_, *engine_, best->best);
    fmt::print("done: {} seeds in {}\nsummary     {}\nweights     {} (seed {}, the best in validation)\n", runs.size(),
               duration_text(seconds), path, weights, best->seed);
}

int SeedFamily::run() {
    std::vector<RunResult> runs;
    for (std::int64_t i = 0; i < config_.seeds; ++i) {
        runs.push_back(run_seed(config_.seed + i));
        const RunResult& r = runs.back();
        if (r.stopped) return 0;
        if (config_.seeds > 1) {
            fmt::print("seed {}: best at step {} of {}{}{}, {}\n", r.seed, r.best_step, r.steps,
                       r.val.known > 0 ? ", val " + r.val.text() : "",
                       r.test.known > 0 ? ", test " + r.test.text() : "", duration_text(r.seconds));
            std::fflush(stdout);
        }
    }
    report(runs);
    return 0;
}

// The checkpoint that --resume means: of the run, or of the newest of its seeds. Empty: none.
std::string checkpoint_to_resume(const Config& c) {
    const std::string from = c.resume == "latest" ? run_folder(c) : c.resume;
    if (is_checkpoint(from)) return from;
    if (const std::string found = latest_checkpoint(from); !found.empty()) return found;
    std::int64_t newest = -1;
    std::string checkpoint;
    std::error_code none;  // no such folder: nothing to go through
    for (const auto& entry : std::filesystem::directory_iterator(from, none)) {
        const std::string name = entry.path().filename().string();
        std::int64_t seed = -1;
        if (!name.starts_with(kSeedFolder)) continue;
        const char* digits = name.c_str() + std::string_view(kSeedFolder).size();
        if (std::from_chars(digits, name.c_str() + name.size(), seed).ptr != name.c_str() + name.size()) continue;
        const std::string found = latest_checkpoint(entry.path().string());
        if (seed > newest && !found.empty()) newest = seed, checkpoint = found;
    }
    return checkpoint;
}

}  // namespace

bool resumes_samples(const Config& c) {
    if (c.resume.empty()) return false;
    const std::string found = checkpoint_to_resume(c);
    return !found.empty() && is_sample_model(found);
}

int run_sample_train(const Invocation& call) {
    const SignalGuard guard;
    Config config = complete(call.config);
    const bool resume = !config.resume.empty();
    if (!call.given("out")) config.out = free_folder(run_folder(config), resume);
    if (resume) {
        const std::string found = checkpoint_to_resume(config);
        if (found.empty())
            input_error("resume: {} holds no checkpoint; start a new run without --resume",
                        config.resume == "latest" ? run_folder(config) : config.resume);
        const Checkpoint checkpoint(found);
        Config saved = config_from_json(checkpoint.meta().config, found);
        saved.seed = checkpoint.meta().data.value("first_seed", saved.seed);
        const std::string around = folder_around(found);
        config = resume_config(saved, call);
        config.out = config.seeds > 1 ? folder_around(around) : around;
        config.resume.clear();
    } else if (const std::string folder = run_folder(config); !is_free(folder)) {
        input_error(
            "out: {} already holds something; name another folder with --out, or add --resume to go on with a "
            "run",
            folder);
    }
    const bool val_each_epoch = config.epochs > 0 && !call.source.contains("val-every");
    return SeedFamily(std::move(config), resume, val_each_epoch).run();
}

}  // namespace fiedler
