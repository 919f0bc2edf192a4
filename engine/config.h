// engine/config.h: ONE table of knobs. A knob's type and default are its field here, everything else about it is its
// row in knobs.cpp; flags, help, TOML, the log header and the checkpoint all come from these two.
//
// Who wins: a flag over a line of the --config file, that over the preset, that over the default. The defaults are
// those of the preset `tiny`. Which knobs a person set is remembered, so that `--resume` can refuse those that must
// not change.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "engine/graph_files.h"
#include "engine/json.h"
#include "engine/knn_graph.h"
#include "engine/model_spec.h"
#include "engine/molecules.h"
#include "engine/schedule.h"
#include "engine/series_table.h"
#include "engine/spectrum.h"
#include "engine/token_graph.h"

namespace fiedler {

enum class ScalarKind { coordinate, energy };
enum class Temperature { learned, fixed };
enum class RecomputeChoice { automatic, none, mlp, layer };
enum class DeviceChoice { automatic, cuda, cpu };
enum class GraphChoice { automatic, on, off };
enum class AttentionChoice { automatic, dense, tree };
enum class KernelChoice { automatic, general };
enum class HeadChoice { bf16, fp8 };
enum class ExportFormat { fdl, safetensors, gguf };
enum class ExportType { automatic, f32, bf16 };
enum class QuantBits { int8, int4 };
enum class QuantScales { least_error, nearest };
enum class PromptFormat { automatic, whole, lines, jsonl };
enum class CacheChoice { compact, exact, int8 };     // as CacheKind (infer/session.h)
enum class Task { text, nodes, molecules, series };  // what a model is trained on; all but text are samples (samples.h)
enum class PoolChoice { mean, sum, attention, flatten };
enum class LossChoice { squared, absolute, huber };  // of numbers
enum class PartChoice { train, val, test, all };

struct Config {
    // model
    std::string preset = "tiny";
    Task task = Task::text;
    std::string pattern = "sssb";
    std::int64_t layers = 4, channels = 128, heads = 4, scalars = 8;
    ScalarKind scalar_kind = ScalarKind::coordinate;
    Temperature temperature = Temperature::learned;
    double inverse_temperature = 0;
    std::string tau = "median-learned";
    bool gate = true, conv = true, qk_norm = true, tied = true, causal = true;
    Rotary rope = Rotary::dot;
    double rope_theta = 10000;
    std::int64_t vocab = 2048, context = 256, mlp_hidden = 0;
    double norm_eps = 1e-6, init_std = 0.02, gate_bias_min = 2, gate_bias_max = 8;
    std::int64_t spectral_dims = 0;
    std::string spectral_source = "corpus", spectral_rows = "unit", feature_laplacian = "auto";
    // model, of samples only
    std::int64_t hops = 1, input_hops = 0;
    bool local = true, last_norm = true, input_bias = true, spectral_start = false;
    PoolChoice pool = PoolChoice::mean;
    double dropout = 0, input_dropout = 0, node_dropout = 0;

    // data
    std::vector<std::string> data;
    std::string data_cache, text_field = "text";
    std::vector<std::string> extensions;
    std::int64_t max_bytes = 0;
    double val_fraction = 0.02;
    bool document_mask = false;
    std::int64_t tokenizer_sample_bytes = std::int64_t{32} << 20;
    std::string features, node_labels, split;  // of the nodes of --graph
    bool normalise_features = true;
    PartChoice part = PartChoice::test;
    // molecules
    std::string smiles_column, id_column, split_shares = "0.8,0.1,0.1", save_split;
    std::vector<std::string> targets;
    bool skip_bad = false, eigenvalues = false;
    MoleculeTargets target_kind = MoleculeTargets::automatic;
    BondTypes bonds = BondTypes::conjugated;
    std::int64_t walk_steps = 0, split_seed = -1, fold = 0, folds = 0;
    double mask = 0;
    // series
    std::string date_column;
    std::vector<std::string> columns;
    SeriesMode series_mode = SeriesMode::independent;
    std::int64_t look_back = 96, horizon = 96, patch = 16, patch_stride = 8, channel_neighbours = 4;
    bool instance_norm = true, path_edges = true, allow_gaps = false;
    bool beyond = false;  // no knob: predict without --part

    // train
    std::int64_t steps = 300, batch_tokens = 4096, micro_batch = 0;
    double lr = 3e-3, min_lr_fraction = 0.02;
    std::int64_t warmup = 30;
    ScheduleKind schedule = ScheduleKind::wsd;
    double decay_fraction = 0.5;
    double head_bf16_fraction = 0;
    double beta1 = 0.9, beta2 = 0.95, adam_eps = 1e-8, weight_decay = 0.1, clip = 1;
    double skip_outliers = 0;
    bool skip_nonfinite = true;
    LossChoice loss = LossChoice::squared;
    double label_smoothing = 0;
    std::int64_t batch_nodes = 4096, epochs = 0, patience = 0, seeds = 1;  // samples

    // run
    std::string out, resume, init_from;
    std::int64_t seed = 1;
    DeviceChoice device = DeviceChoice::automatic;
    std::int64_t threads = 0;
    RecomputeChoice recompute = RecomputeChoice::automatic;
    GraphChoice cuda_graph = GraphChoice::automatic;
    AttentionChoice attention = AttentionChoice::automatic;
    bool attention_skip = true;
    KernelChoice kernels = KernelChoice::automatic;
    HeadChoice head_precision = HeadChoice::bf16;
    std::int64_t memory_budget = 0;
    std::int64_t val_every = 100, val_tokens = 65536;
    std::int64_t sample_every = 100, sample_tokens = 64;
    std::string sample_prompt;
    std::int64_t checkpoint_every = 100, keep = 2, log_every = 1;
    double price_per_hour = 0;

    // use: eval, generate, inspect
    std::string model;
    std::vector<std::string> files;
    std::string prompt, prompt_file;
    PromptFormat prompt_format = PromptFormat::automatic;
    std::int64_t max_tokens = 256, count = 1, batch = 0;
    double sampling_temperature = 0.8;
    std::int64_t top_k = 0;
    double top_p = 1;

    // use: export, import, quantize, and running what they make
    ExportFormat format = ExportFormat::fdl;
    ExportType dtype = ExportType::automatic;
    QuantBits bits = QuantBits::int8;
    QuantScales scales = QuantScales::least_error;
    std::vector<std::string> eval;
    CacheChoice cache = CacheChoice::compact;
    bool runtime = false, by_position = false;
    std::vector<std::string> contexts;  // parse_contexts()

    // graph: what `spectrum` reads
    std::vector<std::string> graph;
    GraphFileFormat graph_format = GraphFileFormat::automatic;
    TableHeader header = TableHeader::automatic;
    std::string from_column, to_column, weight_column;
    GraphIds ids = GraphIds::automatic;
    int first_id = -1;  // -1: as GraphFileOptions says
    GraphGaps gaps = GraphGaps::automatic;
    std::int64_t nodes = 0;
    std::string nodes_file;
    bool symmetrise = false;
    std::int64_t knn = 0;
    KnnMetric metric = KnnMetric::cosine;
    std::optional<KnnWeight> knn_weight;  // default: that of the kind of graph
    std::int64_t feature_neighbours = 8;
    FeatureSimilarity feature_similarity = FeatureSimilarity::absolute;
    bool feature_graph = false, tokens = false;
    std::int64_t window = 5, min_count = 2, token_neighbours = 32;
    TokenWeight token_weight = TokenWeight::ppmi;
    bool largest_component = false;
    std::string save_graph;

    // spectrum
    std::int64_t k = 64;
    bool beyond_null = false;
    LaplacianKind laplacian = LaplacianKind::normalised;
    SpectrumMethod method = SpectrumMethod::automatic;
    double tolerance = 0;
    std::int64_t max_iterations = 500;
    std::string start;
    bool allow_partial = false, json = false;
    std::string plot, labels, label_column, label_id;
};

// ---- the table ------------------------------------------------------------------------------------------------------
enum class Command {
    prepare,
    train,
    eval,
    generate,
    plan,
    inspect,
    spectrum,
    bench,
    export_model,
    import_model,
    quantize,
    predict
};
enum class KnobGroup { model, data, train, run, use, graph, spectrum };
enum class Unit { none, bytes, tokens, steps };
// May --resume give the knob another value than the checkpoint has? By default: not those of model and data.
enum class OnResume { by_group, may_change, must_match };

struct ChoiceField {  // an enum, whose values count the knob's choices
    int (*get)(const Config&);
    void (*set)(Config&, int);
};
using KnobField = std::variant<bool Config::*, std::int64_t Config::*, double Config::*, std::string Config::*,
                               std::vector<std::string> Config::*, ChoiceField>;

struct KnobRules {
    double low = 0, high = 0;  // numbers only, both inclusive
    Unit unit = Unit::none;
    const char* zero = "";                  // what 0 or an empty value means, if it is not a plain value
    std::vector<const char*> choices = {};  // enums only, in the order of the enum's values
    bool choice_flags = false;              // each choice is a flag without a value, too
    const char* alone = "";                 // value of the flag given without one ("": it needs one)
    bool split_commas = false;
    unsigned positional = 0;  // commands whose positional argument this is
    OnResume on_resume = OnResume::by_group;
};
struct Knob {
    const char* name;  // the flag is --name (of one letter: -n, too), the TOML line and the JSON key are name
    KnobField field;
    unsigned commands;  // bit_of(Command) of each command that has it
    const char* help;
    KnobRules rules = {};
    KnobGroup group = KnobGroup::model;
};
constexpr unsigned bit_of(Command c) { return 1u << static_cast<unsigned>(c); }

const std::vector<Knob>& knobs();
const Knob* find_knob(std::string_view name);
const char* name_of(Command);
const char* name_of(KnobGroup);
std::optional<Command> command_named(std::string_view name);
std::vector<std::string> command_names();

// One knob as text, as it would be written after its flag; lists joined with commas.
std::string value_text(const Config&, const Knob&);
// The knob's value in `from`, for `to`.
void copy_knob(Config& to, const Config& from, const Knob&);
// Reads values into the knob. `where` (a flag, a file) opens the message of the InputError.
void set_value(Config&, const Knob&, const std::vector<std::string>& values, const std::string& where);
// The tau knob: measured (the median energy of the first batch) or given, learned or fixed.
struct TauChoice {
    bool measured = true, learned = true;
    double value = 1;
};
TauChoice parse_tau(const std::string& text);
// The contexts knob: even lengths, each above the one before. InputError in one line, without where.
std::vector<std::int64_t> parse_contexts(const std::vector<std::string>& values);
// "18 GiB", "1.5GiB", "400 MB", "1000": InputError with `where` otherwise.
std::int64_t parse_bytes(const std::string& text, const std::string& where);
std::string bytes_text(std::int64_t bytes);  // "1.50 GiB"

// ---- presets (presets.cpp) ------------------------------------------------------------------------------------------
struct Preset {
    const char* name;
    const char* summary;
    std::vector<std::pair<const char*, const char*>> values;  // knob, value: what differs from the defaults
    const char* same_size_as = "";  // mlp-hidden is solved for the parameter count of this preset
};
const std::vector<Preset>& presets();
// Applies a preset over the defaults; InputError on an unknown name (with the known ones).
void apply_preset(Config&, const std::string& name);
Config preset_config(const std::string& name);
// Trainable numbers of the model that the knobs describe.
std::int64_t parameter_count(const Config&);

// ---- from arguments, files and checkpoints --------------------------------------------------------------------------
enum class Source { unset, preset, file, flag };

struct Invocation {
    Command command = Command::train;
    bool help = false;  // help was asked for; nothing else was checked
    Config config;
    std::map<std::string, Source> source;       // knobs that were set, by name
    bool given(const std::string& knob) const;  // by a flag or in the file
};
// Arguments after the command's name. Knobs are checked one by one, not together; InputError in one line.
Invocation parse_arguments(Command, const std::vector<std::string>& arguments);
// The knobs of a TOML file, in order: name and values. InputError names file, line and field.
std::vector<std::pair<std::string, std::vector<std::string>>> read_toml(const std::string& path);

std::string help_text();         // commands and presets
std::string help_text(Command);  // its knobs

// JSON of the whole config, or of one group. Numbers are numbers, enums are their names.
Json to_json(const Config&);
Json to_json(const Config&, KnobGroup);
// Defaults where a knob is absent; InputError on an unknown knob or a bad value. `where` names the file.
Config config_from_json(const Json&, const std::string& where);
// A config file with every knob of the command: `fiedler train --config` of it repeats the run.
std::string to_toml(const Config&, Command);

// What a resumed run uses: the checkpoint's knobs, and over them those given now. InputError where one must not differ.
Config resume_config(const Config& saved, const Invocation& now);

// Knobs that only make sense together, training only (model_spec() checks those of the model). InputError in one line.
void check_training(const Config&);

// "runs/tiny" unless --out says otherwise.
std::string run_folder(const Config&);

// "WHERE: there is no knob 'NAME'; did you mean ...?"
std::string unknown_knob(const std::string& name, const std::string& where);
// The candidate nearest to `name` by edit distance, or "" when none is near.
std::string nearest_name(const std::string& name, const std::vector<std::string>& candidates);

}  // namespace fiedler
