#include "engine/prepare_config.h"

#include "engine/error.h"
#include "engine/signals.h"

namespace fiedler {

PrepareOptions prepare_options(const Config& c) {
    PrepareOptions o;
    o.corpus.paths = c.data;
    o.corpus.extensions = c.extensions;
    o.corpus.json_field = c.text_field;
    o.corpus.max_bytes = c.max_bytes;
    o.vocab_size = static_cast<int>(c.vocab);
    o.val_fraction = c.val_fraction;
    o.sample_bytes = c.tokenizer_sample_bytes;
    o.threads = static_cast<int>(c.threads);
    o.cancelled = [] { return stop_requested(); };
    return o;
}

Dataset open_dataset(const Config& c, std::FILE* log) {
    const std::string cache = c.data_cache.empty() ? "data/cache" : c.data_cache;
    return Dataset::open(prepare_if_needed(prepare_options(c), cache, log).folder);
}

void match_vocabulary(Config& c, const Dataset& data) {
    const std::int32_t size = data.info().vocab_size;
    if (size > 0 && size != c.vocab)
        input_error(
            "vocab: the model has {} tokens but {} was prepared with {}; set --vocab {}, or prepare the corpus again",
            c.vocab, data.info().folder, size, size);
    if (size > 0) return;
    for (const auto& shard : data.train().shards())  // llm.c's shards do not say: look at what they hold
        if (shard->info().max_token >= c.vocab)
            input_error("vocab: {} holds token {}, so the model needs --vocab {} or more", shard->info().path,
                        shard->info().max_token, shard->info().max_token + 1);
}

}  // namespace fiedler
