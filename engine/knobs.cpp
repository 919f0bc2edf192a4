// engine/knobs.cpp: the table of knobs (one row each, see config.h).
#include <algorithm>

#include "engine/config.h"

namespace fiedler {

namespace {

constexpr unsigned kPrepare = bit_of(Command::prepare), kTrain = bit_of(Command::train), kEval = bit_of(Command::eval),
                   kGenerate = bit_of(Command::generate), kPlan = bit_of(Command::plan),
                   kInspect = bit_of(Command::inspect);
constexpr unsigned kShape = kTrain | kPlan, kCorpus = kPrepare | kTrain, kDevice = kTrain | kEval | kGenerate;
constexpr double kMany = 1e15, kBig = 1e300;

template <auto member>
ChoiceField choice() {
    return {[](const Config& c) { return static_cast<int>(c.*member); },
            [](Config& c, int v) { c.*member = static_cast<std::remove_reference_t<decltype(c.*member)>>(v); }};
}

std::vector<Knob> model_knobs() {
    using C = Config;
    return {
        {"preset", &C::preset, kShape | kPrepare, "a bundle of knobs, by name"},
        {"pattern", &C::pattern, kShape,
         "attention of the layers, a letter each: s one scalar, b `scalars` scalars, d dot product; \":N\" after a "
         "letter is a sliding window of N tokens; a short pattern is tiled"},
        {"layers", &C::layers, kShape, "number of layers", {.low = 1, .high = 1024}},
        {"channels", &C::channels, kShape, "width of the model", {.low = 1, .high = 65536}},
        {"heads", &C::heads, kShape, "heads of each layer; they divide the channels", {.low = 1, .high = 1024}},
        {"scalars",
         &C::scalars,
         kShape,
         "scalars a head compares in b layers (s layers have one); they divide the head's channels",
         {.low = 1, .high = 16}},
        {"scalar-kind",
         choice<&C::scalar_kind>(),
         kShape,
         "what the scalars are: learned coordinates, or energies of queries and keys on a feature Laplacian",
         {.choices = {"coordinate", "energy"}}},
        {"temperature",
         choice<&C::temperature>(),
         kShape,
         "the temperature of each head",
         {.choices = {"learned", "fixed"}}},
        {"inverse-temperature",
         &C::inverse_temperature,
         kShape,
         "1/temperature at the start",
         {.low = 0, .high = 1e6, .zero = "by kind: energy 20, energy bands 8, coordinate 2, several coordinates 0.7"}},
        {"tau", &C::tau, kShape,
         "scale of the energies: median-learned or median-fixed (starting at the median of the first batch), or a "
         "number, fixed"},
        {"gate", &C::gate, kShape, "forget gate in s and b layers"},
        {"conv", &C::conv, kShape, "causal convolution of width 4 after the projections"},
        {"rope",
         choice<&C::rope>(),
         kShape,
         "layers that rotate queries and keys (coordinates have neither)",
         {.choices = {"none", "dot", "all"}}},
        {"rope-theta", &C::rope_theta, kShape, "base of the rotary frequencies", {.low = 1, .high = 1e9}},
        {"qk-norm", &C::qk_norm, kShape, "normalise queries and keys of d layers"},
        {"tied", &C::tied, kShape, "the embedding is the vocabulary head too"},
        {"causal", &C::causal, kShape, "tokens see only earlier ones (without it: no gate; for experiments)"},
        {"vocab",
         &C::vocab,
         kShape | kPrepare,
         "size of the vocabulary",
         {.low = 2, .high = 16777216, .unit = Unit::tokens}},
        {"context",
         &C::context,
         kShape,
         "length T of a training sequence",
         {.low = 1, .high = 16777216, .unit = Unit::tokens}},
        {"mlp-hidden",
         &C::mlp_hidden,
         kShape,
         "hidden width of the MLP",
         {.low = 0, .high = 1048576, .zero = "4 x channels"}},
        {"norm-eps", &C::norm_eps, kShape, "epsilon of the norms", {.low = 1e-12, .high = 1}},
        {"init-std", &C::init_std, kShape, "deviation of the initial weights", {.low = 0, .high = 10}},
        {"gate-bias-min",
         &C::gate_bias_min,
         kShape,
         "gate bias of the first head: it remembers e^bias tokens",
         {.low = -30, .high = 30}},
        {"gate-bias-max", &C::gate_bias_max, kShape, "gate bias of the last head", {.low = -30, .high = 30}},
    };
}

std::vector<Knob> data_knobs() {
    using C = Config;
    return {
        {"data",
         &C::data,
         kCorpus | kEval,
         "files or folders of text, source code or JSONL",
         {.positional = kPrepare, .on_resume = OnResume::may_change}},
        {"data-cache",
         &C::data_cache,
         kCorpus | kEval,
         "folder for prepared data",
         {.zero = "data/cache", .on_resume = OnResume::may_change}},
        {"text-field", &C::text_field, kCorpus | kEval, "field of a JSONL record that holds the text"},
        {"extensions",
         &C::extensions,
         kCorpus | kEval,
         "endings of the files to take from folders, as in c,h,txt",
         {.zero = "every text file", .split_commas = true}},
        {"max-bytes",
         &C::max_bytes,
         kCorpus | kEval,
         "stop reading the corpus after this much",
         {.low = 0, .high = kMany, .unit = Unit::bytes, .zero = "all"}},
        {"val-fraction",
         &C::val_fraction,
         kCorpus,
         "share of the documents held out for validation",
         {.low = 0, .high = 0.5}},
        {"document-mask", &C::document_mask, kTrain | kEval, "tokens do not see other documents of their sequence"},
        {"tokenizer-sample-bytes",
         &C::tokenizer_sample_bytes,
         kCorpus,
         "text that the tokenizer is trained on, at most",
         {.low = 1024, .high = kMany, .unit = Unit::bytes}},
    };
}

std::vector<Knob> train_knobs() {
    using C = Config;
    return {
        {"steps",
         &C::steps,
         kTrain,
         "optimizer steps of the whole run",
         {.low = 1, .high = kMany, .unit = Unit::steps}},
        {"batch-tokens",
         &C::batch_tokens,
         kShape,
         "tokens of one optimizer step (of each process, where there are several), a multiple of the context",
         {.low = 1, .high = 1e12, .unit = Unit::tokens, .on_resume = OnResume::must_match}},
        {"micro-batch",
         &C::micro_batch,
         kShape,
         "sequences computed at once; more are accumulated",
         {.low = 0, .high = 1e9, .zero = "chosen to fit the memory"}},
        {"lr", &C::lr, kTrain, "highest learning rate", {.low = 0, .high = 100}},
        {"min-lr-fraction",
         &C::min_lr_fraction,
         kTrain,
         "last learning rate as a share of the highest",
         {.low = 0, .high = 1}},
        {"warmup",
         &C::warmup,
         kTrain,
         "steps over which the learning rate rises",
         {.low = 0, .high = kMany, .unit = Unit::steps}},
        {"schedule",
         choice<&C::schedule>(),
         kTrain,
         "learning rate after the warm-up: wsd is constant, then linear decay",
         {.choices = {"wsd", "cosine", "constant"}}},
        {"decay-fraction", &C::decay_fraction, kTrain, "share of the steps in which wsd decays", {.low = 0, .high = 1}},
        {"beta1", &C::beta1, kTrain, "AdamW: decay of the first moment", {.low = 0, .high = 0.9999999}},
        {"beta2", &C::beta2, kTrain, "AdamW: decay of the second moment", {.low = 0, .high = 0.9999999}},
        {"adam-eps", &C::adam_eps, kTrain, "AdamW: epsilon", {.low = 1e-30, .high = 1}},
        {"weight-decay", &C::weight_decay, kTrain, "AdamW: decoupled decay of matrices", {.low = 0, .high = 10}},
        {"clip",
         &C::clip,
         kTrain,
         "largest gradient norm; larger gradients are scaled down",
         {.low = 0, .high = kBig, .zero = "no clipping"}},
        {"skip-outliers",
         &C::skip_outliers,
         kTrain,
         "skip a step whose gradient norm is this many deviations above those of the last 128",
         {.low = 0, .high = 1e6, .zero = "never"}},
        {"skip-nonfinite", &C::skip_nonfinite, kTrain,
         "skip and report a step with NaN or infinite gradients; without it the run stops there"},
    };
}

std::vector<Knob> run_knobs() {
    using C = Config;
    return {
        {"out",
         &C::out,
         kTrain | kPrepare,
         "folder to write: the run (log, checkpoints, weights), or the dataset",
         {.zero = "runs/PRESET; prepare: below data-cache"}},
        {"resume",
         &C::resume,
         kTrain,
         "go on from the newest checkpoint of the run, or from a given one",
         {.zero = "start anew", .alone = "latest"}},
        {"seed",
         &C::seed,
         kTrain | kPrepare | kGenerate,
         "seed of everything random",
         {.low = 0, .high = 9e15, .on_resume = OnResume::must_match}},
        {"device",
         choice<&C::device>(),
         kDevice | kPlan,
         "where to compute: auto takes a GPU if there is one",
         {.choices = {"auto", "cuda", "cpu"}}},
        {"threads", &C::threads, kDevice | kPrepare, "CPU threads", {.low = 0, .high = 4096, .zero = "all"}},
        {"recompute",
         choice<&C::recompute>(),
         kShape,
         "activations computed again in the backward pass instead of kept",
         {.choices = {"auto", "none", "mlp", "layer"}}},
        {"memory-budget",
         &C::memory_budget,
         kShape | kEval | kGenerate,
         "most device memory to use, as in 24GiB",
         {.low = 0, .high = kMany, .unit = Unit::bytes, .zero = "what is free"}},
        {"val-every",
         &C::val_every,
         kTrain,
         "steps between validations",
         {.low = 0, .high = kMany, .unit = Unit::steps, .zero = "only at the end"}},
        {"val-tokens",
         &C::val_tokens,
         kTrain | kEval,
         "tokens of a validation",
         {.low = 0, .high = kMany, .unit = Unit::tokens, .zero = "the whole held-out split"}},
        {"sample-every",
         &C::sample_every,
         kTrain,
         "steps between samples of text",
         {.low = 0, .high = kMany, .unit = Unit::steps, .zero = "none"}},
        {"sample-tokens",
         &C::sample_tokens,
         kTrain,
         "length of a sample",
         {.low = 1, .high = 1e6, .unit = Unit::tokens}},
        {"sample-prompt", &C::sample_prompt, kTrain, "text that samples begin with", {.zero = "a new document"}},
        {"checkpoint-every",
         &C::checkpoint_every,
         kTrain,
         "steps between checkpoints",
         {.low = 0, .high = kMany, .unit = Unit::steps, .zero = "only at the end"}},
        {"keep", &C::keep, kTrain, "checkpoints kept; older ones are deleted", {.low = 1, .high = 1e6}},
        {"log-every",
         &C::log_every,
         kTrain,
         "steps between lines of the log",
         {.low = 1, .high = kMany, .unit = Unit::steps}},
        {"price-per-hour",
         &C::price_per_hour,
         kTrain,
         "price of the device, for the cost of the run",
         {.low = 0, .high = 1e6, .zero = "no price"}},
    };
}

std::vector<Knob> use_knobs() {
    using C = Config;
    return {
        {"model",
         &C::model,
         kEval | kGenerate,
         "folder of a run, a checkpoint, or a .fdl file",
         {.positional = kEval | kGenerate}},
        {"files", &C::files, kInspect, "files or checkpoints to look into", {.positional = kInspect}},
        {"prompt", &C::prompt, kGenerate, "text to go on from", {.zero = "a new document"}},
        {"prompt-file", &C::prompt_file, kGenerate, "file with the text to go on from"},
        {"max-tokens",
         &C::max_tokens,
         kGenerate,
         "tokens to generate, at most",
         {.low = 1, .high = 1e9, .unit = Unit::tokens}},
        {"count", &C::count, kGenerate, "texts to generate", {.low = 1, .high = 1e6}},
        {"sampling-temperature",
         &C::sampling_temperature,
         kTrain | kGenerate,
         "temperature of sampling",
         {.low = 0, .high = 100, .zero = "always the likeliest token"}},
        {"top-k",
         &C::top_k,
         kTrain | kGenerate,
         "sample from the k likeliest tokens",
         {.low = 0, .high = 16777216, .zero = "from all"}},
        {"top-p",
         &C::top_p,
         kTrain | kGenerate,
         "sample from the likeliest tokens that together have this probability",
         {.low = 1e-6, .high = 1}},
    };
}

std::vector<Knob> all_knobs() {
    std::vector<Knob> all;
    const auto add = [&](KnobGroup group, std::vector<Knob> rows) {
        for (Knob& k : rows) {
            k.group = group;
            if (k.rules.on_resume == OnResume::by_group)
                k.rules.on_resume =
                    group == KnobGroup::model || group == KnobGroup::data ? OnResume::must_match : OnResume::may_change;
            all.push_back(std::move(k));
        }
    };
    add(KnobGroup::model, model_knobs());
    add(KnobGroup::data, data_knobs());
    add(KnobGroup::train, train_knobs());
    add(KnobGroup::run, run_knobs());
    add(KnobGroup::use, use_knobs());
    return all;
}

}  // namespace

const std::vector<Knob>& knobs() {
    static const std::vector<Knob> table = all_knobs();
    return table;
}

const Knob* find_knob(std::string_view name) {
    const auto& all = knobs();
    const auto found = std::find_if(all.begin(), all.end(), [&](const Knob& k) { return name == k.name; });
    return found == all.end() ? nullptr : &*found;
}

}  // namespace fiedler
