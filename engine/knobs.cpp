// engine/knobs.cpp: the table of knobs (one row each, see config.h).
#include <algorithm>

#include "engine/config.h"
#include "engine/knob_rows.h"

namespace fiedler {

namespace {

std::vector<Knob> model_knobs() {
    using C = Config;
    return {
        {"preset", &C::preset, kShape | kPrepare, "a bundle of knobs, by name"},
        {"task",
         choice<&C::task>(),
         kTrain | kPrepare,
         "what the model learns from: text; nodes of one graph; molecules; time series",
         {.choices = {"text", "nodes", "molecules", "series"}}},
        {"pattern", &C::pattern, kShape,
         "attention of the layers, a letter each: s one scalar, b `scalars` scalars, d dot product; \":N\" after a "
         "letter is a sliding window of N tokens; a short pattern is tiled"},
        {"layers", &C::layers, kShape, "number of layers", {.low = 0, .high = 1024}},
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
        {"spectral-dims",
         &C::spectral_dims,
         kShape | kPrepare,
         "columns of the spectral embedding that is added to the token embedding",
         {.low = 0, .high = 512, .zero = "none"}},
        {"spectral-source", &C::spectral_source, kMade,
         "where the spectral embedding comes from: corpus (eigenvectors of its token graph), random (an orthonormal "
         "matrix, as a control), or a spectrum file of that many tokens"},
        {"spectral-rows", &C::spectral_rows, kMade,
         "lengths of the spectral embedding's rows: unit (every token's row as long as the next, as in normalised "
         "spectral clustering), raw (as the eigenvectors are: frequent tokens are short, rare ones long)"},
        {"feature-laplacian", &C::feature_laplacian, kMade,
         "graph of the energies: path, corpus (from the spectral embedding), auto (corpus where its eigenvectors are "
         "at least as many as a head is wide, else path), or a file: a .npy or CSV matrix of vectors (columns that "
         "correlate are joined), or a spectrum"},
        {"hops",
         &C::hops,
         kTrain,
         "samples: how often the graph convolution is applied before attention",
         {.low = 1, .high = 64}},
        {"input-hops",
         &C::input_hops,
         kTrain,
         "samples: how often a graph convolution is applied to the features' product, before the first layer",
         {.low = 0, .high = 64}},
        {"local", &C::local, kTrain, "samples: what the graph convolution gives goes on beside attention, too"},
        {"last-norm", &C::last_norm, kTrain, "samples: the norm before the outputs"},
        {"input-bias", &C::input_bias, kTrain, "samples: a bias beside the product of the features"},
        {"spectral-start", &C::spectral_start, kTrain,
         "samples: each head's coordinate starts at one column of the spectral embedding, else at random"},
        {"pool",
         choice<&C::pool>(),
         kTrain,
         "samples with one target a sample: its nodes' mean, their sum, a learned weighting, or all side by side "
         "(equal "
         "numbers of nodes only)",
         {.choices = {"mean", "sum", "attention", "flatten"}}},
        {"dropout",
         &C::dropout,
         kTrain,
         "samples: share of what attention and MLP add that is dropped in training",
         {.low = 0, .high = 0.99}},
        {"input-dropout",
         &C::input_dropout,
         kTrain,
         "samples: share of the features that is dropped in training",
         {.low = 0, .high = 0.99}},
        {"node-dropout",
         &C::node_dropout,
         kTrain,
         "samples: share of the nodes all of whose features are dropped in training",
         {.low = 0, .high = 0.99}},
    };
}

std::vector<Knob> data_knobs() {
    using C = Config;
    return {
        {"data",
         &C::data,
         kCorpus | kMeasure | kPredict,
         "files or folders of text, source code or JSONL; molecules: a CSV with SMILES, or what `prepare` made of it; "
         "series: a CSV with dates",
         {.positional = kPrepare, .on_resume = OnResume::may_change}},
        {"data-cache",
         &C::data_cache,
         kCorpus | kMeasure | kPredict,
         "folder for prepared data",
         {.zero = "data/cache", .on_resume = OnResume::may_change}},
        {"text-field", &C::text_field, kCorpus | kMeasure, "field of a JSONL record that holds the text"},
        {"extensions",
         &C::extensions,
         kCorpus | kMeasure,
         "endings of the files to take from folders, as in c,h,txt",
         {.zero = "every text file", .split_commas = true}},
        {"max-bytes",
         &C::max_bytes,
         kCorpus | kMeasure,
         "stop reading the corpus after this much",
         {.low = 0, .high = kMany, .unit = Unit::bytes, .zero = "all"}},
        {"val-fraction",
         &C::val_fraction,
         kCorpus,
         "share of the documents held out for validation",
         {.low = 0, .high = 0.5}},
        {"document-mask", &C::document_mask, kTrain | kMeasure, "tokens do not see other documents of their sequence"},
        {"tokenizer-sample-bytes",
         &C::tokenizer_sample_bytes,
         kCorpus,
         "text that the tokenizer is trained on, at most",
         {.low = 1024, .high = kMany, .unit = Unit::bytes}},
        {"features",
         &C::features,
         kSamples,
         "file of the nodes' features: \"N F entries\" and then pairs column:value, a node a line; or a matrix (.npy, "
         "CSV), a node a row",
         {.zero = "none", .on_resume = OnResume::may_change}},
        {"node-labels",
         &C::node_labels,
         kSamples,
         "file of the nodes' labels: a column, or ids and labels; empty or -1: not known",
         {.zero = "none", .on_resume = OnResume::may_change}},
        {"split",
         &C::split,
         kSamples,
         "nodes: file of the parts, a column of train, val, test or none, or ids and parts; molecules: random, "
         "scaffold, "
         "or a file that --save-split wrote; series: rows or shares of train, val and test, in this order",
         {.zero = "molecules: random; series: 0.7,0.1,0.2", .on_resume = OnResume::may_change}},
        {"normalise-features", &C::normalise_features, kTrain, "nodes: each row of features sums to 1"},
        {"part",
         choice<&C::part>(),
         kEval | kPredict,
         "samples: the part to evaluate or to predict (a file without parts: all of it)",
         {.choices = {"train", "val", "test", "all"}}},
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
        {"head-bf16-fraction",
         &C::head_bf16_fraction,
         kTrain,
         "head-precision fp8: share of the steps, the last ones, that have the head in bf16 again, as validation has "
         "it",
         {.low = 0, .high = 1}},
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
        {"loss",
         choice<&C::loss>(),
         kTrain,
         "samples with numbers as targets: what is minimised (huber: squared up to 1, then absolute)",
         {.choices = {"squared", "absolute", "huber"}}},
        {"label-smoothing",
         &C::label_smoothing,
         kTrain,
         "samples with classes or binary targets: share of a target that is spread over all",
         {.low = 0, .high = 0.99}},
        {"epochs",
         &C::epochs,
         kTrain,
         "samples: passes over the training part, instead of steps",
         {.low = 0, .high = kMany, .zero = "as many as steps say"}},
        {"batch-nodes",
         &C::batch_nodes,
         kTrain,
         "samples: nodes of one optimizer step, at most (one sample always fits)",
         {.low = 1, .high = 1e9, .on_resume = OnResume::must_match}},
        {"patience",
         &C::patience,
         kTrain,
         "samples: validations without a better one after which the run ends; the best weights are kept either way",
         {.low = 0, .high = kMany, .zero = "never"}},
        {"seeds",
         &C::seeds,
         kTrain,
         "samples: runs with seeds seed, seed + 1, ...: mean and deviation of their metrics",
         {.low = 1, .high = 1000, .on_resume = OnResume::must_match}},
    };
}

std::vector<Knob> run_knobs() {
    using C = Config;
    return {
        {"out",
         &C::out,
         kTrain | kPrepare | kSpectrum | kExport | kImport | kQuantize | kGenerate | kPredict,
         "what to write: the folder of the run (log, checkpoints, weights), of the dataset or of the spectrum; export, "
         "import, quantize and predict: the file; generate: a .jsonl file, a line for each text",
         {.zero = "runs/PRESET; prepare: below data-cache; spectrum: runs/spectrum-GRAPH; generate: to the terminal"}},
        {"init-from",
         &C::init_from,
         kTrain,
         "samples: a model to start from: every tensor of the same name and shape, the outputs only for equal targets",
         {.zero = "random weights"}},
        {"resume",
         &C::resume,
         kTrain,
         "go on from the newest checkpoint of the run, or from a given one",
         {.zero = "start anew", .alone = "latest"}},
        {"seed",
         &C::seed,
         kTrain | kPrepare | kGenerate | kSpectrum,
         "seed of everything random",
         {.low = 0, .high = 9e15, .on_resume = OnResume::must_match}},
        {"device",
         choice<&C::device>(),
         kDevice | kPlan | kPrepare,
         "where to compute: auto takes a GPU if there is one",
         {.choices = {"auto", "cuda", "cpu"}}},
        {"threads", &C::threads, kDevice | kPrepare, "CPU threads", {.low = 0, .high = 4096, .zero = "all"}},
        {"recompute",
         choice<&C::recompute>(),
         kShape,
         "activations computed again in the backward pass instead of kept",
         {.choices = {"auto", "none", "mlp", "layer"}}},
        {"cuda-graph",
         choice<&C::cuda_graph>(),
         kTrain | kBench | kGenerate,
         "record a step on the GPU once and replay it, of training or of texts generated at once; auto does, but not "
         "with "
         "document-mask (every step has another number of documents) nor over several processes",
         {.choices = {"auto", "on", "off"}}},
        {"attention",
         choice<&C::attention>(),
         kShape | kEval | kGenerate | kPredict,
         "how s layers without a window attend: every pair (dense), or exactly the same in near-linear time (tree); "
         "auto "
         "takes the tree where sequences are long enough for it to be the faster",
         {.choices = {"auto", "dense", "tree"}}},
        {"attention-skip", &C::attention_skip, kShape | kEval | kGenerate,
         "leave out blocks of keys that the gate has put under the rounding of what a query has (exact in f32); "
         "without: "
         "computes them all"},
        {"kernels",
         choice<&C::kernels>(),
         kShape | kEval | kGenerate | kPredict,
         "on a GPU: auto takes kernels that were written for its own architecture where there are (sm_90); general, "
         "those "
         "that run on every GPU",
         {.choices = {"auto", "general"}}},
        {"head-precision",
         choice<&C::head_precision>(),
         kShape,
         "products of the vocabulary head and its gradients in training: fp8 is the faster, with logits of int8 and "
         "some "
         "7 % of noise of 8-bit floats in each term of a gradient, on GPUs of sm_90 (H100) with channels that 128 "
         "divides, up to 768, a vocabulary "
         "that "
         "16 divides, and micro-batches of a multiple of 64 tokens; elsewhere bf16 is used",
         {.choices = {"bf16", "fp8"}}},
        {"memory-budget",
         &C::memory_budget,
         kShape | kEval | kGenerate | kSpectrum | kPredict,
         "most device memory to use, as in 24GiB",
         {.low = 0, .high = kMany, .unit = Unit::bytes, .zero = "what is free"}},
        {"val-every",
         &C::val_every,
         kTrain,
         "steps between validations",
         {.low = 0, .high = kMany, .unit = Unit::steps, .zero = "only at the end"}},
        {"val-tokens",
         &C::val_tokens,
         kTrain | kMeasure,
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
         kTrain | kEval | kGenerate | kExport | kImport | kQuantize | kPredict,
         "folder of a run, a checkpoint, or a .fdl file; import: a folder with model.safetensors and config.json, or a "
         ".gguf file; train: linear (samples: no layers, no norm) instead of the transformer",
         {.positional = kEval | kGenerate | kExport | kImport | kQuantize | kPredict}},
        {"files", &C::files, kInspect, "files or checkpoints to look into", {.positional = kInspect}},
        {"prompt", &C::prompt, kGenerate, "text to go on from", {.zero = "a new document"}},
        {"prompt-file", &C::prompt_file, kGenerate, "file with the text to go on from, or with many (prompt-format)"},
        {"prompt-format",
         choice<&C::prompt_format>(),
         kGenerate,
         "what prompt-file is: whole, one prompt; lines, one on each line; jsonl, an object with \"prompt\" on each "
         "line; "
         "auto: jsonl where the name ends in .jsonl, else whole",
         {.choices = {"auto", "whole", "lines", "jsonl"}}},
        {"max-tokens",
         &C::max_tokens,
         kGenerate,
         "tokens to generate, at most",
         {.low = 1, .high = 1e9, .unit = Unit::tokens}},
        {"count", &C::count, kGenerate, "texts to generate of each prompt", {.low = 1, .high = 1e6}},
        {"batch",
         &C::batch,
         kGenerate,
         "texts generated at once; as one ends, the next prompt takes its slot",
         {.low = 0, .high = 65536, .zero = "by memory, up to 256 on a GPU and 16 on the CPU"}},
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
        {"format",
         choice<&C::format>(),
         kExport,
         "fdl: one flat file; safetensors: a folder with model.safetensors, config.json and tokenizer.model; gguf: a "
         "container",
         {.choices = {"fdl", "safetensors", "gguf"}}},
        {"dtype",
         choice<&C::dtype>(),
         kExport | kImport,
         "type of the matrices; auto: export writes bf16, import f32",
         {.choices = {"auto", "f32", "bf16"}}},
        {"bits", choice<&C::bits>(), kQuantize, "integers of the large matrices", {.choices = {"int8", "int4"}}},
        {"scales",
         choice<&C::scales>(),
         kQuantize,
         "scale of each group of 32 values: that of the least error, or the largest value",
         {.choices = {"least-error", "nearest"}}},
        {"eval", &C::eval, kQuantize, "corpus or dataset on which the loss before and after is measured"},
        {"cache",
         choice<&C::cache>(),
         kGenerate | kMeasure,
         "CPU runtime: what is kept of each token: compact (values f32, scalars f16), exact (f32), or int8 values",
         {.choices = {"compact", "exact", "int8"}}},
        {"by-position", &C::by_position, kEval, "the loss by the number of tokens before, in buckets that double"},
        {"contexts",
         &C::contexts,
         kEval,
         "the loss of the same tokens for each of these context lengths, as in 256,1024,4096: windows of c tokens that "
         "advance by c/2, their last half scored",
         {.split_commas = true}},
        {"runtime", &C::runtime, kEval | kGenerate,
         "run unquantised weights, too, by the CPU runtime, as quantised ones are without --device cuda"},
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
    add(KnobGroup::data, shaped_data_knobs());
    add(KnobGroup::train, train_knobs());
    add(KnobGroup::run, run_knobs());
    add(KnobGroup::use, use_knobs());
    add(KnobGroup::graph, graph_knobs());
    add(KnobGroup::spectrum, spectrum_knobs());
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
