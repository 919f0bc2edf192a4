/* infer/example.c: continues a text with libfiedler_infer: example MODEL.fdl "text" [tokens] */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fiedler_infer.h"

static int fail(const char* what) {
    fprintf(stderr, "%s: %s\n", what, fiedler_error());
    return 2;
}

int main(int argc, char** argv) {
    if (argc < 3) return fprintf(stderr, "usage: example MODEL.fdl TEXT [TOKENS]\n"), 2;
    const int64_t wanted = argc > 3 ? atoll(argv[3]) : 64;
    fiedler_model* model = fiedler_load(argv[1]);
    if (!model) return fail("load");
    const int64_t room = (int64_t)strlen(argv[2]) + 1; /* a token has a byte at least */
    int32_t* tokens = malloc(sizeof *tokens * (size_t)room);
    tokens[0] = fiedler_separator(model); /* a document begins where the one before it ended */
    const int64_t count = fiedler_encode(model, argv[2], strlen(argv[2]), tokens + 1, room - 1);
    if (count < 0) return fail("encode");
    fiedler_session* session = fiedler_start(model, 1, count + 1 + wanted, FIEDLER_CACHE_COMPACT);
    if (!session || fiedler_feed(session, tokens, count + 1) != FIEDLER_OK) return fail("prompt");
    fputs(argv[2], stdout);
    for (int64_t i = 0; i < wanted; ++i) {
        const int32_t next = fiedler_pick(session, NULL);
        size_t bytes = 0;
        if (next == fiedler_separator(model)) break;
        const char* piece = fiedler_piece(model, next, &bytes);
        fwrite(piece, 1, bytes, stdout);
        if (fiedler_feed(session, &next, 1) != FIEDLER_OK) return fail("generate");
    }
    putchar('\n');
    fiedler_end(session);
    fiedler_free(model);
    free(tokens);
    return 0;
}
