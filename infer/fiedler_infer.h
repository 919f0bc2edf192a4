/* infer/fiedler_infer.h: the CPU runtime of Fiedler for other programs. C99; libfiedler_infer has no other dependency
 * than the C++ and OpenMP runtimes.
 *
 *     fiedler_model *model = fiedler_load("model-int8.fdl");
 *     fiedler_session *session = fiedler_start(model, 1, 0, FIEDLER_CACHE_COMPACT);
 *     fiedler_feed(session, tokens, count);
 *     int32_t next = fiedler_pick(session, NULL);
 *
 * A model may be shared by threads; a session belongs to one at a time. Functions that fail return NULL or a negative
 * number, and fiedler_error() then says why, in one line, until the thread's next failure. */
#ifndef FIEDLER_INFER_H
#define FIEDLER_INFER_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#define FIEDLER_API __attribute__((visibility("default")))
#else
#define FIEDLER_API
#endif

typedef struct fiedler_model fiedler_model;
typedef struct fiedler_session fiedler_session;

/* What the cache keeps of a token: values f32 and scalars f16; all f32; values int8 and scalars f16. */
enum { FIEDLER_CACHE_COMPACT = 0, FIEDLER_CACHE_EXACT = 1, FIEDLER_CACHE_INT8 = 2 };
enum { FIEDLER_OK = 0, FIEDLER_FAILED = -1, FIEDLER_BAD_INPUT = -2 };

typedef struct {
    double temperature; /* 0: always the likeliest token */
    int64_t top_k;      /* 0: all */
    double top_p;       /* 1: all */
    uint64_t seed;
} fiedler_sampling;

FIEDLER_API const char* fiedler_error(void);

/* A .fdl file of `fiedler train`, `export` or `quantize`. It is mapped: do not change it while the model lives. */
FIEDLER_API fiedler_model* fiedler_load(const char* path);
FIEDLER_API void fiedler_free(fiedler_model*); /* after its sessions; NULL is fine */
FIEDLER_API int32_t fiedler_vocab(const fiedler_model*);
FIEDLER_API int32_t fiedler_context(const fiedler_model*); /* tokens of a training sequence */

/* The tokenizer, if the file has one or tokenizer.model lies beside it: else FIEDLER_BAD_INPUT, or NULL.
 * encode: tokens of a text of any bytes; writes at most `room` and returns how many there are.
 * piece: the bytes of a token, not terminated; a character may be spread over several tokens.
 * separator: begins and ends a document. */
FIEDLER_API int64_t fiedler_encode(const fiedler_model*, const char* text, size_t bytes, int32_t* tokens, int64_t room);
FIEDLER_API const char* fiedler_piece(const fiedler_model*, int32_t token, size_t* bytes);
FIEDLER_API int32_t fiedler_separator(const fiedler_model*);

/* threads 0: all; capacity: tokens at most, 0: fiedler_context(). */
FIEDLER_API fiedler_session* fiedler_start(const fiedler_model*, int threads, int64_t capacity, int cache);
FIEDLER_API void fiedler_end(fiedler_session*);
FIEDLER_API void fiedler_reset(fiedler_session*); /* to an empty sequence */
/* Appends tokens: a prompt at once, or the next one. */
FIEDLER_API int fiedler_feed(fiedler_session*, const int32_t* tokens, int64_t count);
FIEDLER_API const float* fiedler_logits(const fiedler_session*); /* [vocab], after the last token fed */
FIEDLER_API int32_t fiedler_pick(const fiedler_session*, const fiedler_sampling*); /* NULL: the likeliest */
FIEDLER_API int64_t fiedler_length(const fiedler_session*);
FIEDLER_API size_t fiedler_cache_bytes_per_token(const fiedler_session*);

#ifdef __cplusplus
}
#endif
#endif
