/* The header as C99, and its functions called from C: runtime_test.cpp runs this. */
#include "infer/fiedler_infer.h"

/* 0: all is as documented; else the number of the check that failed. */
int fiedler_header_test(const char* path) {
    const char* text = "int main";
    int32_t tokens[64];
    size_t bytes = 0;
    const fiedler_sampling how = {1.0, 5, 0.9, 7};
    if (fiedler_load("no such file") || !*fiedler_error()) return 1;
    if (fiedler_load(0)) return 2;
    fiedler_model* model = fiedler_load(path);
    if (!model) return 3;
    const int64_t count = fiedler_encode(model, text, 8, tokens, 64);
    if (count < 1 || count > 8) return 4;
    if (fiedler_encode(model, text, 8, tokens, 0) != count) return 5;
    if (!fiedler_piece(model, tokens[0], &bytes) || bytes < 1 || fiedler_piece(model, -1, &bytes)) return 6;
    if (fiedler_start(model, 1, 16, 3) || fiedler_start(model, 1, -1, 0)) return 7;
    fiedler_session* session = fiedler_start(model, 1, 16, FIEDLER_CACHE_INT8);
    if (!session || fiedler_feed(session, tokens, 0) != FIEDLER_BAD_INPUT) return 8;
    if (fiedler_feed(session, tokens, count) != FIEDLER_OK || fiedler_length(session) != count) return 9;
    const int32_t best = fiedler_pick(session, 0), drawn = fiedler_pick(session, &how);
    if (best < 0 || best >= fiedler_vocab(model) || drawn < 0 || drawn >= fiedler_vocab(model)) return 10;
    for (int32_t t = 0; t < fiedler_vocab(model); ++t)
        if (fiedler_logits(session)[t] > fiedler_logits(session)[best]) return 11;
    fiedler_reset(session);
    if (fiedler_length(session) != 0 || fiedler_cache_bytes_per_token(session) == 0) return 12;
    if (fiedler_separator(model) < 0 || fiedler_context(model) < 1) return 13;
    fiedler_end(session);
    fiedler_free(model);
    fiedler_free(0);
    return 0;
}
