// infer/fiedler_infer.cpp: the C interface. Nothing is thrown through it.
#include "infer/fiedler_infer.h"

#include <algorithm>
#include <new>

#include "engine/error.h"
#include "engine/sampling.h"
#include "infer/session.h"

struct fiedler_model {
    fiedler::InferModel model;
};
struct fiedler_session {
    fiedler::Session session;
};

namespace {

thread_local std::string last_error;

int failed(const char* why, int code) {
    try {
        last_error = why;
    } catch (const std::bad_alloc&) {
        last_error.clear();
    }
    return code;
}
// f(), or its failure's code.
template <class F>
int guarded(F&& f) {
    try {
        f();
        return FIEDLER_OK;
    } catch (const fiedler::InputError& e) {
        return failed(e.what(), FIEDLER_BAD_INPUT);
    } catch (const std::bad_alloc&) {
        return failed("out of memory; choose a smaller capacity", FIEDLER_FAILED);
    } catch (const std::exception& e) {
        return failed(e.what(), FIEDLER_FAILED);
    }
}
const fiedler::PieceTokenizer& tokenizer_of(const fiedler_model* m) {
    if (!m->model.tokenizer())
        fiedler::input_error("{}: has no tokenizer inside or beside it; `fiedler export` puts one inside",
                             m->model.path());
    return *m->model.tokenizer();
}

}  // namespace

extern "C" {

const char* fiedler_error(void) { return last_error.c_str(); }

fiedler_model* fiedler_load(const char* path) {
    fiedler_model* m = nullptr;
    guarded([&] {
        if (!path) throw fiedler::InputError("path: is NULL; name a .fdl file");
        m = new fiedler_model{fiedler::InferModel(path)};
    });
    return m;
}
void fiedler_free(fiedler_model* m) { delete m; }
int32_t fiedler_vocab(const fiedler_model* m) { return m->model.spec().vocab; }
int32_t fiedler_context(const fiedler_model* m) { return m->model.spec().context; }

int64_t fiedler_encode(const fiedler_model* m, const char* text, size_t bytes, int32_t* tokens, int64_t room) {
    int64_t count = 0;
    const int code = guarded([&] {
        const std::vector<std::int32_t> all = tokenizer_of(m).encode({text, bytes});
        count = static_cast<int64_t>(all.size());
        std::copy_n(all.begin(), std::clamp<int64_t>(room, 0, count), tokens);
    });
    return code == FIEDLER_OK ? count : code;
}
const char* fiedler_piece(const fiedler_model* m, int32_t token, size_t* bytes) {
    const char* piece = nullptr;
    guarded([&] {
        const fiedler::PieceTokenizer& t = tokenizer_of(m);
        if (token < 0 || token >= t.vocab_size())
            fiedler::input_error("token {} lies outside the tokenizer's vocabulary of {}", token, t.vocab_size());
        if (bytes) *bytes = t.bytes(token).size();
        piece = t.bytes(token).c_str();
    });
    return piece;
}
int32_t fiedler_separator(const fiedler_model* m) {
    int32_t separator = 0;
    const int code = guarded([&] { separator = tokenizer_of(m).separator(); });
    return code == FIEDLER_OK ? separator : code;
}

fiedler_session* fiedler_start(const fiedler_model* m, int threads, int64_t capacity, int cache) {
    fiedler_session* s = nullptr;
    guarded([&] {
        if (!m) throw fiedler::InputError("model: is NULL; load one first");
        if (threads < 0 || threads > 4096) fiedler::input_error("threads: {}; give 0 (all) to 4096", threads);
        if (cache < FIEDLER_CACHE_COMPACT || cache > FIEDLER_CACHE_INT8)
            fiedler::input_error("cache: there is no kind {}; give one of FIEDLER_CACHE_...", cache);
        fiedler::SessionOptions o;
        o.threads = threads;
        o.cache = static_cast<fiedler::CacheKind>(cache);
        o.capacity = capacity;
        s = new fiedler_session{fiedler::Session(m->model, o)};
    });
    return s;
}
void fiedler_end(fiedler_session* s) { delete s; }
void fiedler_reset(fiedler_session* s) { s->session.reset(); }

int fiedler_feed(fiedler_session* s, const int32_t* tokens, int64_t count) {
    return guarded([&] { s->session.feed({tokens, static_cast<std::size_t>(std::max<int64_t>(count, 0))}); });
}
const float* fiedler_logits(const fiedler_session* s) { return s->session.logits().data(); }
int32_t fiedler_pick(const fiedler_session* s, const fiedler_sampling* how) {
    int32_t token = 0;
    const int code = guarded([&] {
        fiedler::SamplingSettings settings;
        settings.temperature = 0;
        if (how) settings = {how->temperature, how->top_k, how->top_p, how->seed};
        token = fiedler::sample(s->session.logits(), settings, static_cast<std::uint64_t>(s->session.length()));
    });
    return code == FIEDLER_OK ? token : code;
}
int64_t fiedler_length(const fiedler_session* s) { return s->session.length(); }
size_t fiedler_cache_bytes_per_token(const fiedler_session* s) {
    return fiedler::cache_bytes(s->session.model().spec(), s->session.options().cache).ours;
}
}
