// engine/json_depth.h: how deeply a JSON text is nested. The JSON library writes and copies by recursion, so a text of
// brackets alone would overflow the stack: what is read from a file is held to kDeepestJson before it is parsed.
#pragma once
#include <algorithm>
#include <string_view>

namespace fiedler {

inline constexpr int kDeepestJson = 64;

inline int json_depth(std::string_view text) {
    int depth = 0, deepest = 0;
    bool quoted = false;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (quoted && c == '\\')
            ++i;
        else if (c == '"')
            quoted = !quoted;
        else if (!quoted && (c == '[' || c == '{'))
            deepest = std::max(deepest, ++depth);
        else if (!quoted && (c == ']' || c == '}'))
            --depth;
    }
    return deepest;
}

}  // namespace fiedler
