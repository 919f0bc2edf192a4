// engine/knobs.cpp: the table of knobs (one row each, see config.h).
#include <algorithm>

#include "engine/config.h"

namespace fiedler {

namespace {

constexpr unsigned kPrepare = bit_of(Command::prepare), kTrain = bit_of(Command::train), kEval = bit_of(Command::eval),
                   kGenerate = bit_of(Command::generate), kPlan = bit_of(Command::plan),
                   kInspect = bit_of(Command::inspect), kSpectrum = bit_of(Command::spectrum),
                   kBench = bit_of(Command::bench), kExport = bit_of(Command::export_model),
                   kImport = bit_of(Command::import_model), kQuantize = bit_of(Command::quantize);
// kMade: what the model is made with, from data that a benchmark does not have.
constexpr unsigned kMade = kTrain | kPlan, kShape = kMade | kBench, kMeasure = kEval | kQuantize,
                   kCorpus = kPrepare | kTrain, kDevice = kTrain | kEval | kGenerate | kSpectrum | kBench | kQuantize;
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
    };
}

std::vector<Knob> data_knobs() {
    using C = Config;
    return {
        {"data",
         &C::data,
         kCorpus | kMeasure,
         "files or folders of text, source code or JSONL",
         {.positional = kPrepare, .on_resume = OnResume::may_change}},
        {"data-cache",
         &C::data_cache,
         kCorpus | kMeasure,
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
         kTrain | kPrepare | kSpectrum | kExport | kImport | kQuantize | kGenerate,
         "what to write: the folder of the run (log, checkpoints, weights), of the dataset or of the spectrum; export, "
         "import and quantize: the file; generate: a .jsonl file, a line for each text",
         {.zero = "runs/PRESET; prepare: below data-cache; spectrum: runs/spectrum-GRAPH; generate: to the terminal"}},
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
         kShape | kEval | kGenerate,
         "how s layers without a window attend: every pair (dense), or exactly the same in near-linear time (tree); "
         "auto "
         "takes the tree where sequences are long enough for it to be the faster",
         {.choices = {"auto", "dense", "tree"}}},
        {"memory-budget",
         &C::memory_budget,
         kShape | kEval | kGenerate | kSpectrum,
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
         kEval | kGenerate | kExport | kImport | kQuantize,
         "folder of a run, a checkpoint, or a .fdl file; import: a folder with model.safetensors and config.json, or a "
         ".gguf file",
         {.positional = kEval | kGenerate | kExport | kImport | kQuantize}},
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
        {"runtime", &C::runtime, kEval | kGenerate,
         "run unquantised weights, too, by the CPU runtime, as quantised ones are without --device cuda"},
    };
}

std::vector<Knob> graph_knobs() {
    using C = Config;
    return {
        {"graph",
         &C::graph,
         kSpectrum,
         "file of a graph: SNAP edge list, CSV, TSV, Matrix Market or a .fdl graph; with --knn or --feature-graph, of "
         "vectors (.npy, CSV); with --tokens, a prepared dataset or its shards",
         {.positional = kSpectrum}},
        {"graph-format",
         choice<&C::graph_format>(),
         kSpectrum,
         "format of the graph file",
         {.choices = {"auto", "edges", "csv", "tsv", "matrix-market"}}},
        {"header",
         choice<&C::header>(),
         kSpectrum,
         "does a CSV or TSV begin with the names of its columns?",
         {.choices = {"auto", "present", "absent"}}},
        {"from-column",
         &C::from_column,
         kSpectrum,
         "column of an edge's first node, by name or number from 1",
         {.zero = "from, source, src, u or the first"}},
        {"to-column",
         &C::to_column,
         kSpectrum,
         "column of an edge's second node",
         {.zero = "to, target, dst, v or the second"}},
        {"weight-column",
         &C::weight_column,
         kSpectrum,
         "column of an edge's weight; none: every edge weighs 1",
         {.zero = "weight, w, or the next column of numbers"}},
        {"ids",
         choice<&C::ids>(),
         kSpectrum,
         "nodes of an edge list are numbers, or names in the order of their appearance",
         {.choices = {"auto", "numbers", "names"}}},
        {"first-id",
         ChoiceField{[](const Config& c) { return c.first_id + 1; }, [](Config& c, int v) { c.first_id = v - 1; }},
         kSpectrum,
         "number of the first node",
         {.choices = {"auto", "0", "1"}}},
        {"gaps",
         choice<&C::gaps>(),
         kSpectrum,
         "numbers that no line mentions: isolated nodes, or dropped",
         {.choices = {"auto", "isolated", "dropped"}}},
        {"nodes",
         &C::nodes,
         kSpectrum,
         "number of nodes, where they are numbers",
         {.low = 0, .high = 2147483647, .zero = "up to the largest"}},
        {"nodes-file", &C::nodes_file, kSpectrum, "file of all nodes, an id a line: those without an edge, too"},
        {"symmetrise", &C::symmetrise, kSpectrum, "take a Matrix Market matrix that is not symmetric: (A + A') / 2"},
        {"knn",
         &C::knn,
         kSpectrum,
         "the graph joins each vector with this many nearest others",
         {.low = 0, .high = 64, .zero = "the file is a graph"}},
        {"metric",
         choice<&C::metric>(),
         kSpectrum,
         "distance of vectors, for --knn",
         {.choices = {"euclidean", "cosine"}}},
        {"knn-weight",
         ChoiceField{[](const Config& c) { return c.knn_weight ? static_cast<int>(*c.knn_weight) + 1 : 0; },
                     [](Config& c, int v) {
                         c.knn_weight.reset();
                         if (v > 0) c.knn_weight = static_cast<KnnWeight>(v - 1);
                     }},
         kSpectrum,
         "weight of an edge between vectors: 1, their similarity, or a Gaussian of their distance; auto: gaussian for "
         "--knn, similarity for --feature-graph",
         {.choices = {"auto", "binary", "similarity", "gaussian"}}},
        {"feature-graph", &C::feature_graph, kSpectrum, "nodes are the columns of the vectors, joined where alike"},
        {"feature-neighbours",
         &C::feature_neighbours,
         kSpectrum,
         "each column is joined with this many others",
         {.low = 1, .high = 64}},
        {"feature-similarity",
         choice<&C::feature_similarity>(),
         kSpectrum,
         "alike: cosine of the columns' magnitudes, of the columns, or of the columns less their means",
         {.choices = {"absolute", "cosine", "correlation"}}},
        {"tokens", &C::tokens, kSpectrum, "nodes are the tokens of a dataset, joined where they stand near each other"},
        {"window", &C::window, kSpectrum, "tokens this far apart are a pair, for --tokens", {.low = 1, .high = 16}},
        {"token-weight",
         choice<&C::token_weight>(),
         kSpectrum,
         "an edge's weight: positive pointwise mutual information, or the number of pairs",
         {.choices = {"ppmi", "count"}}},
        {"min-count", &C::min_count, kSpectrum, "pairs that an edge needs", {.low = 1, .high = kMany}},
        {"token-neighbours",
         &C::token_neighbours,
         kSpectrum,
         "heaviest edges that each token keeps",
         {.low = 1, .high = 65536}},
        {"largest-component", &C::largest_component, kSpectrum, "drop all other components"},
        {"save-graph", &C::save_graph, kSpectrum, "file (.fdl) to save the graph in", {.zero = "it is not saved"}},
    };
}

std::vector<Knob> spectrum_knobs() {
    using C = Config;
    return {
        {"k",
         &C::k,
         kSpectrum,
         "eigenpairs, the smallest; each component of the graph has one with eigenvalue 0",
         {.low = 1, .high = 2147483647}},
        {"beyond-null", &C::beyond_null, kSpectrum, "k pairs beyond the zeros, which are not given out"},
        {"laplacian",
         choice<&C::laplacian>(),
         kSpectrum,
         "D - A, or I - D^-1/2 A D^-1/2",
         {.choices = {"combinatorial", "normalised"}, .choice_flags = true}},
        {"method",
         choice<&C::method>(),
         kSpectrum,
         "dense for few nodes, filter for expander-like graphs, multilevel for mesh-like ones",
         {.choices = {"auto", "dense", "filter", "multilevel"}}},
        {"tolerance",
         &C::tolerance,
         kSpectrum,
         "largest residual ||L u - mu u|| of a converged pair",
         {.low = 0, .high = 1, .zero = "1e-6 of the largest possible eigenvalue"}},
        {"max-iterations",
         &C::max_iterations,
         kSpectrum,
         "iterations after which a result is partial",
         {.low = 1, .high = 1e9}},
        {"start",
         &C::start,
         kSpectrum,
         "vectors to start from: .npy [nodes, columns], or a spectrum file",
         {.zero = "random vectors"}},
        {"allow-partial", &C::allow_partial, kSpectrum | kTrain,
         "a result that has not converged is one (exit code 0), and a file of one may be given (--start, "
         "--spectral-source, --feature-laplacian)"},
        {"json", &C::json, kSpectrum, "one line of JSON on standard output; words go to standard error"},
        {"plot", &C::plot, kSpectrum | kEval,
         "file (.svg) for a plot. spectrum: the eigenvalues, and the nodes on two eigenvectors; eval: the loss by "
         "position"},
        {"labels",
         &C::labels,
         kSpectrum,
         "file of node labels, the colours of the plot: a column, or ids and labels",
         {.zero = "coloured by the third eigenvector"}},
        {"label-column",
         &C::label_column,
         kSpectrum,
         "column of the labels, by name or number from 1",
         {.zero = "the second, or the only one"}},
        {"label-id",
         &C::label_id,
         kSpectrum,
         "column of the nodes' ids in that file",
         {.zero = "the first; with label-column alone: row i is node i"}},
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
